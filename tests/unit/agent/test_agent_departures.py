# SPDX-License-Identifier: Apache-2.0
"""A tool that goes is counted once, whether the watcher sees it first or a job does."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
from support import start_ticks

from kvmi_libvirt import state as st
from kvmi_libvirt.agent.decide import Step
from kvmi_libvirt.agent.jobs import Outcome
from kvmi_libvirt.agent.keeper import Keeper
from kvmi_libvirt.agent.metrics import Metrics
from kvmi_libvirt.agent.notify import Notifier
from kvmi_libvirt.agent.settings import Settings
from kvmi_libvirt.agent.watch import Watcher
from kvmi_libvirt.state import VmState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from kvmi_libvirt.agent.vm import Vm

    Run = Callable[[Callable[["Desk"], Awaitable[None]]], None]

UUID = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"
PATIENCE_S = 20.0


class Pool:
    """Does no work: each job ends when the test says what became of it."""

    def __init__(self) -> None:
        self.jobs: asyncio.Queue[asyncio.Future[Outcome]] = asyncio.Queue()

    async def run(self, *_: object, **__: object) -> Outcome:
        job: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        await self.jobs.put(job)
        return await job

    async def next(self) -> asyncio.Future[Outcome]:
        return await asyncio.wait_for(self.jobs.get(), PATIENCE_S)


class Nowhere:
    """Directories in which nothing happens."""

    def watch(self, *_: object) -> bool:
        return True


@dataclasses.dataclass
class Desk:
    """A keeper with one VM, hooked by a tool whose end of the channel is ``tool``."""

    keeper: Keeper
    pool: Pool
    metrics: Metrics
    vm: Vm
    tool: socket.socket

    @property
    def departures(self) -> float:
        line = next(
            line
            for line in self.metrics.render().decode().splitlines()
            if line.startswith("kvmi_libvirt_tool_departures_total ")
        )
        return float(line.rpartition(" ")[2])

    def hooked(self) -> tuple[Outcome, socket.socket]:
        """Return the outcome of a job that hooked the VM, and that tool's end."""
        ours, theirs = socket.socketpair()
        inode = os.fstat(ours.fileno()).st_ino
        outcome = Outcome(
            step=Step.HOOK.value, record=record(inode), channel=ours.detach(), stall_us=1
        )
        return outcome, theirs

    def same(self) -> dict[str, Any]:
        """Return the VM's record as a job found it that did nothing."""
        assert self.vm.record is not None
        return dataclasses.asdict(self.vm.record)

    async def until_left(self) -> None:
        """Wait until the watcher has seen the end of the channel."""
        deadline = time.monotonic() + PATIENCE_S
        while self.vm.channel is not None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0)


def record(inode: int) -> dict[str, Any]:
    """Return a record of this very process as a hooked VM."""
    return dataclasses.asdict(
        VmState(
            domain="web",
            uuid=UUID,
            pid=os.getpid(),
            start_ticks=start_ticks(os.getpid()),
            abi="v12",
            mode="optional",
            state=st.HOOKED,
            source="unix:/run/kvmi/tool.sock",
            commands=(),
            events=(),
            since="",
            error=None,
            socket_inode=inode,
        )
    )


@pytest.fixture
def at_desk(tmp_path: Path) -> Run:
    """Return what runs a test in an event loop, at a desk."""
    pytest.importorskip("prometheus_client")

    def run(body: Callable[[Desk], Awaitable[None]]) -> None:
        asyncio.run(_main(tmp_path, body))

    return run


async def _main(directory: Path, body: Callable[[Desk], Awaitable[None]]) -> None:
    watcher, pool, metrics = Watcher(asyncio.get_running_loop()), Pool(), Metrics(list)
    nowhere: Any = Nowhere()
    keeper = Keeper(
        Settings(state_dir=directory, run_dir=directory),
        domains=nowhere,
        pool=pool,  # type: ignore[arg-type]
        watcher=watcher,
        directories=nowhere,
        sockets=nowhere,
        notifier=Notifier({}),
        metrics=metrics,
    )
    try:
        vm, _ = keeper.vms.see("web", UUID, b"<domain/>")
        desk = Desk(keeper, pool, metrics, vm, socket.socket())
        desk.tool.close()
        outcome, desk.tool = desk.hooked()
        keeper.take(vm, outcome)
        await body(desk)
        desk.tool.close()
        await keeper.close()
    finally:
        watcher.close()


