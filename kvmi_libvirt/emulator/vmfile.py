# SPDX-License-Identifier: Apache-2.0
"""Naming an open VM file of another process without keeping it open.

A copy of the VM fd would keep the VM alive after QEMU is gone, so the supervisor
holds none. What it needs to know later is: is this fd that very file (a dup is, a
reused number is not)? And is the file still open anywhere? Both are answered by
an open-file-description lock on one byte at a random offset: the lock belongs to
the VM *file*, lasts exactly as long as that does, and can be tested from any other
file of the same inode. All KVM files share the anonymous inode with every eventfd,
and no driver looks at such locks.

Imports ``newtypes`` only. Source: fcntl(2), "Open file description locks".
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvmi_libvirt.newtypes import LocalFd

_FLOCK: Final = struct.Struct("hhqqi0q")  # struct flock: type, whence, start, len, pid
_OFFSET_BYTES: Final = 7  # offsets are signed 64-bit


class VmFile:
    """One open VM file, by a lock that lives in it. Use it with ``with`` or close it.

    Parameters
        copy  borrowed: any fd of the file; needed only while this runs
    Raises
        OSError  the lock cannot be placed, or not be seen from outside (EIO)
    """

    def __init__(self, copy: LocalFd) -> None:
        self._offset = int.from_bytes(os.urandom(_OFFSET_BYTES), "little")
        self._probe = _other_file_of_inode(copy)
        try:
            self._lock(copy, fcntl.F_OFD_SETLK)
            if not self.is_open():
                raise OSError(errno.EIO, "a lock on the VM file is not visible from outside")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VmFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the file. Its lock stays for as long as the file does. Idempotent."""
        if self._probe >= 0:
            os.close(self._probe)
            self._probe = -1

    def is_open(self) -> bool:
        """Say whether any process still has the file open."""
        return self._lock(self._probe, fcntl.F_OFD_GETLK) != fcntl.F_UNLCK

    def is_same(self, copy: LocalFd) -> bool:
        """Say whether *copy* (borrowed) is this file."""
        # A file's own lock never conflicts with itself.
        return self._lock(copy, fcntl.F_OFD_GETLK) == fcntl.F_UNLCK and self.is_open()

    def _lock(self, fd: int, command: int) -> int:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, self._offset, 1, 0)
        return int(_FLOCK.unpack(fcntl.fcntl(fd, command, wanted))[0])


def _other_file_of_inode(copy: LocalFd) -> int:
    # The memfd of the stand-in has an inode of its own; anonymous files refuse to
    # be opened again, and share theirs with an eventfd.
    try:
        return os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.eventfd(0, os.EFD_CLOEXEC)
