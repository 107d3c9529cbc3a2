# SPDX-License-Identifier: Apache-2.0
"""How the agent learns of Proxmox VE's machines: pidfiles, records, and processes that fit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.agent.inotify import Directories
from kvmi_libvirt.agent.machines import Machines
from kvmi_libvirt.machines import known_here, parse_vmid, running, vmid_of
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.proxmoxfiles import Places
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LONG_S = 60.0
UUID = str(uuid.uuid4())


class Heard:
    """A listener that notes what it is told."""

    def __init__(self) -> None:
        self.uuids: list[str] = []
        self.everything = 0
        self._told = asyncio.Event()

    def changed(self, uuid: str) -> None:
        self.uuids.append(uuid)
        self._told.set()

    def resumed(self, uuid: str) -> None:
        raise AssertionError(uuid)

    def stopped(self, uuid: str) -> None:
        raise AssertionError(uuid)

    def all_changed(self) -> None:
        self.everything += 1
        self._told.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not condition():
                self._told.clear()
                await self._told.wait()

        await asyncio.wait_for(wait(), LONG_S)


@contextlib.contextmanager
def machine(vmid: int, of: str = UUID) -> Iterator[int]:
    """Run a process with the arguments of a machine's QEMU that matter."""
    arguments = ("-id", str(vmid), "-smbios", f"type=1,uuid={of}")
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate()


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("run", "configs", "state"):
        (tmp_path / name).mkdir()
    return Places(run=tmp_path / "run", configs=tmp_path / "configs", nodes=tmp_path / "nodes")


def listening(places: Places, script: Callable[[Machines, Heard], object]) -> None:
    """Run *script*, a coroutine function, with machines that are listened to."""

    async def main() -> None:
        directories = Directories(asyncio.get_running_loop())
        state = StateDir(places.run.parent / "state")
        machines, heard = Machines(places, state, directories), Heard()
        try:
            machines.start(heard)
            await heard.until(lambda: heard.everything == 1)
            await script(machines, heard)  # type: ignore[misc]
        finally:
            await machines.close()
            directories.close()

    asyncio.run(main())


def test_a_pidfile_that_is_filled_after_it_was_made_is_read_again(places: Places) -> None:
    async def script(machines: Machines, heard: Heard) -> None:
        with machine(100) as pid:
            # As QEMU does, which keeps it open while it runs.
            file = (places.run / "100.pid").open("w")
            with file:
                await asyncio.sleep(0)
                file.write(f"{pid}\n")
                file.flush()
                await heard.until(lambda: heard.uuids == [UUID])
                found = await machines.get(UUID)
                assert found is not None
                assert (found.name, found.uuid) == ("100", UUID)
        (places.run / "100.pid").unlink()
        await heard.until(lambda: heard.uuids.count(UUID) > 1)
        assert await machines.get(UUID) is None

    listening(places, script)


def test_a_record_tells_of_a_machine_whose_pidfile_was_missed(places: Places) -> None:
    async def script(_machines: Machines, heard: Heard) -> None:
        with machine(100) as pid:
            hidden = places.run / "hidden"
            hidden.write_text(f"{pid}\n")
            os.link(hidden, places.run / "100.pid")
            heard.uuids.clear()
            (places.run.parent / "state" / f"{UUID}.json").write_text("{}")
            await heard.until(lambda: UUID in heard.uuids)
            (places.run.parent / "state" / "another.json").write_text("{}")

    listening(places, script)


def test_of_two_with_one_uuid_the_recorded_one_is_meant(places: Places) -> None:
    async def script(machines: Machines, _heard: Heard) -> None:
        with machine(100) as first, machine(101) as second:
            (places.run / "100.pid").write_text(f"{first}\n")
            (places.run / "101.pid").write_text(f"{second}\n")
            assert [found.name for found in await machines.running()] == ["100"]
            record = {"domain": "101", "uuid": UUID, "pid": second, "start_ticks": 1}
            record |= {"abi": None, "mode": "optional", "state": "failed", "source": None}
            record |= {"commands": [], "events": [], "since": "", "error": None, "socket_inode": 0}
            state = places.run.parent / "state" / f"{UUID}.json"
            state.write_text(json.dumps(record))
            assert [found.name for found in await machines.running()] == ["101"]
        (places.run / "101.pid").unlink()

    listening(places, script)


def test_only_a_process_that_is_the_machines_counts(places: Places) -> None:
    with machine(101) as pid:
        (places.run / "100.pid").write_text(f"{pid}\n")
        assert running(places) == {}
        (places.run / "101.pid").write_text(f"{pid}\n")
        (places.run / "102.pid").write_text("0\n")
        assert list(running(places)) == [101]


def test_a_number_is_a_machines_where_the_node_has_it(places: Places) -> None:
    assert known_here("100", places) is None
    (places.configs / "100.conf").touch()
    assert known_here("100", places) == 100
    (places.run / "101.pid").touch()
    assert known_here("101", places) == 101
    for text in ("", "web", "0100", "²", "1" * 10, "-1", "100.conf"):
        assert parse_vmid(text) is None
        assert known_here(text, places) is None
    names = ("100.pid", "100.qmp", "x.pid", ".pid")
    assert [vmid_of(name) for name in names] == [100, None, None, None]


def test_the_age_of_a_process_is_told() -> None:
    with machine(100) as pid, Process(Pid(pid)) as process:
        assert 0 <= process.age_s(time.clock_gettime(time.CLOCK_BOOTTIME)) < LONG_S
        with Process(Pid(1)) as oldest:
            assert oldest.age_s(0.0) >= process.age_s(0.0)
