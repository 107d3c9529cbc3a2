# SPDX-License-Identifier: Apache-2.0
"""The mark of a start that is watched for hooking it early: a file, there while it lasts.

libvirt's hook makes it before QEMU exists; whoever sees the start end removes it, and
so tells the watcher. That one holds it open, so that the mark of a later start of the
same domain is never taken for it, and locked: there is one watcher, and the end of its
work can be waited for. May import ``errors``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import StateError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_POLL_S: Final = 0.005
_MAX_LEN: Final = 32


class StartMark:
    """One mark, open. Use it as a context manager; closing it lets go of the lock."""

    def __init__(self, path: Path, fd: int) -> None:
        """Own *fd*, of the file that was at *path*; use :meth:`open`."""
        self._path = path
        self._fd = fd

    @classmethod
    def make(cls, path: Path) -> None:
        """Make the mark of a start that begins now, in place of any other. Raises StateError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            path.unlink(missing_ok=True)
            fd = os.open(path, flags, 0o600)
            try:
                os.write(fd, str(_now_ticks()).encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise StateError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def open(cls, path: Path) -> StartMark | None:
        """Return the mark at *path*, None where no start is watched. Raises StateError."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"cannot read {path}: {error.strerror}") from error
        return cls(path, fd)

    def __enter__(self) -> StartMark:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        os.close(self._fd)

    def made_ticks(self) -> int:
        """Return when it was made, in clock ticks after boot: no process of its start is older."""
        try:
            return int(os.pread(self._fd, _MAX_LEN, 0))
        except ValueError:  # a disk that is full: then any process will do
            return 0

    def is_there(self) -> bool:
        """Say whether its start is still under way."""
        return os.fstat(self._fd).st_nlink > 0

    def claim(self) -> bool:
        """Become its watcher, until it is closed; False when there is one."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait_unclaimed(self, deadline: float) -> bool:
        """Wait until its watcher is done; False when it is not by *deadline* (CLOCK_MONOTONIC).

        Polls, since flock(2) has no timeout.
        """
        while not self.claim():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def end(self) -> None:
        """Remove it: its start is over. Doing it twice is fine."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._fd), os.stat(self._path, follow_symlinks=False)):
                os.unlink(self._path)


def _now_ticks() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
