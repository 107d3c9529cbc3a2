# SPDX-License-Identifier: Apache-2.0
"""Memory, system calls and file descriptors of a stopped QEMU.

Arguments are placed in the unused part of the stopped thread's own stack, below
the red zone: nothing is mapped, so nothing can be left mapped. May import
``abi``, ``errors``, ``newtypes``, ``linux``, ``qemu.process`` and ``qemu.tracee``.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux
from kvmi_libvirt.abi import x86_64 as x86
from kvmi_libvirt.errors import RemoteCallTimeout, RemoteSyscallError, TargetUnsuitable
from kvmi_libvirt.newtypes import RemoteAddr, RemoteFd

if TYPE_CHECKING:
    from kvmi_libvirt.qemu.process import Process
    from kvmi_libvirt.qemu.tracee import Tracee

SCRATCH_LEN: Final = 2048

_SOCK_CLOEXEC: Final = 0o2000000
_MSG_DONTWAIT: Final = 0x40
_MSG_CMSG_CLOEXEC: Final = 0x40000000
_MSG_CTRUNC: Final = 0x8

_iovec: Final = struct.Struct("=QQ")
_msghdr: Final = struct.Struct("=QIIQQQQII")  # name, namelen, pad, iov x2, control x2, flags, pad
_cmsghdr: Final = struct.Struct("=Qii")
_CMSG_LEN: Final = _cmsghdr.size + 4  # one fd
_CMSG_SPACE: Final = 24


class Remote:
    """What the stopped thread of *process* can be made to do for us.

    Valid only while *tracee* is entered. Holds no resource of its own.
    """

    def __init__(self, process: Process, tracee: Tracee) -> None:
        """Find room for arguments. Raises TargetUnsuitable when the stack has none."""
        self.process = process
        self._tracee = tracee
        top = tracee.stack_pointer - x86.RED_ZONE_LEN
        self.scratch = RemoteAddr((top - SCRATCH_LEN) & ~63)
        # A write below what the stack ever used could miss the mapping; check by
        # reading before anything is changed.
        try:
            linux.process_vm_readv(process.pid, self.scratch, SCRATCH_LEN)
        except OSError as error:
            raise TargetUnsuitable(
                f"no room below the stack of QEMU's main thread: {error.strerror}", pid=process.pid
            ) from error

    def write(self, offset: int, data: bytes) -> RemoteAddr:
        """Write *data* at *offset* bytes into the scratch area; return its address."""
        assert offset >= 0
        assert offset + len(data) <= SCRATCH_LEN
        address = RemoteAddr(self.scratch + offset)
        linux.process_vm_writev(self.process.pid, address, data)
        return address

    def read(self, offset: int, length: int) -> bytes:
        """Return *length* bytes at *offset* of the scratch area."""
        return linux.process_vm_readv(self.process.pid, RemoteAddr(self.scratch + offset), length)

    def call(self, name: str, number: int, *args: int) -> int:
        """Make one system call and return its result.

        Raises
            RemoteSyscallError  the kernel refused; .errno and .call tell what
            RemoteCallTimeout   it blocked beyond the deadline and was abandoned
        """
        try:
            result = self._tracee.syscall(number, *args)
        except RemoteCallTimeout as error:
            raise RemoteCallTimeout(error.errno or 0, name, error.detail) from error
        if -x86.MAX_ERRNO <= result < 0:
            raise RemoteSyscallError(-result, name)
        return result

    def ioctl(self, name: str, fd: RemoteFd, request: int, argument: int) -> int:
        """Make one ioctl(2) on *fd*; *name* is the request's, for the error."""
        return self.call(name, x86.NR_IOCTL, fd, request, argument)

    def close(self, fd: RemoteFd) -> None:
        """Close *fd* in QEMU."""
        self.call("close", x86.NR_CLOSE, fd)

    def socketpair(self) -> tuple[RemoteFd, RemoteFd]:
        """Make a connected pair of close-on-exec unix stream sockets in QEMU."""
        self.call(
            "socketpair",
            x86.NR_SOCKETPAIR,
            socket.AF_UNIX,
            socket.SOCK_STREAM | _SOCK_CLOEXEC,
            0,
            self.scratch,
        )
        first, second = struct.unpack("=ii", self.read(0, 8))
        return RemoteFd(first), RemoteFd(second)

    def send_through(self, near: RemoteFd, sock: socket.socket) -> None:
        """Put *sock* into the queue of QEMU's other end of the pair that *near* belongs to.

        Nothing runs in QEMU for this: our own copy of *near* is made, used and closed.
        """
        local = linux.pidfd_getfd(self.process.pidfd, near)
        with socket.socket(fileno=local) as pair:
            rights = array.array("i", [sock.fileno()])
            pair.sendmsg(
                [b"\0"],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
                socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
            )

    def receive_fd(self, far: RemoteFd) -> RemoteFd:
        """Let QEMU take the fd that waits on *far*; return its number there.

        Raises
            RemoteSyscallError  EMFILE when QEMU has no free descriptor (nothing is left),
                                or the kernel's errno
        """
        iov_at, control_at, data_at = 64, 96, 128
        message = bytearray(data_at + 8)
        _msghdr.pack_into(
            message,
            0,
            *(0, 0, 0),
            *(self.scratch + iov_at, 1),
            *(self.scratch + control_at, _CMSG_SPACE),
            *(0, 0),
        )
        _iovec.pack_into(message, iov_at, self.scratch + data_at, 1)
        self.write(0, bytes(message))
        flags = _MSG_DONTWAIT | _MSG_CMSG_CLOEXEC
        self.call("recvmsg", x86.NR_RECVMSG, far, self.scratch, flags)
        answer = self.read(0, data_at)
        result_flags = struct.unpack_from("=I", answer, 48)[0]
        length, level, kind = _cmsghdr.unpack_from(answer, control_at)
        if (
            result_flags & _MSG_CTRUNC
            or (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            or length != _CMSG_LEN
        ):
            raise RemoteSyscallError(
                errno.EMFILE,
                "recvmsg",
                "QEMU did not get the socket: its descriptor table is full, "
                "or a security module refused it",
            )
        (fd,) = struct.unpack_from("=i", answer, control_at + _cmsghdr.size)
        return RemoteFd(fd)

    def require_same_socket(self, fd: RemoteFd, sock: socket.socket) -> None:
        """Raise RemoteSyscallError unless QEMU's *fd* is the very socket *sock*."""
        expected = f"socket:[{os.fstat(sock.fileno()).st_ino}]"
        found = self.process.fd_link(fd)
        if found != expected:
            raise RemoteSyscallError(
                errno.EBADF, "recvmsg", f"descriptor {fd} is {found}, not {expected}"
            )

    def write_struct(self, offset: int, value: ctypes.Structure) -> RemoteAddr:
        """Write a kernel structure at *offset* of the scratch area; return its address."""
        return self.write(offset, bytes(value))
