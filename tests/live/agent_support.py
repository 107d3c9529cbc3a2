# SPDX-License-Identifier: Apache-2.0
"""An agent below a real libvirtd, and what the tests of docs/agent.md's table ask of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import pytest
from agent_rig import RunningAgent
from live_support import element
from patient_tool import PatientTool
from support import wait_until

from kvmi_libvirt.policy.host import HOST_POLICY_PATH
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR
from kvmi_libvirt.state import STATE_DIR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from live_support import Host, Vm

_Test = TypeVar("_Test")

INFO: Final = "KVMI_VM_GET_INFO"
READ: Final = "KVMI_VM_READ_PHYSICAL"
WRITE: Final = "KVMI_VM_WRITE_PHYSICAL"
CONTROL: Final = "KVMI_VM_CONTROL_EVENTS"
UNHOOK: Final = "KVMI_VM_EVENT_UNHOOK"
INFO_ID: Final = 8
READ_ID: Final = 12
WRITE_ID: Final = 14
RIGHTS: Final = {INFO, READ, UNHOOK}
WAIT_S: Final = 60.0
PLAIN_URI: Final = "urn:kvmi-libvirt:introspection:1.0"


def shows(*_lines: str) -> Callable[[_Test], _Test]:
    """Say which lines of the table in docs/agent.md a test shows, by their first column.

    tests/unit/test_agent_docs.py holds the table and the tests to each other.
    """
    return lambda test: test


def hooked(vm: Vm, *, mode: str = "required", commands: tuple[str, ...] = (INFO, READ)) -> str:
    """Return an element whose tool is called again when it goes."""
    text = element(vm.socket, mode=mode, commands=commands, events=(UNHOOK,))
    source = f"<k:source type='unix' path='{vm.socket}'"
    return text.replace(
        f"{source}/>", f"{source}><k:reconnect enabled='yes' timeout='2'/></k:source>"
    )


@pytest.fixture
def agent(prepared: Host, tmp_path: Path) -> Iterator[RunningAgent]:
    """Have an agent where the hook looks for it; the VMs of the test end before it."""
    assert prepared
    with agent_in(tmp_path) as running:
        running.wait(lambda: running.ask("ping")["libvirt"], what="the agent sees libvirt")
        yield running


def agent_in(directory: Path) -> RunningAgent:
    """Return an agent where the hook looks for it, not started."""
    return RunningAgent(
        directory,
        domains="qemu:///system",
        run_dir=LIBVIRT_QEMU_RUN_DIR,
        state_dir=STATE_DIR,
        host_policy=HOST_POLICY_PATH,
        settings={"sweep-seconds": "1"},
    )


@pytest.fixture
def tool(vm: Vm) -> Iterator[PatientTool]:
    """Have the tool of the VM's policy."""
    with PatientTool(vm.socket) as made:
        yield made


def seen(agent: RunningAgent, vm: Vm) -> dict[str, Any]:
    """Return what the agent says of *vm*; an empty dict when it knows nothing."""
    return agent.status().get(vm.name, {})


def rights(agent: RunningAgent, vm: Vm) -> set[str]:
    """Return what the agent says is in force."""
    found = seen(agent, vm)
    return {*found.get("commands", ()), *found.get("events", ())}


def wait_state(agent: RunningAgent, vm: Vm, state: str) -> None:
    """Wait until the agent says that *vm* is *state*."""
    agent.wait(
        lambda: seen(agent, vm).get("state") == state,
        what=f"{vm.name} is {state}",
        timeout_s=WAIT_S,
    )


def wait_rights(agent: RunningAgent, vm: Vm, wanted: set[str]) -> None:
    """Wait until the agent says that exactly *wanted* is in force."""
    agent.wait(
        lambda: rights(agent, vm) == wanted, what=f"{vm.name} has {wanted}", timeout_s=WAIT_S
    )


def wait_rest(agent: RunningAgent) -> None:
    """Wait until the agent has nothing to do."""
    agent.wait(lambda: not agent.ask("ping")["busy"], what="the agent is at rest")


def reload(agent: RunningAgent) -> None:
    """Let it read the host's policy again, and wait until it has looked at every VM."""
    before = agent.log.read_text(encoding="utf-8").count("SIGHUP")
    agent.reload()
    agent.wait(
        lambda: agent.log.read_text(encoding="utf-8").count("SIGHUP") > before,
        what="the agent hears it",
    )
    wait_rest(agent)


def ioctls(vm: Vm, pid: int) -> list[str]:
    """Return the introspection ioctls of the emulator's trace, without their prefix."""
    return [line["ioctl"].removeprefix("KVM_INTROSPECTION_") for line in vm.trace(pid)]


def hooks(vm: Vm, pid: int) -> int:
    """Return how often the QEMU with *pid* was hooked."""
    return sum(
        line["ioctl"] == "KVM_INTROSPECTION_HOOK" and line["errno"] == 0 for line in vm.trace(pid)
    )


def has_made(vm: Vm, *last: str) -> None:
    """Wait until these are the last ioctls in the trace, which is written behind."""
    wait_until(
        lambda: ioctls(vm, vm.pid())[-len(last) :] == list(last), what=f"the last are {last}"
    )


def was_hooked(vm: Vm, times: int) -> None:
    """Wait until the trace tells that the VM was hooked so often."""
    wait_until(lambda: hooks(vm, vm.pid()) == times, what=f"it was hooked {times} times")


def assert_kernel_agrees(tool: PatientTool, vm: Vm, *, write: bool = False) -> None:
    """The kernel side tells the tool what the agent tells us."""
    found = tool.check(vm.uuid, commands=[INFO_ID, READ_ID, WRITE_ID])
    assert found == [0, 0, 0 if write else 1]


def set_metadata(vm: Vm, text: str | None) -> None:
    """Do what ``virsh metadata --live`` does; None removes it."""
    command = ["metadata", vm.name, "--uri", PLAIN_URI, "--live"]
    if text is None:
        command.append("--remove")
    else:
        plain = text.replace("k:", "").replace(f" xmlns:k='{PLAIN_URI}'", "")
        command += ["--key", "kvmi", "--set", plain]
    result = vm.virsh(*command)
    assert result.returncode == 0, result.stderr


def assigning(vm: Vm, commands: tuple[str, ...], *, ceiling: tuple[str, ...] | None = None) -> str:
    """Return a host policy that assigns *commands* to *vm*."""

    def allow(names: tuple[str, ...]) -> str:
        return "<commands>" + "".join(f"<allow name='{name}'/>" for name in names) + "</commands>"

    top = "" if ceiling is None else f"<ceiling excess='trim'>{allow(ceiling)}</ceiling>"
    return (
        "<host-policy xmlns='urn:kvmi-libvirt:introspection:1.0'>"
        f"<sockets><unix path='/run/kvmi/**'/></sockets>{top}"
        f"<assign><match name='{vm.name}'/><source type='unix' path='{vm.socket}'/>"
        f"{allow(commands)}</assign></host-policy>"
    )
