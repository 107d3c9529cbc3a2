# SPDX-License-Identifier: Apache-2.0
"""Memory, system calls and file descriptors of a stopped QEMU.

Arguments are placed in the unused part of the stopped thread's own stack, below
the red zone: nothing is mapped, so nothing can be left mapped. May import
``abi``, ``errors``, ``newtypes``, ``linux`` and ``qemu.process``.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, Protocol

from kvmi_libvirt import linux
from kvmi_libvirt.abi import x86_64 as x86
from kvmi_libvirt.errors import RemoteCallTimeout, RemoteSyscallError, TargetUnsuitable
from kvmi_libvirt.newtypes import RemoteAddr, RemoteFd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.qemu.process import Process

SCRATCH_LEN: Final = 2048
MESSAGE_LEN: Final = 112
"""How much of the scratch area :meth:`Remote.message` takes up, from its beginning."""
RECEIVED_FD_OFFSET: Final = MESSAGE_LEN
"""Where the kernel writes the descriptor that :meth:`Remote.receive_fd` takes.

Four bytes, and it leaves the next four alone: a structure that begins with the
descriptor can lie there ready.
"""

_SOCK_CLOEXEC: Final = 0o2000000
_MSG_DONTWAIT: Final = 0x40
_MSG_CMSG_CLOEXEC: Final = 0x40000000
_MSG_CTRUNC: Final = 0x8

_ucred: Final = struct.Struct("@iII")
_iovec: Final = struct.Struct("=QQ")
_msghdr: Final = struct.Struct("=QIIQQQQII")  # name, namelen, pad, iov x2, control x2, flags, pad
_cmsghdr: Final = struct.Struct("=Qii")
_CMSG_LEN: Final = _cmsghdr.size + 4  # one fd
_CMSG_SPACE: Final = 24
_IOV_OFFSET: Final = 64
_CONTROL_OFFSET: Final = RECEIVED_FD_OFFSET - _cmsghdr.size
_DATA_OFFSET: Final = SCRATCH_LEN - 16
_PAIR_OFFSET: Final = SCRATCH_LEN - 8


class Caller(Protocol):
    """A thread that makes system calls for us: a Tracee, as a rule."""

    @property
    def stack_pointer(self) -> RemoteAddr:
        """Return where the used part of its stack ends."""

    def syscall(self, number: int, *args: int) -> int:
        """Make one call; return its result, or a negative errno."""


class Remote:
    """What a stopped thread of *process* can be made to do for us.

    Valid only while the thread is held. Holds no resource of its own.
    """

    def __init__(self, process: Process, caller: Caller) -> None:
        """Take the unused stack below the red zone; nothing is looked at yet."""
        self.process = process
        self._caller = caller
        top = caller.stack_pointer - x86.RED_ZONE_LEN
        self.scratch = RemoteAddr((top - SCRATCH_LEN) & ~63)

    def write(self, offset: int, data: bytes) -> RemoteAddr:
        """Write *data* at *offset* bytes into the scratch area; return its address.

        Raises TargetUnsuitable when the stack does not reach that far; nothing is changed.
        """
        assert offset >= 0
        assert offset + len(data) <= _DATA_OFFSET
        address = RemoteAddr(self.scratch + offset)
        try:
            linux.process_vm_writev(self.process.pid, address, data)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise TargetUnsuitable(
                f"no room below the stack of QEMU's main thread: {error.strerror}",
                pid=self.process.pid,
            ) from error
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
            result = self._caller.syscall(number, *args)
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
            self.scratch + _PAIR_OFFSET,
        )
        first, second = struct.unpack("=ii", self.read(_PAIR_OFFSET, 8))
        return RemoteFd(first), RemoteFd(second)

    def send_through(self, near: RemoteFd, sock: socket.socket) -> None:
        """Put *sock* into the queue of QEMU's other end of the pair that *near* belongs to.

        Nothing runs in QEMU for this: our own copy of *near* is made, used and closed.

        Raises
            RemoteSyscallError  another thread of QEMU has put something else in its place
        """
        with half_of_pair(self.process, near) as pair:
            if pair is None:
                raise RemoteSyscallError(
                    errno.EBADF, "socketpair", f"descriptor {near} is no socket of a pair any more"
                )
            rights = array.array("i", [sock.fileno()])
            pair.sendmsg(
                [b"\0"],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
                socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
            )

    def message(self) -> bytes:
        """Return what must lie at the beginning of the scratch area for receive_fd()."""
        block = bytearray(MESSAGE_LEN)
        _msghdr.pack_into(
            block,
            0,
            *(0, 0, 0),
            *(self.scratch + _IOV_OFFSET, 1),
            *(self.scratch + _CONTROL_OFFSET, _CMSG_SPACE),
            *(0, 0),
        )
        _iovec.pack_into(block, _IOV_OFFSET, self.scratch + _DATA_OFFSET, 1)
        return bytes(block)

    def receive_fd(self, far: RemoteFd) -> RemoteFd:
        """Let QEMU take the fd that waits on *far*; return its number there.

        What message() returned must have been written. The number is also left at
        :data:`RECEIVED_FD_OFFSET`.

        Raises
            RemoteSyscallError  EMFILE when QEMU has no free descriptor (nothing is left),
                                or the kernel's errno
        """
        flags = _MSG_DONTWAIT | _MSG_CMSG_CLOEXEC
        self.call("recvmsg", x86.NR_RECVMSG, far, self.scratch, flags)
        answer = self.read(0, RECEIVED_FD_OFFSET + 4)
        result_flags = struct.unpack_from("=I", answer, 48)[0]
        length, level, kind = _cmsghdr.unpack_from(answer, _CONTROL_OFFSET)
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
        (fd,) = struct.unpack_from("=i", answer, RECEIVED_FD_OFFSET)
        return RemoteFd(fd)

    def require_link(self, fd: RemoteFd, expected: str) -> None:
        """Raise RemoteSyscallError unless QEMU's *fd* is what socket_link() told."""
        found = self.process.fd_link(fd)
        if found != expected:
            raise RemoteSyscallError(
                errno.EBADF, "recvmsg", f"descriptor {fd} is {found}, not {expected}"
            )

    def write_struct(self, offset: int, value: ctypes.Structure) -> RemoteAddr:
        """Write a kernel structure at *offset* of the scratch area; return its address."""
        return self.write(offset, bytes(value))


@contextlib.contextmanager
def half_of_pair(process: Process, fd: RemoteFd) -> Iterator[socket.socket | None]:
    """Have a copy of *fd* of *process* for the block, if it is of a nameless pair that it made.

    Raises
        OSError  the fd cannot be copied; the block was not begun
    """
    local = linux.pidfd_getfd(process.pidfd, fd)
    # What it is is asked below: to have Python find out takes twice as long.
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=local)
    except OSError:  # no socket at all
        os.close(local)
        yield None
        return
    with sock:
        yield sock if _is_own_pair(process, sock) else None


def _is_own_pair(process: Process, sock: socket.socket) -> bool:
    # Only of a unix socket does the kernel know who made it: pid 0 otherwise.
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size)
    if _ucred.unpack(raw)[0] != process.pid or sock.getsockname():
        return False
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
        return False
    try:
        return not sock.getpeername()
    except OSError:  # its other end is closed: then it was half of a pair, or is gone anyway
        return True


def socket_link(sock: socket.socket) -> str:
    """Return what a descriptor of *sock* refers to, as /proc shows it."""
    return f"socket:[{os.fstat(sock.fileno()).st_ino}]"
