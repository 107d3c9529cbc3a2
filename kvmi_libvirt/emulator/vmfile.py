# SPDX-License-Identifier: Apache-2.0
"""Naming an open VM file of another process without keeping it open.

A copy of the VM fd would keep the VM alive after QEMU is gone, so the supervisor
holds none. What it needs to know later is: is this fd that very file (a dup is, a
reused number is not)? And is the file still open anywhere? Both are answered by
an open-file-description lock on one byte at a random offset: the lock belongs to
the VM *file*, lasts exactly as long as that does, /proc/PID/fdinfo shows it for
each fd of the file, and it can be tested from any other file of the same inode. All
KVM files share the anonymous inode with every eventfd, and no driver looks at such
locks.

Imports ``newtypes`` only. Source: fcntl(2), "Open file description locks"; proc(5).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvmi_libvirt.newtypes import LocalFd, Pid, RemoteFd, Tid

_FLOCK: Final = struct.Struct("hhqqi0q")  # struct flock: type, whence, start, len, pid
_OFFSET_BYTES: Final = 7  # offsets are signed 64-bit
_FDINFO_LEN: Final = 16 * 1024
_fdinfo: Final = bytearray(_FDINFO_LEN)  # what was read last; a supervisor has one thread


class Inode:
    """The inode all anonymous files share, by a file of it. Use it with ``with`` or close it."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.identity = _identity(self.fd)

    def __enter__(self) -> Inode:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class VmFile:
    """One open VM file, by a lock that lives in it. Use it with ``with`` or close it.

    ``mark`` is among the :func:`marks` of every fd of this file, and of no other.

    Parameters
        copy       borrowed: any fd of the file; needed only while this runs
        anonymous  borrowed, open for as long as this is used
    Raises
        OSError  the lock cannot be placed, or not be seen from outside (EIO)
    """

    def __init__(self, copy: LocalFd, anonymous: Inode) -> None:
        self._offset = int.from_bytes(os.urandom(_OFFSET_BYTES), "little")
        self._own_probe = -1
        self._anonymous = anonymous
        if _identity(copy) != anonymous.identity:
            # A stand-in's memfd, which can be opened once more.
            self._own_probe = os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._lock(copy, fcntl.F_OFD_SETLK)
            found = [mark for mark in marks("self", copy) if mark.endswith(b" %d" % self._offset)]
            if not found or not self.is_open():
                raise OSError(errno.EIO, "a lock on the VM file is not visible from outside")
            self.mark = found[0]
            self.in_fdinfo = b" %b " % self.mark
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VmFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the file. Its lock stays for as long as the file does. Idempotent."""
        if self._own_probe >= 0:
            os.close(self._own_probe)
            self._own_probe = -1

    def is_open(self) -> bool:
        """Say whether any process still has the file open."""
        probe = self._own_probe if self._own_probe >= 0 else self._anonymous.fd
        return self._lock(probe, fcntl.F_OFD_GETLK) != fcntl.F_UNLCK

    def _lock(self, fd: int, command: int) -> int:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, self._offset, 1, 0)
        return int(_FLOCK.unpack(fcntl.fcntl(fd, command, wanted))[0])


def marks(task: Tid | str, fd: RemoteFd | LocalFd) -> list[bytes]:
    """Return the marks of the file behind *fd* in the file table of *task*.

    Parameters
        task  a thread id, or "self"
    Returns
        an inode and an offset for each lock the file has; none when *fd* is not open
    Raises
        OSError  the thread is gone, or may not be looked at
    """
    try:
        info = os.open(f"/proc/{task}/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        text = os.read(info, _FDINFO_LEN)
    finally:
        os.close(info)
    # lock:  1: OFDLCK ADVISORY  WRITE -1 00:10:1038 OFFSET OFFSET
    fields = [line.split() for line in text.split(b"\n") if b" OFDLCK " in line]
    return [b"%b %b" % (field[-3], field[-2]) for field in fields]


class Place:
    """One fd of one process, asked again and again whether it is still the same VM.

    Shows what the number stands for now, for as long as the process lives; a later
    process of the same number is never meant. Use it with ``with`` or close it.

    Raises
        OSError  there is no such process or fd, or it may not be looked at
    """

    def __init__(self, pid: Pid, fd: RemoteFd) -> None:
        self._info = os.open(f"/proc/{pid}/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the place. Idempotent."""
        if self._info >= 0:
            os.close(self._info)
            self._info = -1

    def has(self, file: VmFile) -> bool:
        """Say whether the fd is *file* now."""
        try:
            length = os.preadv(self._info, (_fdinfo,), 0)
        except OSError:  # the process, or the fd, is gone
            return False
        return _fdinfo.find(file.in_fdinfo, 0, length) >= 0


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
