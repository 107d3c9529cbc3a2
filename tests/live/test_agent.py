# SPDX-License-Identifier: Apache-2.0
"""What the rights are after everything that can happen to a VM: docs/agent.md, line by line."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import host
import pytest
from agent_rig import RunningAgent
from live_support import BIN, allowed, cli, element, probe
from patient_tool import PatientTool
from support import wait_until
from two_hosts import SecondHost, migrate, second_host

from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED
from kvmi_libvirt.policy.host import HOST_POLICY_PATH
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR
from kvmi_libvirt.state import STATE_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from live_support import Host, Vm

__all__ = ["second_host"]

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

INFO, READ, WRITE = "KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL"
INFO_ID, READ_ID, WRITE_ID = 8, 12, 14
UNHOOK = "KVMI_VM_EVENT_UNHOOK"
RIGHTS = {INFO, READ, UNHOOK}
WAIT_S = 60.0


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
    with _agent(tmp_path) as running:
        running.wait(lambda: running.ask("ping")["libvirt"], what="the agent sees libvirt")
        yield running


def _agent(directory: Path) -> RunningAgent:
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
    with PatientTool(vm.socket) as made:
        yield made


def seen(agent: RunningAgent, vm: Vm) -> dict[str, Any]:
    """Return what the agent says of *vm*; an empty dict when it knows nothing."""
    return agent.status().get(vm.name, {})


def rights(agent: RunningAgent, vm: Vm) -> set[str]:
    found = seen(agent, vm)
    return {*found.get("commands", ()), *found.get("events", ())}


def wait_state(agent: RunningAgent, vm: Vm, state: str) -> None:
    agent.wait(
        lambda: seen(agent, vm).get("state") == state,
        what=f"{vm.name} is {state}",
        timeout_s=WAIT_S,
    )


def wait_rights(agent: RunningAgent, vm: Vm, wanted: set[str]) -> None:
    agent.wait(
        lambda: rights(agent, vm) == wanted, what=f"{vm.name} has {wanted}", timeout_s=WAIT_S
    )


def ioctls(vm: Vm, pid: int) -> list[str]:
    return [line["ioctl"].removeprefix("KVM_INTROSPECTION_") for line in vm.trace(pid)]


def hooks(vm: Vm, pid: int) -> int:
    return sum(
        line["ioctl"] == "KVM_INTROSPECTION_HOOK" and line["errno"] == 0 for line in vm.trace(pid)
    )


def assert_kernel_agrees(tool: PatientTool, vm: Vm, *, write: bool = False) -> None:
    """The kernel side tells the tool what the agent tells us."""
    found = tool.check(vm.uuid, commands=[INFO_ID, READ_ID, WRITE_ID])
    assert found == [0, 0, 0 if write else 1]


# -- starting ----------------------------------------------------------------------------


def test_a_start_is_handed_over_and_the_rights_are_those_of_the_policy(
    agent: RunningAgent, vm: Vm
) -> None:
    vm.define(hooked(vm))
    with probe(vm.socket) as tool:
        vm.must_start()
        answer = tool.result()
        assert allowed(answer["commands"]) == {INFO, READ, *ALWAYS_ALLOWED}
        assert rights(agent, vm) == RIGHTS
        assert 'hook_operation_seconds_count{operation="started"} 1.0' in agent.metrics()
        assert hooks(vm, vm.pid()) == 1


def test_a_required_vm_without_its_tool_does_not_start_and_the_agent_forgets_it(
    agent: RunningAgent, vm: Vm
) -> None:
    vm.define(hooked(vm))
    result = vm.start()
    assert result.returncode == 1
    assert "no tool listens on" in result.stderr
    assert "requires introspection" in result.stderr
    assert vm.state() == "shut off"
    agent.wait(lambda: vm.name not in agent.status(), what="the agent forgets the VM")
    assert "kvmi_libvirt_vetoes_total 1.0" in agent.metrics()


def test_an_optional_vm_is_hooked_when_its_tool_comes(agent: RunningAgent, vm: Vm) -> None:
    vm.define(hooked(vm, mode="optional"))
    vm.must_start()
    wait_state(agent, vm, "waiting")
    assert "no tool listens" in seen(agent, vm)["error"]
    with PatientTool(vm.socket) as tool:
        wait_rights(agent, vm, RIGHTS)
        assert_kernel_agrees(tool, vm)


def test_vms_that_ran_before_the_agent_are_hooked_when_it_comes(
    prepared: Host, vm: Vm, tmp_path: Path
) -> None:
    assert prepared
    vm.define(hooked(vm, mode="optional"))
    vm.must_start()  # no agent, no tool
    with PatientTool(vm.socket) as tool, _agent(tmp_path) as agent:
        wait_rights(agent, vm, RIGHTS)
        assert_kernel_agrees(tool, vm)


# -- the tool ----------------------------------------------------------------------------


def test_a_tool_that_comes_back_gets_the_same_rights(agent: RunningAgent, vm: Vm) -> None:
    vm.define(hooked(vm, commands=(INFO, READ, WRITE)))
    with PatientTool(vm.socket):
        vm.must_start()
        denied = cli("deny", vm.name, WRITE)
        assert denied.returncode == 0, denied.stderr
    wait_state(agent, vm, "waiting")
    assert rights(agent, vm) == set()
    with PatientTool(vm.socket) as tool:
        wait_rights(agent, vm, RIGHTS)  # what was denied by hand stays denied
        assert_kernel_agrees(tool, vm)
    assert hooks(vm, vm.pid()) == 2
    assert vm.state() == "running"


def test_a_tool_that_goes_and_is_not_to_be_called_again_ends_the_introspection(
    agent: RunningAgent, vm: Vm
) -> None:
    vm.define(element(vm.socket, commands=(INFO,)))
    with PatientTool(vm.socket):
        vm.must_start()
    wait_state(agent, vm, "failed")
    assert "does not say to call it again" in seen(agent, vm)["error"]
    assert ioctls(vm, vm.pid())[-1] == "UNHOOK"
    # By hand it can be.
    with PatientTool(vm.socket):
        again = cli("hook", vm.name)
        assert again.returncode == 0, again.stderr
        wait_rights(agent, vm, {INFO})


def test_a_dead_channel_is_seen_though_every_ioctl_still_succeeds(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(element(vm.socket, commands=(INFO,)))
    vm.must_start()
    assert tool.wait(at_least=1, timeout_s=WAIT_S) == 1
    tool.drop(vm.uuid)
    wait_state(agent, vm, "failed")
    assert "kvmi_libvirt_tool_departures_total 1.0" in agent.metrics()


def test_a_tool_that_comes_and_goes_is_called_ever_less_often(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    for number in range(3):
        agent.wait(lambda: tool.connected() == [vm.uuid], what="the tool has the VM")
        tool.drop(vm.uuid)
        wanted = f"kvmi_libvirt_tool_departures_total {number + 1}.0"
        wait_until(functools.partial(_counts, agent, wanted), what="it is seen to go")
    wait_rights(agent, vm, RIGHTS)
    assert hooks(vm, vm.pid()) == 4


def _counts(agent: RunningAgent, line: str) -> bool:
    return line in agent.metrics()


@pytest.fixture
def slow_to_forget(prepared: Host) -> Path:
    """Return an emulator whose HOOK after UNHOOK fails twice, as while no vCPU has run."""
    path = prepared.directory / "kvmi-slow-to-forget"
    path.write_text(
        f"#!/bin/sh\nexec {BIN}/kvmi-libvirt emulate --fault eexist-after-unhook=2 "
        '--trace /var/log/kvmi-libvirt/emulator-$$.jsonl -- /usr/bin/qemu-system-x86_64 "$@"\n',
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


def test_a_kernel_that_cannot_hook_again_yet_is_asked_again(
    agent: RunningAgent, vm: Vm, tool: PatientTool, slow_to_forget: Path
) -> None:
    vm.define(hooked(vm), emulator=slow_to_forget)
    vm.must_start()
    vm.virsh("suspend", vm.name)
    tool.drop(vm.uuid)
    wait_state(agent, vm, "waiting")
    agent.wait(
        lambda: "vCPUs have not run" in str(seen(agent, vm)["error"]), what="the reason is told"
    )
    vm.virsh("resume", vm.name)
    wait_rights(agent, vm, RIGHTS)
    assert_kernel_agrees(tool, vm)


# -- the VM ------------------------------------------------------------------------------


def test_reboot_suspend_and_resume_change_nothing(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    pid = vm.pid()
    since = seen(agent, vm)["since"]
    for verb in ("reset", "suspend", "resume"):
        result = vm.virsh(verb, vm.name)
        assert result.returncode == 0, result.stderr
    agent.wait(lambda: not agent.ask("ping")["busy"], what="the agent is at rest")
    assert rights(agent, vm) == RIGHTS
    assert seen(agent, vm)["since"] == since
    assert_kernel_agrees(tool, vm)
    assert hooks(vm, pid) == 1


def test_after_save_and_restore_the_rights_are_in_force_before_a_vcpu_runs(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    old = vm.pid()
    saved = vm.virsh("managedsave", vm.name)
    assert saved.returncode == 0, saved.stderr
    agent.wait(lambda: vm.name not in agent.status(), what="the agent forgets the VM")
    started = vm.start("--paused")
    assert started.returncode == 0, started.stderr
    assert vm.pid() != old
    assert rights(agent, vm) == RIGHTS
    assert vm.virsh("resume", vm.name).returncode == 0
    assert_kernel_agrees(tool, vm)


def test_after_a_snapshot_is_reverted_to_the_rights_are_those_of_the_policy(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    disk = vm.host.directory / f"{vm.name}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True)
    disk.chmod(0o666)
    vm.define(hooked(vm), devices=_disk(disk))
    vm.must_start()
    made = vm.virsh("snapshot-create-as", vm.name, "before")
    assert made.returncode == 0, made.stderr
    reverted = vm.virsh("snapshot-revert", vm.name, "before", "--force")
    assert reverted.returncode == 0, reverted.stderr
    wait_rights(agent, vm, RIGHTS)
    agent.wait(lambda: tool.connected() == [vm.uuid], what="only one channel is left")
    assert_kernel_agrees(tool, vm)
    vm.virsh("snapshot-delete", vm.name, "before")


def _disk(path: Path) -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source file='{path}'/><target dev='hda' bus='ide'/></disk>"
    )


def test_a_domain_undefined_while_it_runs_keeps_its_rights(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    assert vm.virsh("undefine", vm.name).returncode == 0
    agent.wait(lambda: not agent.ask("ping")["busy"], what="the agent is at rest")
    assert rights(agent, vm) == RIGHTS
    assert_kernel_agrees(tool, vm)


def test_a_qemu_that_dies_is_forgotten_and_its_tool_told(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    os.kill(vm.pid(), signal.SIGKILL)
    agent.wait(lambda: vm.name not in agent.status(), what="the agent forgets the VM")
    assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0
    wait_until(lambda: not list(STATE_DIR.glob(f"{vm.uuid}.*")), what="no record is left")


def test_a_vcpu_added_to_a_hooked_vm_is_told(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm), max_vcpus=3)
    vm.must_start()
    added = vm.virsh("setvcpus", vm.name, "3", "--live")
    assert added.returncode == 0, added.stderr
    agent.wait(
        lambda: "were added after it was hooked" in str(seen(agent, vm)["error"]),
        what="the new vCPU is told",
    )
    found = json.loads(cli("status", "--json", vm.name).stdout)
    assert found[0]["state"] == "hooked"
    assert "were added after it was hooked" in found[0]["error"]
    assert "were added after it was hooked" in agent.log.read_text(encoding="utf-8")
    assert_kernel_agrees(tool, vm)


# -- libvirtd and the agent --------------------------------------------------------------


def test_a_restart_of_libvirtd_changes_nothing(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    pid = vm.pid()
    host.restart_libvirtd()
    agent.wait(lambda: agent.ask("ping")["libvirt"], what="the agent sees libvirt again")
    agent.wait(lambda: not agent.ask("ping")["busy"], what="the agent is at rest")
    assert (vm.pid(), vm.state()) == (pid, "running")
    assert rights(agent, vm) == RIGHTS
    assert_kernel_agrees(tool, vm)
    assert hooks(vm, pid) == 1


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_without_the_agent_nothing_changes_and_the_next_one_goes_on(
    agent: RunningAgent, vm: Vm, end: str
) -> None:
    vm.define(hooked(vm))
    with PatientTool(vm.socket) as tool:
        vm.must_start()
        getattr(agent, end)()
        assert_kernel_agrees(tool, vm)
        agent.start()
        wait_rights(agent, vm, RIGHTS)
        assert hooks(vm, vm.pid()) == 1
    wait_state(agent, vm, "waiting")  # it watches a channel that it did not open
    with PatientTool(vm.socket) as tool:
        wait_rights(agent, vm, RIGHTS)
        assert_kernel_agrees(tool, vm)


def test_a_tool_that_left_while_no_agent_ran_is_called_by_the_next_one(
    agent: RunningAgent, vm: Vm
) -> None:
    vm.define(hooked(vm))
    with PatientTool(vm.socket):
        vm.must_start()
        agent.kill()
    with PatientTool(vm.socket) as tool:
        agent.start()
        wait_rights(agent, vm, RIGHTS)
        assert_kernel_agrees(tool, vm)


def test_a_start_without_the_agent_is_the_hooks_own_work(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    agent.kill()  # its socket is still there
    vm.define(hooked(vm))
    vm.must_start()
    assert_kernel_agrees(tool, vm)
    assert hooks(vm, vm.pid()) == 1


# -- the policy --------------------------------------------------------------------------


def test_metadata_changed_live_changes_the_rights_and_removed_ends_them(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    set_metadata(vm, hooked(vm, commands=(INFO, WRITE)))
    wait_rights(agent, vm, {INFO, WRITE, UNHOOK})
    assert tool.check(vm.uuid, commands=[INFO_ID, READ_ID, WRITE_ID]) == [0, 1, 0]

    set_metadata(vm, None)
    wait_state(agent, vm, "unhooked")
    assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0
    assert ioctls(vm, vm.pid())[-2:] == ["PREUNHOOK", "UNHOOK"]

    set_metadata(vm, hooked(vm))
    wait_rights(agent, vm, RIGHTS)


def test_metadata_that_names_another_tool_moves_the_vm_to_it(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    other = vm.socket.with_name(f"{vm.name}-2.sock")
    with PatientTool(other) as second:
        set_metadata(vm, hooked(vm).replace(str(vm.socket), str(other)))
        assert second.wait(at_least=1, timeout_s=WAIT_S) == 1
        assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0
        wait_rights(agent, vm, RIGHTS)


def test_metadata_that_is_wrong_is_told_and_changes_nothing(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    set_metadata(vm, hooked(vm, commands=(INFO, "KVMI_VM_NO_SUCH")))
    agent.wait(
        lambda: "KVMI_VM_NO_SUCH" in str(seen(agent, vm)["error"]), what="the mistake is told"
    )
    assert rights(agent, vm) == RIGHTS
    assert_kernel_agrees(tool, vm)


def set_metadata(vm: Vm, text: str | None) -> None:
    uri = "urn:kvmi-libvirt:introspection:1.0"
    command = ["metadata", vm.name, "--uri", uri, "--live"]
    if text is None:
        command.append("--remove")
    else:
        plain = text.replace("k:", "").replace(f" xmlns:k='{uri}'", "")
        command += ["--key", "kvmi", "--set", plain]
    result = vm.virsh(*command)
    assert result.returncode == 0, result.stderr


def test_the_hosts_policy_read_anew_gives_lowers_and_takes(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define("")
    vm.must_start()
    with contextlib.ExitStack() as stack:
        stack.enter_context(host.host_policy(assigning(vm, (INFO, READ))))
        agent.reload()
        wait_rights(agent, vm, {INFO, READ})
        assert_kernel_agrees(tool, vm)
        HOST_POLICY_PATH.write_text(assigning(vm, (INFO, READ), ceiling=(INFO,)), encoding="utf-8")
        agent.reload()
        wait_rights(agent, vm, {INFO})
        assert tool.check(vm.uuid, commands=[INFO_ID, READ_ID]) == [0, 1]
        HOST_POLICY_PATH.write_text("<broken", encoding="utf-8")
        agent.reload()
        agent.wait(lambda: bool(seen(agent, vm)["error"]), what="the broken policy is told")
        assert rights(agent, vm) == {INFO}
    agent.reload()  # and now there is none
    wait_state(agent, vm, "unhooked")
    assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0


def assigning(vm: Vm, commands: tuple[str, ...], *, ceiling: tuple[str, ...] | None = None) -> str:
    def allow(names: tuple[str, ...]) -> str:
        return "<commands>" + "".join(f"<allow name='{name}'/>" for name in names) + "</commands>"

    top = "" if ceiling is None else f"<ceiling excess='trim'>{allow(ceiling)}</ceiling>"
    return (
        "<host-policy xmlns='urn:kvmi-libvirt:introspection:1.0'>"
        f"<sockets><unix path='/run/kvmi/**'/></sockets>{top}"
        f"<assign><match name='{vm.name}'/><source type='unix' path='{vm.socket}'/>"
        f"{allow(commands)}</assign></host-policy>"
    )


# -- migration ---------------------------------------------------------------------------


def test_a_migrated_vm_is_forgotten_here_and_hooked_by_the_agent_there(
    agent: RunningAgent, vm: Vm, tool: PatientTool, second_host: SecondHost, tmp_path: Path
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    there = tmp_path / "there"
    there.mkdir()
    second = RunningAgent(
        there,
        domains="qemu:///system",
        run_dir=LIBVIRT_QEMU_RUN_DIR,
        state_dir=STATE_DIR,
        seen_state_dir=second_host.path(STATE_DIR),
        host_policy=HOST_POLICY_PATH,
        program=(*second_host.within, str(BIN / "kvmi-libvirt"), "agent"),
    )
    with second, second_host.probe(vm.socket) as tool_there:
        moved = migrate(vm, second_host)
        assert moved.returncode == 0, moved.stderr
        assert allowed(tool_there.result()["commands"]) == {INFO, READ, *ALWAYS_ALLOWED}
        wait_rights(second, vm, RIGHTS)
        agent.wait(lambda: vm.name not in agent.status(), what="this agent forgets the VM")
        assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0
        second_host.virsh("destroy", vm.name)
        second.wait(lambda: vm.name not in second.status(), what="that agent forgets the VM")
