# SPDX-License-Identifier: Apache-2.0
"""Hear from the kernel that something in a directory changed.

What changed is only a reason to look: names are reported, contents never trusted.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_event: Final = struct.Struct("=iIII")
_BUFFER_LEN: Final = 64 << 10
_MASK: Final = (
    linux.IN_CREATE | linux.IN_DELETE | linux.IN_MOVED_TO | linux.IN_CLOSE_WRITE | linux.IN_ONLYDIR
)


class Directories:
    """Watched directories; each has one function to call with a name, or None for any."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch nothing yet."""
        self._loop = loop
        self._fd = linux.inotify_new()
        self._calls: dict[int, Callable[[str | None], None]] = {}
        self._paths: set[str] = set()
        loop.add_reader(self._fd, self._ready)

    def watch(self, path: str, call: Callable[[str | None], None]) -> bool:
        """Watch the directory *path*; say whether that can be. Twice is once."""
        if path in self._paths:
            return True
        try:
            number = linux.inotify_add_watch(self._fd, path, _MASK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                logger.warning("cannot watch %s: %s", path, error.strerror)
            return False
        self._calls[number] = call
        self._paths.add(path)
        return True

    def _ready(self) -> None:
        try:
            buffer = os.read(self._fd, _BUFFER_LEN)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(buffer):
            number, mask, _cookie, length = _event.unpack_from(buffer, offset)
            offset += _event.size
            raw = buffer[offset : offset + length].rstrip(b"\0")
            offset += length
            if mask & linux.IN_Q_OVERFLOW:
                for call in tuple(self._calls.values()):
                    call(None)
            elif number in self._calls and raw:
                self._calls[number](os.fsdecode(raw))

    def close(self) -> None:
        """Watch nothing any more."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
