# SPDX-License-Identifier: Apache-2.0
"""Hear from the kernel that something in a directory changed.

What changed is only a reason to look: names are reported, contents never trusted.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from typing import TYPE_CHECKING, Final, TypeAlias

from kvmi_libvirt import linux

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

logger = logging.getLogger(__name__)

Call: TypeAlias = "Callable[[str, frozenset[str] | None], None]"
"""Is given the directory and what was changed in it; None where that is not known."""

CHANGED: Final = linux.IN_CREATE | linux.IN_DELETE | linux.IN_MOVED_TO | linux.IN_CLOSE_WRITE
MADE: Final = linux.IN_CREATE | linux.IN_MOVED_TO

_event: Final = struct.Struct("=iIII")
_BUFFER_LEN: Final = 64 << 10


class Directories:
    """Watched directories.

    Parameters
        mask     what is reported: CHANGED, or only MADE
        pause_s  how long to let changes gather after some were reported, so that who
                 may write into a directory cannot keep the loop busy by it
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, mask: int = CHANGED, pause_s: float = 0.0
    ) -> None:
        """Watch nothing yet."""
        self._loop = loop
        self._mask = mask
        self._pause_s = pause_s
        self._fd = linux.inotify_new()
        self._calls: dict[int, list[tuple[str, Call]]] = {}
        self._pause: asyncio.TimerHandle | None = None
        loop.add_reader(self._fd, self._ready)

    def __len__(self) -> int:
        """Return how many directories are watched."""
        return len(self._calls)

    def watch(self, path: str, call: Call) -> bool:
        """Watch the directory *path*; say whether that can be. Twice is once."""
        try:
            number = linux.inotify_add_watch(self._fd, path, self._mask | linux.IN_ONLYDIR)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                logger.warning("cannot watch %s: %s", path, error.strerror)
            return False
        # One number for one directory, by whichever path it is reached.
        calls = self._calls.setdefault(number, [])
        if (path, call) not in calls:
            calls.append((path, call))
        return True

    def _ready(self) -> None:
        try:
            buffer = os.read(self._fd, _BUFFER_LEN)
        except BlockingIOError:
            return
        if self._pause_s:
            self._loop.remove_reader(self._fd)
            self._pause = self._loop.call_later(
                self._pause_s, self._loop.add_reader, self._fd, self._ready
            )
        names: dict[int, set[str]] = {}
        is_complete = True
        offset = 0
        while offset < len(buffer):
            number, mask, _cookie, length = _event.unpack_from(buffer, offset)
            offset += _event.size
            raw = buffer[offset : offset + length].rstrip(b"\0")
            offset += length
            if mask & linux.IN_Q_OVERFLOW:
                is_complete = False
            elif mask & linux.IN_IGNORED:
                self._calls.pop(number, None)  # removed; one made in its place is another
            elif raw:
                names.setdefault(number, set()).add(os.fsdecode(raw))
        for number in names if is_complete else tuple(self._calls):
            found = frozenset(names[number]) if is_complete else None
            for path, call in tuple(self._calls.get(number, ())):
                call(path, found)

    def close(self) -> None:
        """Watch nothing any more."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
