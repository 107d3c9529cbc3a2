# SPDX-License-Identifier: Apache-2.0
"""early="yes": hooked before the guest's first instruction, whoever starts the VM.

The guest's first instructions write a byte to its serial port. See early_support for what
proves the order. ``KVMI_EARLY_STARTS`` says how many starts to make, ``KVMI_SOAK`` a hundred.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import statistics
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import host
import pytest
from early_support import (
    Gate,
    assert_nothing_is_left,
    define,
    early_element,
    first_byte_s,
    hooker,
    last_grant_s,
    left_of,
    margins,
    ran_s,
    running_agent,
    started,
    starts_from_environment,
    status_text,
    steady_clock,
    trace,
    traced,
    tracer,
    wait_held,
    watchers,
)
from live_support import NAMESPACE, VIRSH, Vm
from patient_tool import PatientTool
from support import wait_until

from kvmi_libvirt.state import STATE_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agent_rig import RunningAgent
    from early_support import Margins
    from support import Tell

__all__ = ["hooker", "traced"]

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

STARTS = starts_from_environment(4)
LATE_STARTS = max(3, STARTS // 10)
SLOW_EVERY = 10 if STARTS >= 10 else 4
SLOW_S = 2.0
WAIT_S = 60.0


# -- how often, how early, how late ------------------------------------------------------


def span_ms(values: Sequence[float]) -> str:
    ordered = sorted(value * 1e3 for value in values)
    return f"{ordered[0]:.1f} / {statistics.median(ordered):.1f} / {ordered[-1]:.1f} ms"


@pytest.mark.usefixtures("hooker")
@pytest.mark.timeout(900)
def test_early_is_in_force_before_the_first_instruction_every_time(traced: Vm, tell: Tell) -> None:
    define(traced)
    with PatientTool(traced.socket):
        found = [started(traced) for _ in range(STARTS)]
    tell(
        f"{len(found)} early starts, least / median / most from the last grant: until the vCPUs "
        f"were let run {span_ms([each.run_s for each in found])}, until the first byte "
        f"{span_ms([each.byte_s for each in found])}",
    )
    assert [each for each in found if each.run_s <= 0] == []
    assert not (STATE_DIR / f"{traced.uuid}.early").exists()


@pytest.mark.usefixtures("hooker")
@pytest.mark.timeout(900)
def test_without_early_the_guest_runs_unwatched_first(traced: Vm, tell: Tell) -> None:
    define(traced, early=False)
    with PatientTool(traced.socket):
        found = [started(traced) for _ in range(LATE_STARTS)]
    late = [-each.byte_s for each in found]
    tell(
        f"{len(late)} starts without early: the last grant {span_ms(late)} after the first byte",
    )
    assert all(each.run_s < 0 for each in found)  # so it is this that the other test can see


class Others:
    """Another VM, and how quickly libvirt tells of it while one is started."""

    def __init__(self, other: Vm) -> None:
        self._other = other
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.asked: list[tuple[float, float]] = []
        self.failures: list[str] = []

    def __enter__(self) -> Others:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._done.is_set():
            began = time.time()
            listed = subprocess.run(
                [*VIRSH, "list", "--all"], capture_output=True, text=True, check=False, timeout=60
            )
            lines = [line.split() for line in listed.stdout.splitlines()]
            if not any(line[1:] == [self._other.name, "running"] for line in lines):
                self.failures.append(listed.stdout + listed.stderr)
            self.asked.append((began, time.time()))

    def within(self, began: float, ended: float) -> list[float]:
        """Return how long each question took that was put and answered between these."""
        return [end - begin for begin, end in self.asked if began < begin < end < ended]


@pytest.fixture
def other(vm: Vm) -> Iterator[Vm]:
    name = f"{vm.name}-other"
    found = Vm(
        host=vm.host,
        name=name,
        uuid="00000000-0000-4000-8000-" + vm.uuid.rpartition("-")[2],
        serial=vm.host.directory / f"{name}.serial",
        socket=vm.socket,
    )
    found.define(emulator="/usr/bin/qemu-system-x86_64")
    found.must_start()
    try:
        yield found
    finally:
        found.virsh("destroy", name)
        found.virsh("undefine", name)


@pytest.mark.usefixtures("hooker")
@pytest.mark.timeout(1200)
def test_a_slow_tool_among_them_makes_its_own_start_slow_and_nothing_else(
    traced: Vm, other: Vm, tell: Tell
) -> None:
    define(traced, handshake_s=30)
    found: list[Margins] = []
    held: list[tuple[float, float]] = []
    with Others(other) as others:
        time_of_rest = time.time()
        wait_until(lambda: len(others.asked) >= 10, what="virsh list at rest", timeout_s=WAIT_S)
        at_rest = others.within(time_of_rest, time.time())
        while len(found) < STARTS:
            with PatientTool(traced.socket):
                for _ in range(min(SLOW_EVERY - 1, STARTS - len(found))):
                    found.append(started(traced))
            if len(found) < STARTS:
                with PatientTool(traced.socket, answer_after_s=SLOW_S):
                    found.append(_slow_start(traced, held))
    meanwhile = [others.within(*each) for each in held]
    all_meanwhile = [seconds for each in meanwhile for seconds in each]
    tell(
        f"{len(found)} starts, {len(held)} of them held {SLOW_S:g} s for a slow tool; virsh list "
        f"at rest {span_ms(at_rest)}, while held {span_ms(all_meanwhile)}, "
        f"at the least {min(map(len, meanwhile))} times a hold",
    )
    assert [each for each in found if each.run_s <= 0] == []
    assert others.failures == []
    assert all(meanwhile)


def _slow_start(vm: Vm, held: list[tuple[float, float]]) -> Margins:
    # The tool kept us waiting so long before the grants, and QEMU's main thread with us.
    trace(vm).write_text("", encoding="utf-8")
    with steady_clock():
        vm.must_start()
        granted = last_grant_s(vm)
        found = margins(vm)
    held.append((granted - SLOW_S, granted))
    assert vm.virsh("destroy", vm.name).returncode == 0
    return found


# -- what it is for ----------------------------------------------------------------------


@pytest.mark.usefixtures("hooker")
def test_an_assignment_of_the_host_can_ask_for_it(traced: Vm) -> None:
    body = early_element(traced).partition(">")[2].rpartition("</k:introspection>")[0]
    policy = (
        f"<k:host-policy xmlns:k='{NAMESPACE}'><k:sockets><k:unix path='{traced.socket}'/>"
        f"</k:sockets><k:assign mode='required' early='yes'><k:match uuid='{traced.uuid}'/>{body}"
        "</k:assign></k:host-policy>"
    )
    define(traced, metadata="")
    with host.host_policy(policy), PatientTool(traced.socket):
        assert started(traced).run_s > 0


@pytest.mark.usefixtures("hooker")
def test_vcpus_that_libvirt_plugs_in_before_the_start_are_waited_for(traced: Vm) -> None:
    define(traced)
    xml = traced.virsh("dumpxml", "--inactive", traced.name).stdout
    vcpus = (
        "<vcpu current='3'>4</vcpu><vcpus><vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>"
        "<vcpu id='1' enabled='yes' hotpluggable='yes' order='2'/>"
        "<vcpu id='2' enabled='yes' hotpluggable='yes' order='3'/>"
        "<vcpu id='3' enabled='no' hotpluggable='yes'/></vcpus>"
    )
    before = "<vcpu placement='static'>2</vcpu>"
    assert before in xml
    traced.define_xml(xml.replace(before, vcpus))
    with PatientTool(traced.socket):
        traced.must_start()
        command = Path(f"/proc/{traced.pid()}/cmdline").read_bytes().decode().split("\0")
        assert command[command.index("-smp") + 1].startswith("1,")  # the others came later
        links = [os.readlink(fd) for fd in Path(f"/proc/{traced.pid()}/fd").iterdir()]
        assert len([link for link in links if "kvm-vcpu" in link]) == 3
        assert margins(traced).run_s > 0
        assert "of its vCPUs" not in status_text(traced)  # those that are watched are all


@pytest.mark.usefixtures("hooker")
def test_a_transient_domain_is_hooked_early_too(traced: Vm, tmp_path: Path) -> None:
    define(traced)
    file = tmp_path / "domain.xml"
    file.write_text(traced.virsh("dumpxml", traced.name).stdout, encoding="utf-8")
    assert traced.virsh("undefine", traced.name).returncode == 0
    with PatientTool(traced.socket):
        created = traced.virsh("create", str(file))
        assert created.returncode == 0, created.stderr
        assert margins(traced).run_s > 0


# -- what can go wrong -------------------------------------------------------------------


@pytest.mark.usefixtures("hooker")
@pytest.mark.parametrize("mode", ["required", "optional"])
@pytest.mark.parametrize("tool", [None, host.Tool.SILENT, host.Tool.TRICKLES])
def test_without_its_tool_an_early_start_is_refused_or_goes_on_unhooked(
    traced: Vm, mode: str, tool: host.Tool | None
) -> None:
    # One that never says all it must holds the start as long as it may, and no longer.
    why = "no tool listens" if tool is None else "the tool did not answer within 1"
    define(traced, mode=mode, handshake_s=1)
    with contextlib.nullcontext() if tool is None else host.bad_tool(traced.socket, tool):
        result = traced.start()
        if mode == "required":
            assert result.returncode == 1
            assert why in result.stderr
            assert traced.state() == "shut off"
            assert_nothing_is_left(traced)
        else:
            assert result.returncode == 0, result.stderr
            first_byte_s(traced)
            assert traced.state() == "running"
            assert why in status_text(traced)
            assert not watchers()
    assert not (STATE_DIR / f"{traced.uuid}.early").exists()


@pytest.mark.usefixtures("hooker")
def test_a_tool_that_comes_after_the_early_hook_failed_does_not_save_the_start(traced: Vm) -> None:
    # The guest does not run; the veto is for what failed, not for what it costs.
    define(traced)
    gate = _closed_before_started(traced)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, gate:
        starting = pool.submit(traced.start, "--paused")
        gate.wait_reached()
        with PatientTool(traced.socket):
            gate.open()
            result = starting.result(WAIT_S)
    assert result.returncode == 1
    assert "no tool listens" in result.stderr
    assert_nothing_is_left(traced)


class StartedGate:
    """A hook of the test before ours, in which ``started`` waits while the gate is closed."""

    def __init__(self, vm: Vm) -> None:
        self._script = vm.host.hook.with_name("10-gate")
        self._reached = vm.host.directory / f"{vm.name}.reached"
        self._open = vm.host.directory / f"{vm.name}.open"
        self._text = f"""#!/bin/sh
