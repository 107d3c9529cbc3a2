# SPDX-License-Identifier: Apache-2.0
"""The mark of a watched start: whose it is, how long it lasts, who has claimed it."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.errors import StateError
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.startmark import StartMark

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.early"


def opened(path: Path) -> StartMark:
    mark = StartMark.open(path)
    assert mark is not None
    return mark


def test_without_a_mark_there_is_none(path: Path) -> None:
    assert StartMark.open(path) is None


def test_a_mark_lasts_until_it_is_ended(path: Path) -> None:
    StartMark.make(path)
    with opened(path) as mark, opened(path) as other:
        assert mark.is_there()
        other.end()
        assert not mark.is_there()
        mark.end()
    assert not path.exists()


def test_the_mark_of_a_later_start_is_another_one_and_survives_the_end_of_the_first(
    path: Path,
) -> None:
    StartMark.make(path)
    with opened(path) as first:
        StartMark.make(path)
        assert not first.is_there()
        first.end()
        with opened(path) as second:
            assert second.is_there()


def test_only_one_can_watch_and_others_can_wait_for_it(path: Path) -> None:
    StartMark.make(path)
    with opened(path) as other:
        with opened(path) as watcher:
            assert watcher.claim()
            assert not other.claim()
            assert not other.wait_unclaimed(time.monotonic())
            watcher.end()
            assert not other.wait_unclaimed(time.monotonic())  # ended, and not done yet
            waited = threading.Thread(
                target=other.wait_unclaimed, args=(time.monotonic() + 60,), daemon=True
            )
            waited.start()
        waited.join(60)
        assert not waited.is_alive()
        assert other.claim()


def test_a_process_of_its_start_is_not_older_than_it(path: Path) -> None:
    with Process(Pid(os.getpid())) as us:
        StartMark.make(path)
        with opened(path) as mark:
            assert us.start_ticks <= mark.made_ticks()
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            try:
                with Process(Pid(pid)) as child:
                    assert mark.made_ticks() <= child.start_ticks + 1
            finally:
                os.kill(pid, 9)
                os.waitpid(pid, 0)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff"])
def test_a_damaged_mark_is_still_a_mark(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with opened(path) as mark:
        assert mark.is_there()
        assert mark.made_ticks() == 0


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "other"
    target.write_text("1", encoding="ascii")
    path.symlink_to(target)
    with pytest.raises(StateError):
        StartMark.open(path)
    StartMark.make(path)
    assert not path.is_symlink()
    assert target.read_text(encoding="ascii") == "1"


def test_where_it_cannot_be_made_that_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot write"):
        StartMark.make(tmp_path / "nowhere" / "vm.early")
