# SPDX-License-Identifier: Apache-2.0
"""VMs, tools and policies that come and go below a running agent, without libvirt."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from agent_harness import (
    CONTROL,
    INFO,
    READ,
    RUNNER,
    UNHOOK,
    WAIT_S,
    Site,
    host,
    own,
    programs,
    running,
    site,
    tool,
)
from agent_rig import PROGRAM, write_policy, write_status
from emulator_harness import trace_lines, wait_for_end
from patient_tool import PatientTool
from support import wait_until

from kvmi_libvirt import introspect
from kvmi_libvirt.cli.rights import changed, read_names
from kvmi_libvirt.qemu.process import open_domain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fleet import StandIn

__all__ = ["host", "own", "programs", "running", "tool"]

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]


def test_vms_that_come_after_the_agent_are_hooked_and_forgotten_when_they_end(
    host: Site, tool: PatientTool
) -> None:
    host.assign()
    first, second = host.boot("first", "second")
    host.wait_rights(first, second)
    assert host.allows(tool, first) == {INFO}
    host.shut(first)
    host.agent.wait(lambda: set(host.agent.status()) == {"second"}, what="it is forgotten")
    host.agent.wait(lambda: host.state.load(first.uuid) is None, what="its record is gone")
    assert 'uuid="' + first.uuid not in host.agent.metrics()
    assert f'tool_connected{{domain="second",uuid="{second.uuid}"}} 1.0' in host.agent.metrics()
    (again,) = host.boot("first")
    host.wait_rights(again, second)


def test_a_tool_that_comes_back_gets_the_rights_it_had_and_what_was_denied_stays_so(
    host: Site,
) -> None:
    host.assign(commands=(INFO, READ))
    (vm,) = host.boot("vm")
    with PatientTool(host.tool_path) as first:
        host.wait_rights(vm, rights=(INFO, READ))
        deny(host, vm, READ)
        host.wait_rights(vm)
        assert host.allows(first, vm) == {INFO}
    host.wait_state(vm, "waiting")
    assert host.rights(vm) == set()
    with PatientTool(host.tool_path) as second:
        host.wait_rights(vm)
        assert host.allows(second, vm) == {INFO}
        # A policy that changed was not what it was denied on.
        host.assign(commands=(INFO, READ), unhook_s=5)
        host.wait_rights(vm, rights=(INFO, READ))
        assert host.allows(second, vm) == {INFO, READ}


def deny(host: Site, vm: StandIn, name: str) -> None:
    """Do what ``kvmi-libvirt deny`` does."""
    with open_domain(vm.name, vm.uuid, run_dir=host.fleet.run_dir) as process:
        introspect.change_vm(
            process,
            vm.uuid,
            lambda record: changed(record, read_names([name]), allow=False),
            state=host.state,
        )


# -- policies ----------------------------------------------------------------------------


def test_an_assignment_that_is_gone_ends_politely(tmp_path: Path, programs: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with (
        site(tmp_path, programs, options=["--trace", str(trace)]) as host,
        PatientTool(host.tool_path) as tool,
    ):
        host.assign(commands=(INFO, CONTROL), events=(UNHOOK,), unhook_s=600)
        host.agent.start()
        polite, slow = host.boot("polite", "slow")
        host.wait_rights(polite, slow, rights=(INFO, CONTROL, UNHOOK))
        assert tool.subscribe(polite.uuid, lets_go=True) == 0
        assert tool.subscribe(slow.uuid, lets_go=False) == 0
        write_policy(tmp_path)
        host.agent.reload()
        host.wait_state(polite, "unhooked")
        host.agent.wait(lambda: tool.asked(slow.uuid) == 1, what="the other is asked too")
        made(trace, polite, "PREUNHOOK", "UNHOOK")
        assert tool.asked(polite.uuid) == 1
        # It has ten minutes, and keeps its rights: it may have to undo something.
        assert host.rights(slow) == {INFO, CONTROL, UNHOOK}
        assert host.allows(tool, slow) == {INFO, CONTROL}
        made(trace, slow, "PREUNHOOK")
        tool.drop(slow.uuid)
        host.wait_state(slow, "unhooked")
        made(trace, slow, "PREUNHOOK", "UNHOOK")
        assert host.is_alive(polite)
        assert host.is_alive(slow)


def test_a_tool_that_does_not_let_go_is_waited_for_no_longer_than_it_was_given(
    tmp_path: Path, programs: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    with (
        site(tmp_path, programs, options=["--trace", str(trace)]) as host,
        PatientTool(host.tool_path) as tool,
    ):
        host.assign(commands=(INFO, CONTROL), events=(UNHOOK,), unhook_s=1)
        host.agent.start()
        (vm,) = host.boot("vm")
        host.wait_rights(vm, rights=(INFO, CONTROL, UNHOOK))
        tool.subscribe(vm.uuid, lets_go=False)
        write_policy(tmp_path)
        host.agent.reload()
        host.wait_state(vm, "unhooked")
        made(trace, vm, "PREUNHOOK", "UNHOOK")
        asked, ended = (
            line["t"]
            for line in trace_lines(trace)
            if line["ioctl"].endswith("UNHOOK") and line["tid"] == vm.pid
        )
        assert ended - asked >= 0.9
        assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0


def made(trace: Path, vm: StandIn, *last: str) -> None:
    """Wait until these are the last ioctls in the trace, which is written behind."""
    wait_until(lambda: calls(trace, vm)[-len(last) :] == list(last), what=f"the last are {last}")


def calls(trace: Path, vm: StandIn) -> list[str]:
    return [
        line["ioctl"].removeprefix("KVM_INTROSPECTION_")
        for line in trace_lines(trace)
        if line["tid"] == vm.pid and line["errno"] == 0
    ]


def test_a_channel_that_the_agent_ends_is_no_tool_that_went(own: Site) -> None:
    with PatientTool(own.tool_path) as tool:
        own.assign()
        vms = own.boot("first", "second", "third")
        for _ in range(5):
            own.wait_rights(*vms)
            write_policy(own.directory)
            own.agent.reload()
            own.agent.wait(lambda: own.agent.ping()["unhooked"] == 3, what="all are unhooked")
            own.wait_rest()
            own.assign()
        own.wait_rights(*vms)
        assert "kvmi_libvirt_tool_departures_total 0.0" in own.agent.metrics()
        assert "has closed its channel" not in own.log()
        # And one that goes while nothing is done is one.
        tool.drop(vms[0].uuid)
        own.wait_log("domain first: the tool has closed its channel")
        own.wait_rights(*vms)


def test_a_policy_that_is_back_before_the_tool_let_go_counts_at_once(
    tmp_path: Path, programs: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    with (
        site(tmp_path, programs, options=["--trace", str(trace)]) as host,
        PatientTool(host.tool_path) as tool,
    ):
        host.assign(commands=(INFO, CONTROL), events=(UNHOOK,), unhook_s=600)
        host.agent.start()
        (vm,) = host.boot("vm")
        host.wait_rights(vm, rights=(INFO, CONTROL, UNHOOK))
        tool.subscribe(vm.uuid, lets_go=False)
        write_policy(tmp_path)
        host.agent.reload()
        host.agent.wait(lambda: tool.asked(vm.uuid) == 1, what="it is asked to let go")
        # What changes nothing about that is no reason to ask again, or not to wait.
        host.agent.reload()
        host.agent.wait(lambda: host.log().count("SIGHUP") == 2, what="the policy is read again")
        host.wait_rest()
        assert tool.asked(vm.uuid) == 1
        made(trace, vm, "PREUNHOOK")
        # It has ten minutes; nobody waits for them to pass.
        host.assign(commands=(CONTROL,), events=(UNHOOK,), unhook_s=600)
        host.wait_rights(vm, rights=(CONTROL, UNHOOK))
        assert host.allows(tool, vm) == {CONTROL}
        tool.drop(vm.uuid)
        host.agent.wait(lambda: tool.connected() == [vm.uuid], what="it is called again")
        host.wait_rights(vm, rights=(CONTROL, UNHOOK))


def test_a_vm_that_ends_while_its_tool_is_asked_to_let_go_is_forgotten(
    host: Site, tool: PatientTool
) -> None:
    host.assign(commands=(INFO, CONTROL), events=(UNHOOK,), unhook_s=600)
    (vm,) = host.boot("vm")
    host.wait_rights(vm, rights=(INFO, CONTROL, UNHOOK))
    tool.subscribe(vm.uuid, lets_go=False)
    write_policy(host.directory)
    host.agent.reload()
    host.agent.wait(lambda: tool.asked(vm.uuid) == 1, what="it is asked")
    host.shut(vm)
    host.agent.wait(lambda: not host.agent.status(), what="it is forgotten")
    host.wait_rest()
    assert host.state.load(vm.uuid) is None


def test_a_host_policy_that_is_broken_is_told_and_nothing_is_lost_or_gained(
    host: Site, tool: PatientTool
) -> None:
    host.assign(commands=(INFO, READ))
    vms = host.boot("first", "second")
    host.wait_rights(*vms, rights=(INFO, READ))
    (host.directory / "host-policy.xml").write_text("<host-policy>", encoding="ascii")
    host.agent.reload()
    host.agent.wait(
        lambda: all("host-policy.xml" in str(host.seen(vm)["error"]) for vm in vms),
        what="the broken policy is told",
    )
    (late,) = host.boot("late")
    host.wait_state(late, "failed")
    for vm in vms:
        assert host.rights(vm) == {INFO, READ}
        assert host.allows(tool, vm) == {INFO, READ}
        assert f"domain {vm.name}: hooked by unix:{host.tool_path}" in host.log()
    told = [line for line in host.log().splitlines() if "host-policy.xml:1" in line]
    assert len(told) == 3  # once for each VM
    assert all(line.startswith("warning: ") for line in told)
    host.assign(commands=(INFO,))
    host.wait_rights(*vms, late)
    assert not any(host.seen(vm)["error"] for vm in vms)


@pytest.mark.parametrize("excess", ["refuse", "trim"])
def test_a_ceiling_that_is_lowered_takes_rights_away_at_once(
    host: Site, tool: PatientTool, excess: str
) -> None:
    write_policy(host.directory)
    element = host.wanted(commands=(INFO, READ)).element()
    vms = host.boot("first", "second", metadata=element)
    host.wait_rights(*vms, rights=(INFO, READ))
    write_policy(host.directory, ceiling=(INFO,), excess=excess)
    host.agent.reload()
    host.wait_rights(*vms)
    assert all(host.allows(tool, vm) == {INFO} for vm in vms)
    assert all(bool(host.seen(vm)["error"]) == (excess == "refuse") for vm in vms)


def test_a_vm_whose_policy_is_gone_before_its_tool_came_is_not_told_as_failed(host: Site) -> None:
    host.assign()
    (vm,) = host.boot("vm")
    host.wait_state(vm, "waiting")
    write_policy(host.directory)
    host.agent.reload()
    host.agent.wait(lambda: not host.agent.status(), what="nothing is told of it")
    assert host.state.load(vm.uuid) is None


def test_changed_metadata_changes_the_rights(host: Site, tool: PatientTool) -> None:
    write_policy(host.directory)
    (vm,) = host.boot("vm")
    write_status(host.fleet.run_dir, vm, host.wanted(commands=(READ,)).element())
    host.wait_rights(vm, rights=(READ,))
    write_status(host.fleet.run_dir, vm, host.wanted(commands=(INFO,)).element())
    host.wait_rights(vm)
    assert host.allows(tool, vm) == {INFO}


# -- the agent ---------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_an_agent_that_ends_leaves_everything_and_the_next_goes_on(
    tmp_path: Path, programs: Path, end: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    settings = {"sweep-seconds": "1"}
    with site(tmp_path, programs, options=["--trace", str(trace)], settings=settings) as host:
        host.assign()
        host.agent.start()
        with PatientTool(host.tool_path) as tool:
            vms = host.boot("first", "second", "third")
            host.wait_rights(*vms)
            with pidfds(host.agent.processes()[1:]) as others:
                getattr(host.agent, end)()
                for fd in others:
                    wait_for_end(fd, what="a process of the agent")
            assert [host.allows(tool, vm) for vm in vms] == [{INFO}] * 3
            host.shut(vms[2])
            host.agent.start()
            host.wait_rights(*vms[:2])
            host.agent.wait(lambda: host.state.load(vms[2].uuid) is None, what="it is forgotten")
            assert [calls(trace, vm).count("HOOK") for vm in vms] == [1, 1, 1]
            assert not host.agent.state_dir.joinpath("agent.sock").is_symlink()
        host.wait_state(vms[0], "waiting")  # it sees to channels that it did not make


@contextlib.contextmanager
def pidfds(pids: list[int]) -> Iterator[list[int]]:
    fds = [os.pidfd_open(pid) for pid in pids]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def test_channels_that_a_service_manager_kept_are_watched_at_once(
    tmp_path: Path, programs: Path
) -> None:
    address = tmp_path / "notify"
    program = (sys.executable, str(RUNNER))
    with (
        site(tmp_path, programs, settings={"sweep-seconds": "3600"}, program=program) as host,
        Manager(address) as manager,
    ):
        host.assign()
        host.agent.start(environment={"NOTIFY_SOCKET": str(address)})
        with PatientTool(host.tool_path) as tool:
            vms = host.boot("first", "second")
            host.wait_rights(*vms)
            host.agent.wait(lambda: len(manager.kept()) == 2, what="both are kept")
            host.agent.kill()
            stray = os.open("/dev/null", os.O_RDONLY)
            manager.fds["channel-00000000-0000-4000-8000-000000000000"] = stray
            passed = ",".join(f"{fd}:{name}" for name, fd in manager.kept().items())
            host.agent.start(
                environment={"NOTIFY_SOCKET": str(address), "KVMI_TEST_FDS": passed},
                pass_fds=tuple(manager.fds.values()),
            )
            manager.close_all()
            host.wait_rights(*vms)
            tool.drop(vms[0].uuid)
            # A sweep would come in an hour.
            host.agent.wait(
                lambda: "kvmi_libvirt_tool_departures_total 1.0" in host.agent.metrics(),
                what="it is seen to go",
            )
            host.wait_rights(*vms)
            # What nobody needs is not kept open, and the workers never had any of it.
            agent, parent_of_workers = host.agent.processes()[:2]
            assert "/dev/null" not in open_files(agent)
            links = open_files(parent_of_workers)
            assert len(links) == 1, links  # its line to the agent
            host.shut(*vms)
            host.agent.wait(lambda: len(manager.kept()) == 0, what="nothing is kept any more")


def open_files(pid: int) -> list[str]:
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        if int(entry.name) > 2:
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(entry.path))
    return found


class Manager:
    """The service manager's end of NOTIFY_SOCKET, with a descriptor store."""

    def __init__(self, address: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(address))
        self._sock.setblocking(False)
        self.fds: dict[str, int] = {}
        self.said: list[str] = []

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_all()
        self._sock.close()

    def close_all(self) -> None:
        self.kept()
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def kept(self) -> dict[str, int]:
        """Read what came, and return what is stored now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                text, fds, _flags, _from = socket.recv_fds(self._sock, 4096, 4)
                self._take(text.decode(), fds)
        return self.fds

    def _take(self, text: str, fds: list[int]) -> None:
        self.said.append(text)
        fields = dict(line.partition("=")[::2] for line in text.splitlines())
        if "FDSTORE" in fields:
            self.fds[fields["FDNAME"]] = fds[0]
        elif "FDSTOREREMOVE" in fields and fields["FDNAME"] in self.fds:
            os.close(self.fds.pop(fields["FDNAME"]))


def test_a_service_manager_is_told_how_the_agent_is(tmp_path: Path, programs: Path) -> None:
    address = tmp_path / "notify"
    environment = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "200000"}
    with site(tmp_path, programs) as host, Manager(address) as manager:
        write_policy(tmp_path)
        host.agent.start(environment=environment)

        def heard(*wanted: str) -> bool:
            """Say whether these came, in this order; others may lie between."""
            manager.kept()
            said = iter([text.split("\n")[0] for text in manager.said])
            return all(text in said for text in wanted)

        served = ("READY=1", "WATCHDOG=1", "WATCHDOG=1")
        host.agent.wait(lambda: heard(*served), what="it is ready, and lives")
        host.agent.reload()
        reread = (*served, "RELOADING=1", "READY=1", "WATCHDOG=1")
        host.agent.wait(lambda: heard(*reread), what="it reads its policy again")
        host.agent.stop()
        assert heard(*reread, "STOPPING=1")


def test_an_agent_whose_worker_parent_is_killed_ends_with_a_reason(own: Site) -> None:
    own.assign()
    with PatientTool(own.tool_path) as tool:
        (vm,) = own.boot("vm")
        own.wait_rights(vm)
        agent = own.agent.process
        assert agent is not None
        (parent_of_workers,) = children(agent.pid)
        os.kill(parent_of_workers, signal.SIGKILL)
        assert agent.wait(WAIT_S) == 1
        assert own.log().rstrip().endswith("start the agent anew")
        assert "Traceback" not in own.log()
        assert own.allows(tool, vm) == {INFO}
        own.agent.start()
        own.wait_rights(vm)
        assert own.allows(tool, vm) == {INFO}


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def test_of_agents_that_start_at_once_one_serves_and_the_others_say_why(own: Site) -> None:
    own.agent.kill()  # its socket lies there
    command = [str(PROGRAM), "agent", "--config", str(own.agent.config)]
    with contextlib.ExitStack() as stack:
        agents = [
            stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE)) for _ in range(3)
        ]
        own.agent.wait(
            lambda: sum(agent.poll() is None for agent in agents) == 1, what="one is left"
        )
        own.agent.wait(own.agent.answers, what="it serves")
        for agent in agents:
            if agent.poll() is None:
                assert own.agent.ask("ping")["pid"] == agent.pid
                agent.terminate()
                continue
            assert agent.stderr is not None
            lines = agent.stderr.read().decode().splitlines()
            assert len(lines) == 1
            assert "an agent runs already" in lines[0]
            assert agent.returncode == 1
