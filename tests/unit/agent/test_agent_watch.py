# SPDX-License-Identifier: Apache-2.0
"""Channels and processes that end, with as little waking up as that needs."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
from collections.abc import Awaitable, Callable

import pytest

from kvmi_libvirt.agent.watch import Watcher

PATIENCE_S = 20.0


class Ends:
    """Counts the calls, each for one thing that is watched."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._came = asyncio.Event()

    def of(self, name: str) -> Callable[[], None]:
        def call() -> None:
            self.names.append(name)
            self._came.set()

        return call

    async def wait(self, *names: str) -> None:
        while sorted(self.names) != sorted(names):
            self._came.clear()
            await asyncio.wait_for(self._came.wait(), PATIENCE_S)


def watching(body: Callable[[Watcher, Ends], Awaitable[None]]) -> None:
    async def main() -> None:
        watcher = Watcher(asyncio.get_running_loop())
        try:
            await body(watcher, Ends())
        finally:
            watcher.close()

    asyncio.run(main())


async def turn(count: int = 20) -> None:
    """Let the loop turn, so that what is ready is seen."""
    for _ in range(count):
        await asyncio.sleep(0)


def pair() -> tuple[int, socket.socket]:
    """Return our copy of a channel, and the tool's end."""
    ours, tool = socket.socketpair()
    return ours.detach(), tool


def test_a_channel_ends_when_its_tool_closes_or_shuts_it_down() -> None:
    async def body(watcher: Watcher, ends: Ends) -> None:
        first, second, third = pair(), pair(), pair()
        for name, (fd, _) in zip("abc", (first, second, third), strict=True):
            watcher.watch_channel(fd, ends.of(name))
        first[1].close()
        second[1].shutdown(socket.SHUT_WR)
        await ends.wait("a", "b")
        assert len(watcher) == 1
        second[1].close()
        third[1].close()

    watching(body)


def test_a_channel_ends_when_the_kernel_shuts_down_its_side() -> None:
    async def body(watcher: Watcher, ends: Ends) -> None:
        ours, tool = socket.socketpair()
        with ours, tool:
            watcher.watch_channel(os.dup(ours.fileno()), ends.of("a"))
            ours.shutdown(socket.SHUT_RDWR)  # as KVM does at UNHOOK
            await ends.wait("a")

    watching(body)


def test_what_a_busy_tool_says_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(watcher: Watcher, ends: Ends) -> None:
        woken = []
        really = Watcher._ready

        def counted(self: Watcher) -> None:
            woken.append(1)
            really(self)

        monkeypatch.setattr(Watcher, "_ready", counted)
        loop = asyncio.get_running_loop()
        loop.add_reader(watcher._epoll.fileno(), watcher._ready)  # the counting one
        fd, tool = pair()
        with tool:
            watcher.watch_channel(fd, ends.of("a"))
            for _ in range(100):
                tool.send(b"KVMI message")
                await turn(2)
            assert woken == []
            assert os.read(fd, 12) == b"KVMI message"  # and nobody took it
        # It is woken for the end, of which there is still something to read before.
        await ends.wait("a")
        assert len(woken) == 1

    watching(body)


def test_what_is_not_watched_any_more_is_closed_and_calls_nobody() -> None:
    async def body(watcher: Watcher, ends: Ends) -> None:
        fd, tool = pair()
        watcher.watch_channel(fd, ends.of("a"))
        watcher.forget(fd)
        watcher.forget(fd)  # twice is once: the number may be another's by now
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        tool.close()
        await turn()
        assert ends.names == []

    watching(body)


def test_an_entry_goes_before_the_descriptor_since_the_kernel_holds_the_channel_too() -> None:
    # Else the epoll would report, under a number that is another's, for ever.
    async def body(watcher: Watcher, ends: Ends) -> None:
        ours, tool = socket.socketpair()
        with ours, tool:  # what KVM holds
            fd = os.dup(ours.fileno())
            watcher.watch_channel(fd, ends.of("a"))
            watcher.forget(fd)
            other = pair()
            assert other[0] == fd  # the number is used again
            watcher.watch_channel(other[0], ends.of("b"))
            tool.shutdown(socket.SHUT_RDWR)
            await turn()
            assert ends.names == []
            assert not select.select([watcher._epoll.fileno()], [], [], 0)[0]
            other[1].close()
            await ends.wait("b")

    watching(body)


def test_one_that_ends_may_forget_others_that_ended_at_once() -> None:
    async def body(watcher: Watcher, ends: Ends) -> None:
        channels = [pair() for _ in range(3)]

        def forget_all() -> None:
            ends.of("one")()
            for fd, _ in channels:
                watcher.forget(fd)

        for fd, _ in channels:
            watcher.watch_channel(fd, forget_all)
        for _, tool in channels:
            tool.close()
        await ends.wait("one")
        await turn()
        assert ends.names == ["one"]
        assert len(watcher) == 0

    watching(body)


def test_a_process_that_ends_is_told_once() -> None:
    child = subprocess.Popen(["sleep", "100"])

    async def body(watcher: Watcher, ends: Ends) -> None:
        watcher.watch_process(os.pidfd_open(child.pid), ends.of("child"))
        await turn()
        assert ends.names == []
        child.kill()
        await ends.wait("child")
        await turn()
        assert ends.names == ["child"]

    try:
        watching(body)
    finally:
        child.kill()
        child.wait()


def test_what_cannot_be_watched_is_closed_all_the_same() -> None:
    async def body(watcher: Watcher, ends: Ends) -> None:
        fd = os.open("/dev/null", os.O_RDONLY)  # epoll(7) takes no such file
        with pytest.raises(PermissionError):
            watcher.watch_channel(fd, ends.of("a"))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        assert len(watcher) == 0

    watching(body)


def test_the_end_closes_everything() -> None:
    fds = []

    async def body(watcher: Watcher, ends: Ends) -> None:
        for _ in range(10):
            fd, tool = pair()
            tool.close()
            watcher.watch_channel(fd, ends.of("a"))
            fds.append(fd)

    watching(body)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
