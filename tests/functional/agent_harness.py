# SPDX-License-Identifier: Apache-2.0
"""An agent, VM processes on the emulated kernel, and what is asked of them.

No libvirt: domains are found by the status files that it would keep.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from agent_rig import PROGRAM, RunningAgent, Wanted, write_policy, write_status
from fleet import Fleet, raise_fd_limit
from patient_tool import PatientTool

from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.qemu.process import open_domain
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fleet import StandIn

INFO: Final = "KVMI_VM_GET_INFO"
READ: Final = "KVMI_VM_READ_PHYSICAL"
CONTROL: Final = "KVMI_VM_CONTROL_EVENTS"
UNHOOK: Final = "KVMI_VM_EVENT_UNHOOK"
IDS: Final = {name: V12.commands_by_name[name].id for name in (INFO, READ, CONTROL)}
EPERM: Final = 1
WAIT_S: Final = 60.0
SOAK: Final = bool(os.environ.get("KVMI_SOAK"))
RUNNER: Final = Path(__file__).with_name("agent_runner.py")


@dataclass
class Site:
    """A host of a test: its VMs and its agent."""

    directory: Path
    fleet: Fleet
    agent: RunningAgent
    log_begins: int = 0

    @property
    def tool_path(self) -> Path:
        """Return where the policy's tool listens."""
        return self.directory / "tool.sock"

    @property
    def state(self) -> StateDir:
        """Return the agent's state directory."""
        return StateDir(self.agent.state_dir)

    def wanted(self, **more: Any) -> Wanted:
        """Return what the host assigns, with a tool at the usual place."""
        return Wanted(**{"tool": self.tool_path, "reconnect_s": 1, **more})

    def assign(self, *, reload: bool = True, **more: Any) -> None:
        """Assign the same introspection to every VM, and let the agent know."""
        write_policy(self.directory, self.wanted(**more).assignment())
        if reload and self.agent.process is not None:
            self.agent.reload()

    def boot(self, *names: str, metadata: str = "") -> list[StandIn]:
        """Start VMs, as libvirt would; their hooks are not called."""
        self.fleet.start(names)  # returned as they become ready
        vms = [self.fleet.vms[name] for name in names]
        for vm in vms:
            write_status(self.fleet.run_dir, vm, metadata)
        return vms

    def shut(self, *vms: StandIn) -> None:
        """End VMs."""
        for vm in vms:
            self.fleet.stop(vm)
            (self.fleet.run_dir / f"{vm.name}.xml").unlink(missing_ok=True)

    def seen(self, vm: StandIn) -> dict[str, Any]:
        """Return what the agent says of *vm*; an empty dict when it knows nothing."""
        return self.agent.status().get(vm.name, {})

    def rights(self, vm: StandIn) -> set[str]:
        """Return what the agent says is in force."""
        found = self.seen(vm)
        return {*found.get("commands", ()), *found.get("events", ())}

    def wait_rights(self, *vms: StandIn, rights: Sequence[str] = (INFO,)) -> None:
        """Wait until exactly *rights* are in force on each of *vms*."""
        wanted = set(rights)

        def are_there() -> bool:
            status = self.agent.status()
            found = [status.get(vm.name, {}) for vm in vms]
            return all(
                each.get("state") == "hooked" and {*each["commands"], *each["events"]} == wanted
                for each in found
            )

        self.agent.wait(are_there, what=f"{[vm.name for vm in vms]} have {rights}")

    def wait_state(self, vm: StandIn, state: str) -> None:
        """Wait until the agent says that *vm* is *state*."""
        self.agent.wait(lambda: self.seen(vm).get("state") == state, what=f"{vm.name} is {state}")

    def wait_rest(self) -> None:
        """Wait until the agent has nothing to do."""
        self.agent.wait(lambda: not self.agent.ping()["busy"], what="the agent is at rest")

    def wait_log(self, text: str) -> None:
        """Wait until the agent's log has *text*."""
        self.agent.wait(lambda: text in self.log(), what=f"'{text}' in the log")

    def begin(self) -> None:
        """Forget the log so far."""
        self.log_begins = self.agent.log.stat().st_size

    def log(self) -> str:
        """Return the agent's log."""
        return self.agent.log.read_bytes()[self.log_begins :].decode()

    def allows(self, tool: PatientTool, vm: StandIn) -> set[str] | None:
        """Return which of IDS the kernel allows the tool; None when it has no channel."""
        errors = tool.check(vm.uuid, commands=list(IDS.values()))
        if None in errors:
            return None
        return {name for name, error in zip(IDS, errors, strict=True) if error == 0}

    def is_alive(self, vm: StandIn) -> bool:
        """Say whether the VM's process lives."""
        with open_domain(vm.name, vm.uuid, run_dir=self.fleet.run_dir) as process:
            return process.is_alive()

    def sockets_in(self, vm: StandIn) -> list[str]:
        """Return the sockets that the VM's process has open."""
        with open_domain(vm.name, vm.uuid, run_dir=self.fleet.run_dir) as process:
            return [link for link in process.fd_links().values() if link.startswith("socket:")]


@contextlib.contextmanager
def site(
    directory: Path,
    programs: Path,
    *,
    options: Sequence[str] = (),
    settings: dict[str, str] | None = None,
    program: Sequence[str] = (str(PROGRAM), "agent"),
) -> Iterator[Site]:
    """Have a site; the agent is not started. All of it ends with the block.

    Parameters
        programs  where the VMs' program is compiled, once for many sites
        options   of the emulated kernel
        settings  of the agent
        program   instead of the agent
    """
    raise_fd_limit()
    run_dir = directory / "run"
    with Fleet(programs, run_dir=run_dir, options=options) as fleet:
        agent = RunningAgent(
            directory,
            domains=str(run_dir),
            run_dir=run_dir,
            settings=settings,
            program=program,
        )
        made = Site(directory, fleet, agent)
        try:
            yield made
        finally:
            agent.stop()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the VMs' program is compiled, once."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def own(tmp_path: Path, programs: Path) -> Iterator[Site]:
    """Have a site of the test's own, whose agent runs."""
    with site(tmp_path, programs) as made:
        made.agent.start()
        yield made


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Iterator[Site]:
    """Have a site whose agent runs for all tests that do not end it."""
    with site(tmp_path_factory.mktemp("site"), programs) as made:
        made.agent.start()
        yield made


@pytest.fixture
def host(running: Site) -> Iterator[Site]:
    """Have that site, without VMs and with a policy that assigns nothing."""
    write_policy(running.directory)
    for left in running.directory.glob("*.sock"):
        if left.name != "metrics.sock":
            left.unlink()
    running.begin()
    yield running
    running.shut(*running.fleet.vms.values())
    running.agent.wait(lambda: running.agent.ping()["vms"] == 0, what="every VM is forgotten")


@pytest.fixture
def tool(host: Site) -> Iterator[PatientTool]:
    """Have the tool that the policy names."""
    with PatientTool(host.tool_path) as made:
        yield made
