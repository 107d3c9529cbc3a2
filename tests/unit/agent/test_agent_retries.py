# SPDX-License-Identifier: Apache-2.0
"""When a tool is called again: timers are looked at, not waited for."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from kvmi_libvirt import state as st
from kvmi_libvirt.agent.retries import Retries
from kvmi_libvirt.agent.vm import Vm
from kvmi_libvirt.agent.vms import Vms
from kvmi_libvirt.state import VmState

UUID = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"
RECORD = VmState(
    domain="web",
    uuid=UUID,
    pid=7,
    start_ticks=1,
    abi=None,
    mode="optional",
    state=st.WAITING,
    source="unix:/run/kvmi/tool.sock",
    commands=(),
    events=(),
    since="",
    error=None,
    socket_inode=0,
)


class Directory:
    """Stands in for inotify: tells of what it is told."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[str, frozenset[str] | None], None]] = {}

    def watch(self, path: str, call: Callable[[str, frozenset[str] | None], None]) -> bool:
        self.calls[path] = call
        return True

    def made(self, *names: str) -> None:
        self.calls["/run/kvmi"]("/run/kvmi", frozenset(names))


@dataclasses.dataclass
class Desk:
    retries: Retries
    sockets: Directory
    vm: Vm
    looks: list[Vm]

    def waits_s(self) -> float:
        assert self.vm.retry is not None
        return self.vm.retry.when() - time.monotonic()


def at_desk(body: Callable[[Desk], Any]) -> None:
    async def main() -> None:
        vms, sockets, looks = Vms(), Directory(), list[Vm]()
        vm, _ = vms.see("web", UUID, b"")
        vm.record = RECORD
        retries = Retries(sockets, vms, looks.append)  # type: ignore[arg-type]
        body(Desk(retries, sockets, vm, looks))
        retries.stop(vm)

    asyncio.run(main())


def test_each_failure_doubles_the_wait_up_to_a_limit() -> None:
    def body(desk: Desk) -> None:
        waits = []
        for _ in range(8):
            desk.retries.plan(desk.vm, 10.0)
            waits.append(desk.waits_s())
        assert 0.3 < waits[0] <= 0.6
        assert all(later > 1.2 * sooner for sooner, later in pairwise(waits[:5]))
        assert all(7.5 < wait <= 12 for wait in waits[-2:])
        desk.retries.begin_anew(desk.vm)
        desk.retries.plan(desk.vm, 10.0)
        assert desk.waits_s() <= 0.6
        assert desk.looks == []

    at_desk(body)


def test_a_socket_that_is_made_is_called_at_once_and_then_once_a_second() -> None:
    def body(desk: Desk) -> None:
        desk.vm.tries = 9
        desk.retries.plan(desk.vm, 3600.0)
        desk.sockets.made("other.sock")
        assert desk.waits_s() > 60
        desk.sockets.made("tool.sock")
        assert desk.waits_s() <= 0
        desk.vm.tries = 9
        desk.retries.plan(desk.vm, 3600.0)
        desk.sockets.made("tool.sock")
        assert 0.5 < desk.waits_s() <= 1.0

    at_desk(body)


def test_a_tool_that_left_is_called_at_once_and_one_that_flaps_ever_later() -> None:
    def body(desk: Desk) -> None:
        desk.retries.came(desk.vm)
        desk.retries.left(desk.vm)
        desk.retries.call_again(desk.vm)
        assert desk.looks == [desk.vm]
        waits = []
        for _ in range(4):
            desk.retries.came(desk.vm)
            desk.retries.left(desk.vm)
            desk.retries.call_again(desk.vm)
            waits.append(desk.waits_s())
        assert desk.looks == [desk.vm]
        assert waits == pytest.approx([1, 2, 4, 8], abs=0.5)
        # A socket that it makes each time does not change that.
        desk.sockets.watch("/run/kvmi", desk.retries._sockets_made)
        desk.sockets.made("tool.sock")
        assert desk.waits_s() > 7

    at_desk(body)


def test_a_tool_that_stayed_does_not_flap() -> None:
    def body(desk: Desk) -> None:
        desk.vm.came_s = asyncio.get_running_loop().time() - 11
        desk.vm.flaps = 5
        desk.retries.left(desk.vm)
        desk.retries.call_again(desk.vm)
        assert desk.looks == [desk.vm]
        assert desk.vm.retry is None

    at_desk(body)


def test_who_does_not_wait_is_not_called() -> None:
    def body(desk: Desk) -> None:
        desk.retries.plan(desk.vm, 10.0)
        desk.retries.now(desk.vm)
        assert (desk.looks, desk.vm.retry) == ([desk.vm], None)
        desk.sockets.made("tool.sock")
        assert desk.vm.retry is None

    at_desk(body)


def test_a_socket_in_the_root_directory_is_found() -> None:
    def body(desk: Desk) -> None:
        desk.vm.record = dataclasses.replace(RECORD, source="unix:/tool.sock")
        desk.vm.tries = 9
        desk.retries.plan(desk.vm, 3600.0)
        desk.sockets.calls["/"]("/", frozenset({"tool.sock"}))
        assert desk.waits_s() <= 0

    at_desk(body)