def test_the_watcher_sees_it_and_the_job_after_it_finds_the_same(at_desk: Run) -> None:
    async def body(desk: Desk) -> None:
        desk.tool.close()
        job = await desk.pool.next()  # it is called again at once
        assert desk.departures == 1
        assert desk.vm.record is not None
        assert desk.vm.record.state == st.WAITING
        left = desk.vm.record.socket_inode
        outcome, desk.tool = desk.hooked()
        outcome.left = left
        job.set_result(outcome)
        await until_done(desk)
        assert desk.departures == 1
        assert desk.vm.flaps == 1

    at_desk(body)


def test_a_job_that_looks_for_another_reason_sees_it_first(at_desk: Run) -> None:
    async def body(desk: Desk) -> None:
        assert desk.vm.record is not None
        left = desk.vm.record.socket_inode
        desk.keeper.look(desk.vm)
        job = await desk.pool.next()
        desk.tool.close()
        outcome, desk.tool = desk.hooked()
        outcome.left = left
        job.set_result(outcome)
        await until_done(desk)
        assert desk.departures == 1
        assert desk.vm.flaps == 1
        assert desk.vm.record.state == st.HOOKED

    at_desk(body)


def test_a_job_is_under_way_that_sees_it_too(at_desk: Run) -> None:
    async def body(desk: Desk) -> None:
        assert desk.vm.record is not None
        left = desk.vm.record.socket_inode
        desk.keeper.look(desk.vm)
        job = await desk.pool.next()
        desk.tool.close()
        await desk.until_left()
        outcome, desk.tool = desk.hooked()
        outcome.left = left
        job.set_result(outcome)
        await until_done(desk)
        assert desk.departures == 1

    at_desk(body)


def test_a_job_is_under_way_that_had_looked_before(at_desk: Run) -> None:
    async def body(desk: Desk) -> None:
        desk.keeper.look(desk.vm)
        job = await desk.pool.next()
        desk.tool.close()
        await desk.until_left()
        assert desk.departures == 0
        job.set_result(Outcome(record=desk.same()))
        again = await desk.pool.next()
        assert desk.departures == 1
        assert desk.vm.record is not None
        assert desk.vm.record.state == st.WAITING
        outcome, desk.tool = desk.hooked()
        again.set_result(outcome)
        await until_done(desk)
        assert desk.departures == 1

    at_desk(body)


def test_a_job_sees_it_first_and_cannot_hook_again(at_desk: Run) -> None:
    async def body(desk: Desk) -> None:
        assert desk.vm.record is not None
        desk.keeper.look(desk.vm)
        job = await desk.pool.next()
        failed = Outcome(
            step=Step.HOOK.value,
            record=desk.same(),
            error="no tool listens",
            retry_s=60.0,
            left=desk.vm.record.socket_inode,
        )
        job.set_result(failed)
        await until_done(desk)
        assert desk.departures == 1
        desk.tool.close()  # and the watcher hears of it now
        (await desk.pool.next()).set_result(dataclasses.replace(failed))
        await until_done(desk)
        assert desk.departures == 1

    at_desk(body)


def test_a_tool_that_was_asked_by_hand_to_leave_did_not_leave_by_itself(at_desk: Run) -> None:
    async def body(desk: Desk) -> None:
        assert desk.vm.record is not None
        desk.vm.record = dataclasses.replace(desk.vm.record, leaving=True)
        desk.tool.close()
        job = await desk.pool.next()
        assert desk.departures == 0
        assert desk.vm.flaps == 0
        off = {**desk.same(), "socket_inode": 0, "state": st.UNHOOKED, "leaving": False}
        job.set_result(Outcome(step=Step.UNHOOK.value, record=off))
        (await desk.pool.next()).set_result(Outcome(record=off))
        await until_done(desk)
        assert desk.departures == 0

    at_desk(body)


async def until_done(desk: Desk) -> None:
    """Wait until nothing is left to be done about the VM."""
    assert desk.vm.task is not None
    await asyncio.wait_for(desk.vm.task, PATIENCE_S)
