# SPDX-License-Identifier: Apache-2.0
"""What the rights are after everything that can happen to a VM: docs/agent.md, line by line.

What policies and operators do is in test_agent_policy.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import host
import pytest
from agent_rig import RunningAgent
from agent_support import (
    INFO,
    INFO_ID,
    READ,
    READ_ID,
    RIGHTS,
    UNHOOK,
    WAIT_S,
    WRITE,
    WRITE_ID,
    agent,
    agent_in,
    assert_kernel_agrees,
    has_made,
    hooked,
    hooks,
    reload,
    rights,
    seen,
    set_metadata,
    shows,
    tool,
    wait_rest,
    wait_rights,
    wait_state,
    was_hooked,
)
from live_support import BIN, allowed, cli, element, probe
from patient_tool import PatientTool
from support import stopped, wait_until
from two_hosts import SecondHost, migrate, second_host

from kvmi_libvirt import introspect, session, worker
from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.plan import NO_GRANTS, make_plan
from kvmi_libvirt.policy.host import HOST_POLICY_PATH
from kvmi_libvirt.policy.model import Mode, Policy, Rights, parse_source
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR, open_domain
from kvmi_libvirt.state import STATE_DIR, StateDir

if TYPE_CHECKING:
    from pathlib import Path

    from live_support import Host, Vm

    from kvmi_libvirt.state import VmState

__all__ = ["agent", "second_host", "tool"]

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]


# -- starting ----------------------------------------------------------------------------


@shows("a VM starts")
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
        was_hooked(vm, 1)


@shows('the same, `mode="required"`, no tool')
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


@shows('the same, `mode="optional"`, no tool')
def test_an_optional_vm_is_hooked_when_its_tool_comes(agent: RunningAgent, vm: Vm) -> None:
    vm.define(hooked(vm, mode="optional"))
    vm.must_start()
    wait_state(agent, vm, "waiting")
    assert "no tool listens" in seen(agent, vm)["error"]
    with PatientTool(vm.socket) as tool:
        wait_rights(agent, vm, RIGHTS)
        assert_kernel_agrees(tool, vm)
        assert "kvmi_libvirt_reconnects_total 0.0" in agent.metrics()


@shows("the agent starts and VMs run")
def test_vms_that_ran_before_the_agent_are_hooked_when_it_comes(
    prepared: Host, vm: Vm, tmp_path: Path
) -> None:
    assert prepared
    vm.define(hooked(vm, mode="optional"))
    vm.must_start()  # no agent, no tool
    with PatientTool(vm.socket) as tool, agent_in(tmp_path) as agent:
        wait_rights(agent, vm, RIGHTS)
        assert_kernel_agrees(tool, vm)


# -- the tool ----------------------------------------------------------------------------


@shows('the tool closes its channel, `<reconnect enabled="yes"/>`')
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
        assert "kvmi_libvirt_reconnects_total 1.0" in agent.metrics()
    was_hooked(vm, 2)
    assert vm.state() == "running"


@shows("the tool closes its channel, no `<reconnect>`")
def test_a_tool_that_goes_and_is_not_to_be_called_again_ends_the_introspection(
    agent: RunningAgent, vm: Vm
) -> None:
    vm.define(element(vm.socket, commands=(INFO,)))
    with PatientTool(vm.socket):
        vm.must_start()
    wait_state(agent, vm, "failed")
    assert "does not say to call it again" in seen(agent, vm)["error"]
    has_made(vm, "UNHOOK")
    # By hand it can be.
    with PatientTool(vm.socket):
        again = cli("hook", vm.name)
        assert again.returncode == 0, again.stderr
        wait_rights(agent, vm, {INFO})
    wait_state(agent, vm, "failed")
    # And a new policy is acted upon.
    with PatientTool(vm.socket):
        set_metadata(vm, element(vm.socket, commands=(READ,)))
        wait_rights(agent, vm, {READ})


@shows("the channel is dead though every ioctl still succeeds")
def test_a_dead_channel_is_seen_though_every_ioctl_still_succeeds(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(element(vm.socket, commands=(INFO,)))
    vm.must_start()
    assert tool.wait(at_least=1, timeout_s=WAIT_S) == 1
    # The agent would take the dead hook off; a job of its may be under way, and waits.
    with StateDir().locked(vm.uuid, deadline=time.monotonic() + WAIT_S), stopped(agent.pid):
        record = StateDir().load(vm.uuid)
        assert record is not None
        tool.drop(vm.uuid)
        wait_until(lambda: not introspect.channel_is_open(record), what="the channel ends")
        with open_domain(vm.name, vm.uuid) as process:
            fds = process.vm_fds()
            deadline = time.monotonic() + WAIT_S
            plan = make_plan(_policy_of(record, READ), V12, NO_GRANTS)
            worker.run(
                lambda: session.change(process, fds.vm, plan, deadline=deadline),
                deadline=deadline,
                keep_fds=process.owned_fds,
            )
        wait_until(
            lambda: vm.trace(vm.pid())[-1]["args"] == {"allow": 1, "id": READ_ID},
            what="the ioctl is traced",
        )
        assert vm.trace(vm.pid())[-1]["errno"] == 0
    wait_state(agent, vm, "failed")
    assert rights(agent, vm) == set()
    assert "kvmi_libvirt_tool_departures_total 1.0" in agent.metrics()


def _policy_of(record: VmState, command: str) -> Policy:
    return Policy(
        mode=Mode(record.mode),
        source=parse_source(record.source or ""),
        commands=Rights(allowed=frozenset({command})),
        events=Rights(allowed=frozenset()),
    )


@shows("the tool comes and goes within ten seconds, again and again")
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
    was_hooked(vm, 4)


def _counts(agent: RunningAgent, line: str) -> bool:
    return line in agent.metrics()


@pytest.fixture
def slow_to_forget(prepared: Host) -> Path:
    """Return an emulator whose HOOK after UNHOOK fails twice."""
    return _faulty(prepared, "kvmi-slow-to-forget", "eexist-after-unhook=2")


def _faulty(prepared: Host, name: str, fault: str) -> Path:
    path = prepared.directory / name
    path.write_text(
        f"#!/bin/sh\nexec {BIN}/kvmi-libvirt emulate --fault {fault} "
        '--trace /var/log/kvmi-libvirt/emulator-$$.jsonl -- /usr/bin/qemu-system-x86_64 "$@"\n',
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


@shows("the kernel answers `EEXIST` after an unhook")
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


@pytest.fixture
def forgets_when_run(prepared: Host) -> Path:
    """Return an emulator whose HOOK after UNHOOK fails until every vCPU has run."""
    return _faulty(prepared, "kvmi-forgets-when-run", "eexist-after-unhook")


@shows("a paused VM's tool comes back")
def test_a_paused_vm_is_hooked_again_when_it_runs(
    agent: RunningAgent, vm: Vm, tool: PatientTool, forgets_when_run: Path
) -> None:
    vm.define(hooked(vm), emulator=forgets_when_run)
    vm.must_start()
    vm.virsh("suspend", vm.name)
    tool.drop(vm.uuid)  # and it listens on
    agent.wait(
        lambda: "vCPUs have not run" in str(seen(agent, vm)["error"]), what="the reason is told"
    )
    # However often it is tried meanwhile.
    reload(agent)
    reload(agent)
    assert (seen(agent, vm)["state"], rights(agent, vm)) == ("waiting", set())
    assert "vCPUs have not run" in seen(agent, vm)["error"]
    vm.virsh("resume", vm.name)
    wait_rights(agent, vm, RIGHTS)
    assert_kernel_agrees(tool, vm)
    assert vm.state() == "running"


# -- the VM ------------------------------------------------------------------------------


@shows("reboot, reset, suspend, resume")
def test_reboot_suspend_and_resume_change_nothing(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    rom = vm.host.directory / "rebooting.rom"
    rom.write_bytes(host.rebooting_rom())
    vm.define(hooked(vm), rom=rom)
    vm.must_start()
    since = seen(agent, vm)["since"]
    boots = vm.guest_output_len()
    wait_until(lambda: vm.guest_output_len() > boots + 2, what="the guest reboots again and again")
    for verb in ("reset", "suspend", "resume"):
        result = vm.virsh(verb, vm.name)
        assert result.returncode == 0, result.stderr
    wait_rest(agent)
    assert rights(agent, vm) == RIGHTS
    assert seen(agent, vm)["since"] == since
    assert_kernel_agrees(tool, vm)
    was_hooked(vm, 1)


@shows("save and restore")
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


@shows("revert to a snapshot")
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
    old = vm.pid()
    reverted = vm.virsh("snapshot-revert", vm.name, "before", "--force", "--paused")
    assert reverted.returncode == 0, reverted.stderr
    assert vm.pid() != old
    assert rights(agent, vm) == RIGHTS  # before its vCPUs run
    assert vm.virsh("resume", vm.name).returncode == 0
    wait_rights(agent, vm, RIGHTS)
    agent.wait(lambda: tool.connected() == [vm.uuid], what="only one channel is left")
    assert_kernel_agrees(tool, vm)
    vm.virsh("snapshot-delete", vm.name, "before")


def _disk(path: Path) -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source file='{path}'/><target dev='hda' bus='ide'/></disk>"
    )


@shows("the domain is undefined while it runs")
def test_a_domain_undefined_while_it_runs_keeps_its_rights(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    assert vm.virsh("undefine", vm.name).returncode == 0
    wait_rest(agent)
    assert rights(agent, vm) == RIGHTS
    assert_kernel_agrees(tool, vm)


@shows("QEMU crashes or is killed")
def test_a_qemu_that_dies_is_forgotten_and_its_tool_told(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    os.kill(vm.pid(), signal.SIGKILL)
    agent.wait(lambda: vm.name not in agent.status(), what="the agent forgets the VM")
    assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0
    wait_until(lambda: not list(STATE_DIR.glob(f"{vm.uuid}.*")), what="no record is left")


@shows("a vCPU is added to a hooked VM")
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
    # Nor is it forgotten when the VM is looked at again, nor by the next agent.
    reload(agent)
    assert "were added after it was hooked" in str(seen(agent, vm)["error"])
    agent.kill()
    agent.start()
    agent.wait(
        lambda: "were added after it was hooked" in str(seen(agent, vm).get("error")),
        what="the next agent tells it too",
    )
    assert_kernel_agrees(tool, vm)


# -- libvirtd and the agent --------------------------------------------------------------


@shows("libvirtd restarts or is gone")
def test_a_restart_of_libvirtd_changes_nothing(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    pid = vm.pid()
    host.restart_libvirtd()
    agent.wait(lambda: agent.ask("ping")["libvirt"], what="the agent sees libvirt again")
    wait_rest(agent)
    assert (vm.pid(), vm.state()) == (pid, "running")
    assert rights(agent, vm) == RIGHTS
    assert_kernel_agrees(tool, vm)
    was_hooked(vm, 1)


@shows("libvirtd restarts or is gone")
def test_while_libvirtd_is_gone_tools_come_and_go_as_ever(agent: RunningAgent, vm: Vm) -> None:
    vm.define(hooked(vm))
    with PatientTool(vm.socket) as tool, contextlib.ExitStack() as stack:
        vm.must_start()
        stack.enter_context(host.no_libvirtd())
        vm_pid = vm.pid()
        agent.wait(lambda: not agent.ask("ping")["libvirt"], what="the agent sees that it is gone")
        assert rights(agent, vm) == RIGHTS
        tool.drop(vm.uuid)
        agent.wait(lambda: hooks(vm, vm_pid) == 2, what="its tool is called again")
        wait_rights(agent, vm, RIGHTS)
        assert_kernel_agrees(tool, vm)
    agent.wait(lambda: agent.ask("ping")["libvirt"], what="the agent sees libvirt again")
    wait_state(agent, vm, "waiting")


@shows("the agent stops, is restarted or killed")
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
        was_hooked(vm, 1)
    wait_state(agent, vm, "waiting")  # it watches a channel that it did not open
    with PatientTool(vm.socket) as tool:
        wait_rights(agent, vm, RIGHTS)
        assert_kernel_agrees(tool, vm)


@shows("the tool goes while no agent runs")
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


@shows("a policy changes while no agent runs")
def test_a_policy_that_changed_while_no_agent_ran_is_followed_by_the_next_one(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    agent.kill()
    set_metadata(vm, hooked(vm, commands=(INFO, WRITE)))
    assert_kernel_agrees(tool, vm)  # nobody was there
    agent.start()
    wait_rights(agent, vm, {INFO, WRITE, UNHOOK})
    assert tool.check(vm.uuid, commands=[INFO_ID, READ_ID, WRITE_ID]) == [0, 1, 0]
    was_hooked(vm, 1)


@shows("the same, no agent")
def test_a_start_without_the_agent_is_the_hooks_own_work(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    agent.kill()  # its socket is still there
    vm.define(hooked(vm))
    vm.must_start()
    assert_kernel_agrees(tool, vm)
    was_hooked(vm, 1)


# -- migration ---------------------------------------------------------------------------


@shows("migration away", "migration in")
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