[ "$1 $2" = '{vm.name} started' ] || exit 0
touch '{self._reached}'
while ! [ -e '{self._open}' ]; do sleep 0.01; done
"""

    def __enter__(self) -> StartedGate:
        self._script.write_text(self._text, encoding="utf-8")
        self._script.chmod(0o755)
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._script.unlink()

    def wait_reached(self) -> None:
        wait_until(self._reached.exists, what="libvirt runs started", timeout_s=WAIT_S)

    def open(self) -> None:
        self._open.touch()


def _closed_before_started(vm: Vm) -> StartedGate:
    return StartedGate(vm)


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_a_guest_that_ran_since_nobody_watched_is_refused_or_told(traced: Vm, mode: str) -> None:
    gate = Gate(traced)
    define(traced, mode=mode, emulator=gate.emulator)
    with PatientTool(traced.socket), concurrent.futures.ThreadPoolExecutor(1) as pool:
        starting = pool.submit(traced.start)
        try:
            wait_until(lambda: bool(watchers()), what="it is watched", timeout_s=WAIT_S)
            for pid in watchers():
                os.kill(pid, signal.SIGKILL)
        finally:
            gate.open()
        result = starting.result(WAIT_S)
        if mode == "required":
            assert result.returncode == 1
            assert "the guest ran before it could be hooked" in result.stderr
            assert traced.state() == "shut off"
            assert_nothing_is_left(traced)
        else:
            assert result.returncode == 0, result.stderr
            assert last_grant_s(traced) > ran_s(trace(traced))
            assert "the guest ran before it could be hooked" in status_text(traced)
            assert "hooked" in status_text(traced)


@pytest.mark.usefixtures("hooker")
def test_a_start_that_fails_for_another_reason_leaves_nothing_behind(traced: Vm) -> None:
    traced.define(early_element(traced), options=("-device", "no-such-device"))
    with PatientTool(traced.socket) as tool:
        result = traced.start()
        assert result.returncode == 1
        assert "no-such-device" in result.stderr
        assert tool.connected() == []
    assert_nothing_is_left(traced)


@pytest.mark.parametrize("moment", ["before QEMU", "held"])
@pytest.mark.parametrize("how", ["destroy", "kill"])
def test_a_start_that_is_ended_in_the_middle_leaves_nothing_behind(
    traced: Vm, hooker: RunningAgent | None, moment: str, how: str
) -> None:
    gate = Gate(traced)
    define(traced, emulator=gate.emulator, handshake_s=30)
    with (
        PatientTool(traced.socket, answer_after_s=20.0),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        starting = pool.submit(traced.start)
        try:
            if moment == "held":
                gate.open()
                pid = wait_held(traced)
            else:
                pid = _wait_pid(traced)
            if how == "kill":
                os.kill(pid, signal.SIGKILL)
            else:
                assert traced.virsh("destroy", traced.name).returncode == 0
            assert starting.result(WAIT_S).returncode == 1
        finally:
            gate.open()
        assert traced.state() == "shut off"
        assert_nothing_is_left(traced)
        if hooker is not None:
            hooker.wait(lambda: not hooker.ping()["busy"], what="the agent is at rest")
            assert hooker.status() == {}


def _wait_pid(vm: Vm) -> int:
    found: list[int] = []

    def is_there() -> bool:
        with contextlib.suppress(OSError, ValueError):
            found.append(vm.pid())
            # The child of libvirtd has become what will be QEMU.
            return vm.uuid in Path(f"/proc/{found[-1]}/cmdline").read_text()
        return False

    wait_until(is_there, what="libvirt has made the process", timeout_s=WAIT_S)
    return found[-1]


def test_the_watcher_holds_nothing_that_libvirt_waits_for(traced: Vm) -> None:
    gate = Gate(traced)
    define(traced, emulator=gate.emulator)
    with PatientTool(traced.socket), concurrent.futures.ThreadPoolExecutor(1) as pool:
        starting = pool.submit(traced.start)
        try:
            pid = _wait_pid(traced)
            wait_until(lambda: bool(watchers()), what="it is watched", timeout_s=WAIT_S)
            (watcher,) = watchers()

            def links() -> dict[int, str]:
                found = {}
                for fd in Path(f"/proc/{watcher}/fd").iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        found[int(fd.name)] = os.readlink(fd)
                return found

            # The process it watches, once it has found it.
            wait_until(
                lambda: "anon_inode:[pidfd]" in links().values(), what="it is found", timeout_s=60
            )
            found = links()
            assert {found.pop(number) for number in (0, 1, 2)} == {"/dev/null"}
            own = {
                "anon_inode:inotify",
                "anon_inode:[pidfd]",
                str(STATE_DIR / f"{traced.uuid}.early"),
                "/var/log/kvmi-libvirt/hook.log",
            }
            rest = {link for link in found.values() if link not in own}
            # What it looks at, and syslog's socket where there is one.
            assert {
                link for link in rest if not link.startswith((f"/proc/{pid}", "socket:"))
            } == set()
            assert len([link for link in rest if link.startswith("socket:")]) <= 1
            stat = Path(f"/proc/{watcher}/stat").read_bytes().rpartition(b")")[2].split()
            assert int(stat[3]) == watcher  # a session of its own
            assert os.readlink(f"/proc/{watcher}/cwd") == "/"
        finally:
            gate.open()
        result = starting.result(WAIT_S)
        assert result.returncode == 0, result.stderr
        assert margins(traced).run_s > 0
    wait_until(lambda: not watchers(), what="nobody watches", timeout_s=WAIT_S)
    assert sorted(path.suffix for path in left_of(traced)) == [".json", ".lock"]


@pytest.mark.parametrize("moment", ["before QEMU", "held"])
def test_an_agent_that_is_killed_and_restarted_meanwhile_loses_no_start(
    traced: Vm, tmp_path: Path, moment: str
) -> None:
    gate = Gate(traced)
    define(traced, emulator=gate.emulator, handshake_s=30)
    with (
        running_agent(tmp_path) as agent,
        PatientTool(traced.socket, answer_after_s=SLOW_S),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        starting = pool.submit(traced.start)
        try:
            if moment == "held":
                gate.open()
                wait_held(traced)
            else:
                _wait_pid(traced)
            agent.kill()
            agent.start()
        finally:
            gate.open()
        result = starting.result(WAIT_S)
        assert result.returncode == 0, result.stderr
        assert margins(traced).run_s > 0  # hooked once, by whomever
        agent.wait(
            lambda: agent.status().get(traced.name, {}).get("state") == "hooked",
            what="the new agent knows it",
        )
        assert tracer(traced.pid()) == 0
