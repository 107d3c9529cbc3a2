# SPDX-License-Identifier: Apache-2.0
"""The agent killed at every point while twenty VMs start and stop, and tools and policies too.

After each kill one that is left alone has to find everything as the policy says.
``KVMI_SOAK=1`` (make soak) kills it at each point many times, earlier and later.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import random
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from agent_harness import CONTROL, IDS, INFO, RUNNER, SOAK, UNHOOK, WAIT_S, Site, programs, site
from agent_rig import domain_xml, write_policy
from emulator_harness import trace_lines
from host import HostError
from patient_tool import PatientTool
from support import wait_until

from kvmi_libvirt.agent.tracing import POINTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fleet import StandIn

__all__ = ["programs"]

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

VMS: Final = 20
COUNTS: Final = (1, 2, 3, 5, 8, 13, 21) if SOAK else (2,)
PATIENCE_S: Final = 300.0 if SOAK else WAIT_S
MARK: Final = "KVMI_TEST_SITE"
RIGHTS: Final = (INFO, CONTROL)


class Storm:
    """Everything that may happen to an agent, again and again."""

    def __init__(self, host: Site, tool: PatientTool) -> None:
        self.host = host
        self.tool = tool
        self.is_assigned = False
        self._numbers = itertools.count()
        self._random = random.Random(1)
        self._hooks: list[socket.socket] = []

    def vms(self) -> list[StandIn]:
        return list(self.host.fleet.vms.values())

    def boot(self, count: int) -> list[StandIn]:
        """Start VMs; their hooks are not called."""
        return self.host.boot(*(f"vm{next(self._numbers)}" for _ in range(count)))

    def hide_tool(self, *, is_hidden: bool) -> None:
        """Let nobody find the tool, or everybody; its channels stay."""
        path = self.host.tool_path
        hidden = path.with_suffix(".hidden")
        before, after = (path, hidden) if is_hidden else (hidden, path)
        with contextlib.suppress(FileNotFoundError):
            before.rename(after)

    def blow(self) -> None:
        """Let one thing of each kind happen."""
        self.hide_tool(is_hidden=self._random.random() < 0.3)
        (new,) = self.boot(1)
        self.hand_over(new, "started")
        self.assign(is_wanted=True)
        if len(self.vms()) > VMS:
            old = self._random.choice(self.vms())
            self.host.shut(old)
            self.hand_over(old, "stopped")
        self.tool.drop(self._random.choice(self.vms()).uuid)
        for vm in self._random.sample(self.vms(), min(3, len(self.vms()))):
            self.tool.subscribe(vm.uuid, lets_go=self._random.random() < 0.5)
        if self._random.random() < 0.5:
            self.assign(is_wanted=False)

    def assign(self, *, is_wanted: bool) -> None:
        """Assign introspection to every VM, or to none."""
        wanted = self.host.wanted(commands=RIGHTS, events=(UNHOOK,), unhook_s=1)
        write_policy(self.host.directory, *([wanted.assignment()] if is_wanted else []))
        if self.host.agent.process is not None:
            self.host.agent.reload()

    def hand_over(self, vm: StandIn, operation: str) -> None:
        """Do what the hook does, without waiting for the answer."""
        xml = domain_xml(vm).encode()
        name = vm.name.encode()
        sock = socket.socket(socket.AF_UNIX)
        self._hooks.append(sock)
        if len(self._hooks) > VMS:
            self._hooks.pop(0).close()
        with contextlib.suppress(OSError):
            sock.connect(str(self.host.agent.state_dir / "agent.sock"))
            head = f"hook 1 {len(name)} {operation} {len(xml)}\n".encode()
            sock.sendall(head + name + xml)

    def close(self) -> None:
        for sock in self._hooks:
            sock.close()


@pytest.fixture
def host(tmp_path: Path, programs: Path) -> Iterator[Site]:
    options = ["--trace", str(tmp_path / "trace.jsonl")]
    program = (sys.executable, str(RUNNER))
    with site(tmp_path, programs, options=options, program=program) as made:
        yield made


@pytest.mark.timeout(3600 if SOAK else 300)
def test_whenever_the_agent_is_killed_the_next_makes_everything_right(host: Site) -> None:
    mark = {MARK: str(host.directory)}
    with contextlib.ExitStack() as stack:
        tool = stack.enter_context(PatientTool(host.tool_path))
        storm = Storm(host, tool)
        stack.callback(storm.close)
        storm.boot(VMS)
        for point, count in itertools.product(POINTS, COUNTS):
            _kill_once(host, storm, point, 1 if point == "started" else count)
            for vm in storm.vms():
                assert host.is_alive(vm), f"{vm.name} was harmed at {point}:{count}"
            storm.assign(is_wanted=True)
            host.agent.start(environment=mark)
            host.wait_rights(*storm.vms(), rights=(*RIGHTS, UNHOOK))
            host.wait_rest()
            _check(host, storm.vms(), tool)
            host.agent.stop()
            wait_until(lambda: not marked(host), what="no process is left", timeout_s=WAIT_S)
        host.agent.start(environment=mark)
        storm.assign(is_wanted=False)
        host.agent.wait(lambda: host.agent.ping()["hooked"] == 0, what="all are let go")
        assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0


def _kill_once(host: Site, storm: Storm, point: str, count: int) -> None:
    storm.assign(is_wanted=True)
    agent = host.agent
    with contextlib.suppress(HostError):  # killed before it answers
        agent.start(environment={MARK: str(host.directory), "KVMI_TEST_DIE": f"{point}:{count}"})
    if agent.process is not None:
        process = agent.process

        def blow() -> bool:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    storm.blow()
            return process.poll() is not None

        wait_until(blow, what=f"it dies at {point}:{count}", timeout_s=PATIENCE_S)
        assert process.returncode == -signal.SIGKILL
        agent.process = None
    storm.hide_tool(is_hidden=False)
    died = host.directory / point
    assert died.exists(), host.log()[-2000:]
    died.unlink()
    # Whoever was at work ends it, and then goes.
    wait_until(lambda: not marked(host), what=f"no process is left at {point}", timeout_s=WAIT_S)


def marked(host: Site) -> list[int]:
    """Return the processes of the site's agents, their workers included."""
    wanted = f"{MARK}={host.directory}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _check(host: Site, vms: list[StandIn], tool: PatientTool) -> None:
    uuids = sorted(vm.uuid for vm in vms)
    wait_until(lambda: sorted(tool.connected()) == uuids, what="one channel each", timeout_s=WAIT_S)
    for vm in vms:
        assert host.allows(tool, vm) == set(RIGHTS)
        assert host.sockets_in(vm) == []
    files = {path.name for path in host.agent.state_dir.iterdir()}
    assert {name for name in files if name.endswith(".json")} == {f"{uuid}.json" for uuid in uuids}
    assert not [name for name in files if name.startswith(".new")]
    live = {f"{uuid}.journal" for uuid in uuids}
    assert not files & live
    for path in host.agent.state_dir.glob("*-*.lock"):
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # At no instant was more allowed than the policy says.
    for line in trace_lines(host.directory / "trace.jsonl"):
        if line["ioctl"] == "KVM_INTROSPECTION_COMMAND" and line["args"]["allow"]:
            assert line["args"]["id"] in [IDS[name] for name in RIGHTS]
        if line["ioctl"] == "KVM_INTROSPECTION_EVENT" and line["args"]["allow"]:
            assert line["args"]["id"] == 0
