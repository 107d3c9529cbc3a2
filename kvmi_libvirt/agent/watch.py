# SPDX-License-Identifier: Apache-2.0
"""Learn, without asking again and again, that a tool closed its channel or a VM ended.

One epoll for all VMs. Of a channel only its end is waited for, never its data, which
is between the tool and KVM: an idle agent is not woken by a busy tool.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Watcher:
    """Owns descriptors, and calls back once when what they stand for has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch nothing yet."""
        self._loop = loop
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._epoll.fileno(), self._ready)

    def __len__(self) -> int:
        """Return how many descriptors are watched."""
        return len(self._calls)

    def watch_channel(self, fd: int, call: Callable[[], None]) -> None:
        """Take over *fd*, a socket; *call* when its peer closes or it is shut down."""
        self._watch(fd, select.EPOLLRDHUP | select.EPOLLHUP, call)

    def watch_process(self, pidfd: int, call: Callable[[], None]) -> None:
        """Take over *pidfd*; *call* when the process ends."""
        self._watch(pidfd, select.EPOLLIN, call)

    def _watch(self, fd: int, events: int, call: Callable[[], None]) -> None:
        try:
            self._epoll.register(fd, events)
        except BaseException:
            os.close(fd)
            raise
        self._calls[fd] = call

    def forget(self, fd: int) -> None:
        """Stop watching *fd* and close it; an unknown one is left alone.

        It must be unregistered first: the kernel holds the channel as well, and an
        epoll entry lives as long as the file, not the descriptor.
        """
        if self._calls.pop(fd, None) is None:
            return
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        os.close(fd)

    def _ready(self) -> None:
        for fd, _events in self._epoll.poll(0):
            call = self._calls.get(fd)
            self.forget(fd)
            if call is not None:
                call()

    def close(self) -> None:
        """Stop watching and close everything."""
        self._loop.remove_reader(self._epoll.fileno())
        for fd in tuple(self._calls):
            self.forget(fd)
        self._epoll.close()
