# SPDX-License-Identifier: Apache-2.0
"""What the rights are after policies change, or operators change them: docs/agent.md, by line."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import host
import pytest
from agent_support import (
    CONTROL,
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
    assert_kernel_agrees,
    assigning,
    has_made,
    hooked,
    ioctls,
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
from live_support import cli
from patient_tool import PatientTool

from kvmi_libvirt.policy.host import HOST_POLICY_PATH

if TYPE_CHECKING:
    from agent_rig import RunningAgent
    from live_support import Vm

__all__ = ["agent", "tool"]

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]


@shows("`virsh metadata --live` changes the element", "the element is removed")
def test_metadata_changed_live_changes_the_rights_and_removed_ends_them(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm, commands=(INFO, READ, CONTROL)))
    vm.must_start()
    set_metadata(vm, hooked(vm, commands=(INFO, WRITE, CONTROL)))
    wait_rights(agent, vm, {INFO, WRITE, CONTROL, UNHOOK})
    assert tool.check(vm.uuid, commands=[INFO_ID, READ_ID, WRITE_ID]) == [0, 1, 0]

    # It is asked, and waited for: a minute, since nothing else is said.
    assert tool.subscribe(vm.uuid, lets_go=False) == 0
    set_metadata(vm, None)
    agent.wait(lambda: tool.asked(vm.uuid) == 1, what="it is asked to let go")
    wait_rest(agent)
    assert tool.check(vm.uuid, commands=[INFO_ID, READ_ID, WRITE_ID]) == [0, 1, 0]
    has_made(vm, "PREUNHOOK")
    tool.drop(vm.uuid)
    wait_state(agent, vm, "unhooked")
    assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0
    has_made(vm, "PREUNHOOK", "UNHOOK")

    set_metadata(vm, hooked(vm))
    wait_rights(agent, vm, RIGHTS)


@shows("the element names another tool")
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
        assert_kernel_agrees(second, vm)
        was_hooked(vm, 2)
        assert ioctls(vm, vm.pid()).count("PREUNHOOK") == 1


@shows("the element asks for a secret the tool was not asked for")
def test_metadata_that_asks_for_a_secret_has_it_proven(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm, mode="optional"))
    vm.must_start()
    wait_rights(agent, vm, RIGHTS)
    asking = hooked(vm, mode="optional").replace(
        "<k:handshake", f"<k:secret name='{vm.name}'/><k:handshake"
    )
    with host.secret(vm.name, b"open sesame"):
        set_metadata(vm, asking)
        agent.wait(
            lambda: "does not know the secret" in str(seen(agent, vm).get("error")),
            what="the reason is told",
        )
        wait_state(agent, vm, "waiting")
        assert rights(agent, vm) == set()
        assert tool.wait(at_most=0, timeout_s=WAIT_S) == 0
        # One that needs no secret gets what it is to get.
        set_metadata(vm, hooked(vm, mode="optional"))
        wait_rights(agent, vm, RIGHTS)
        assert_kernel_agrees(tool, vm)


@shows("the element is changed to a wrong one")
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


@shows("the host's policy changes, and SIGHUP", "the host's policy is broken, and SIGHUP")
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


# -- by hand -----------------------------------------------------------------------------


@shows("`kvmi-libvirt allow`, `deny`")
def test_what_was_allowed_and_denied_by_hand_lasts_until_the_policy_changes(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm))
    vm.must_start()
    by_hand("allow", vm, WRITE)
    by_hand("deny", vm, READ)
    for _ in range(2):
        reload(agent)
        assert rights(agent, vm) == {INFO, WRITE, UNHOOK}
        assert tool.check(vm.uuid, commands=[INFO_ID, READ_ID, WRITE_ID]) == [0, 1, 0]
        agent.kill()
        agent.start()
        wait_rights(agent, vm, {INFO, WRITE, UNHOOK})
    set_metadata(vm, hooked(vm, mode="optional"))
    wait_rights(agent, vm, RIGHTS)
    assert_kernel_agrees(tool, vm)


@shows("`kvmi-libvirt unhook`")
def test_a_vm_unhooked_by_hand_stays_so_until_its_policy_changes_or_it_starts_anew(
    agent: RunningAgent, vm: Vm, tool: PatientTool
) -> None:
    vm.define(hooked(vm, commands=(INFO, READ, CONTROL)))
    vm.must_start()
    tool.subscribe(vm.uuid, lets_go=True)
    by_hand("unhook", vm)
    assert tool.asked(vm.uuid) == 1
    has_made(vm, "UNHOOK")
    made = ioctls(vm, vm.pid())
    assert made.count("HOOK") == 1
    assert set(made[made.index("PREUNHOOK") + 1 :]) == {"UNHOOK"}
    reload(agent)
    assert (seen(agent, vm)["state"], rights(agent, vm)) == ("unhooked", set())
    agent.kill()
    agent.start()
    wait_state(agent, vm, "unhooked")
    reload(agent)
    assert tool.connected() == []

    set_metadata(vm, hooked(vm))
    wait_rights(agent, vm, RIGHTS)
    for _ in range(5):  # the agent sees the channel end, and is no match for the command
        by_hand("unhook", vm, "--now")
        wait_rest(agent)
        assert (seen(agent, vm)["state"], tool.connected()) == ("unhooked", [])
        by_hand("hook", vm)
        wait_rights(agent, vm, RIGHTS)
    by_hand("unhook", vm, "--now")
    vm.virsh("destroy", vm.name)
    vm.must_start()
    assert rights(agent, vm) == RIGHTS | {CONTROL}  # of the element that was defined


def by_hand(verb: str, vm: Vm, *more: str) -> None:
    done = cli(verb, vm.name, *more)
    assert done.returncode == 0, done.stderr
