# SPDX-License-Identifier: Apache-2.0
"""Directories that are watched: the kernel's own events, several listeners, floods."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvmi_libvirt.agent.inotify import MADE, Directories

PATIENCE_S = 20.0
QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")


@dataclass
class Ear:
    """Somebody who listens, and what they heard."""

    heard: list[tuple[str, frozenset[str] | None]] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)

    def call(self, directory: str, names: frozenset[str] | None) -> None:
        self.heard.append((directory, names))
        self.came.set()

    def names(self) -> set[str]:
        return {name for _directory, names in self.heard for name in names or ()}

    async def hears(self, name: str) -> None:
        while name not in self.names():
            self.came.clear()
            await asyncio.wait_for(self.came.wait(), PATIENCE_S)


def put(directory: Path, name: str) -> None:
    (directory / name).write_text("x", encoding="ascii")


def test_two_listeners_of_one_directory_both_hear(tmp_path: Path) -> None:
    async def body() -> None:
        directories = Directories(asyncio.get_running_loop())
        first, second = Ear(), Ear()
        assert directories.watch(str(tmp_path), first.call)
        assert directories.watch(str(tmp_path), second.call)
        put(tmp_path, "a.xml")
        await first.hears("a.xml")
        await second.hears("a.xml")
        directories.close()

    asyncio.run(body())


def test_a_directory_by_another_path_is_told_by_the_path_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    async def body() -> None:
        directories = Directories(asyncio.get_running_loop())
        ears = {name: Ear() for name in ("real", "link")}
        for name, ear in ears.items():
            assert directories.watch(str(tmp_path / name), ear.call)
        put(tmp_path / "real", "a")
        for name, ear in ears.items():
            await ear.hears("a")
            assert {directory for directory, _ in ear.heard} == {str(tmp_path / name)}
        directories.close()

    asyncio.run(body())


def test_watching_again_calls_once(tmp_path: Path) -> None:
    async def body() -> None:
        directories = Directories(asyncio.get_running_loop(), mask=MADE)
        ear, last = Ear(), Ear()
        for _ in range(100):
            assert directories.watch(str(tmp_path), ear.call)
        assert directories.watch(str(tmp_path), last.call)
        assert len(directories) == 1
        put(tmp_path, "a")
        await last.hears("a")
        assert ear.heard == [(str(tmp_path), frozenset({"a"}))]
        directories.close()

    asyncio.run(body())


def test_what_is_made_moved_written_and_removed_is_heard(tmp_path: Path) -> None:
    put(tmp_path, "old")

    async def body() -> None:
        directories = Directories(asyncio.get_running_loop())
        ear = Ear()
        assert directories.watch(str(tmp_path), ear.call)
        (tmp_path / "old").unlink()
        await ear.hears("old")
        put(tmp_path, ".new")
        (tmp_path / ".new").rename(tmp_path / "moved")
        await ear.hears("moved")
        directories.close()

    asyncio.run(body())


def test_only_what_is_made_is_heard_where_no_more_is_asked_for(tmp_path: Path) -> None:
    put(tmp_path, "busy.log")

    async def body() -> None:
        directories = Directories(asyncio.get_running_loop(), mask=MADE)
        ear = Ear()
        assert directories.watch(str(tmp_path), ear.call)
        put(tmp_path, "busy.log")  # written and closed, not made
        (tmp_path / "busy.log").unlink()
        put(tmp_path, "tool.sock")
        await ear.hears("tool.sock")
        assert ear.names() == {"tool.sock"}
        directories.close()

    asyncio.run(body())


def test_a_directory_that_was_removed_and_made_again_can_be_watched_again(tmp_path: Path) -> None:
    place = tmp_path / "tool"
    place.mkdir()

    async def body() -> None:
        directories = Directories(asyncio.get_running_loop(), mask=MADE)
        ear, above = Ear(), Ear()
        assert directories.watch(str(place), ear.call)
        assert directories.watch(str(tmp_path), above.call)
        place.rmdir()
        assert not directories.watch(str(place), ear.call)
        place.mkdir()
        await above.hears("tool")
        assert len(directories) == 1  # the one that is gone is not kept
        assert directories.watch(str(place), ear.call)
        put(place, "tool.sock")
        await ear.hears("tool.sock")
        directories.close()

    asyncio.run(body())


def test_what_cannot_be_watched_is_told_by_the_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "file")

    async def body() -> None:
        directories = Directories(asyncio.get_running_loop())
        assert not directories.watch(str(tmp_path / "none"), Ear().call)
        assert not directories.watch(str(tmp_path / "file"), Ear().call)
        assert len(directories) == 0
        directories.close()

    asyncio.run(body())
    assert caplog.records == []


def test_more_than_the_kernel_keeps_is_told_as_not_known(tmp_path: Path) -> None:
    count = int(QUEUE.read_text(encoding="ascii")) + 10

    async def body() -> None:
        directories = Directories(asyncio.get_running_loop(), mask=MADE)
        ear, other = Ear(), Ear()
        (tmp_path / "other").mkdir()
        assert directories.watch(str(tmp_path), ear.call)
        assert directories.watch(str(tmp_path / "other"), other.call)
        # The loop does not run meanwhile. Two names in turn: equal events in a row are one.
        put(tmp_path, "a")
        for _ in range(count // 2):
            os.rename(tmp_path / "a", tmp_path / "b")
            os.rename(tmp_path / "b", tmp_path / "a")
        while not any(names is None for _, names in ear.heard):
            ear.came.clear()
            await asyncio.wait_for(ear.came.wait(), PATIENCE_S)
        assert any(names is None for _, names in other.heard)
        directories.close()

    asyncio.run(body())


def test_a_flood_is_read_in_pauses_and_told_once_for_each(tmp_path: Path) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        directories = Directories(loop, mask=MADE, pause_s=3600.0)
        ear = Ear()
        assert directories.watch(str(tmp_path), ear.call)
        for number in range(200):
            put(tmp_path, f"{number % 10}.sock")
            (tmp_path / f"{number % 10}.sock").unlink()
        await ear.hears("0.sock")
        assert ear.heard == [(str(tmp_path), frozenset(f"{n}.sock" for n in range(10)))]
        put(tmp_path, "late.sock")
        for _ in range(10):  # the loop turns, and is not woken by it
            await asyncio.sleep(0)
        assert "late.sock" not in ear.names()
        directories.close()

    asyncio.run(body())


def test_a_pause_ends_and_the_rest_is_heard(tmp_path: Path) -> None:
    async def body() -> None:
        directories = Directories(asyncio.get_running_loop(), mask=MADE, pause_s=0.01)
        ear = Ear()
        assert directories.watch(str(tmp_path), ear.call)
        for name in ("a", "b", "c"):
            put(tmp_path, name)
            await ear.hears(name)
        directories.close()

    asyncio.run(body())
