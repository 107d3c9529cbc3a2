# SPDX-License-Identifier: Apache-2.0
"""One look at one VM, as a worker of the agent does it: what is in force afterwards.

The VMs are processes on the emulated kernel, the tool is asked what the kernel allows it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from agent_harness import CONTROL, IDS, INFO, READ, UNHOOK, programs
from agent_rig import Wanted, domain_xml, write_policy
from emulator_harness import trace_lines
from fleet import Fleet, StandIn
from patient_tool import PatientTool
from support import wait_until

from kvmi_libvirt import introspect, session, worker
from kvmi_libvirt import state as st
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.agent.decide import TOOL_HAS_GONE, Step
from kvmi_libvirt.agent.jobs import Jobs, Outcome, Places
from kvmi_libvirt.cli.rights import changed, read_names
from kvmi_libvirt.errors import SessionError
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.qemu import tracee
from kvmi_libvirt.qemu.process import Process, open_domain
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmi_libvirt.session import Report
    from kvmi_libvirt.state import VmState

__all__ = ["programs"]

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

MORE = "KVMI_VM_WRITE_PHYSICAL"
NOT_IN_V7 = "KVMI_VM_CONTROL_CLEANUP"


@dataclass
class Desk:
    """Where looks are taken from."""

    directory: Path
    fleet: Fleet
    tool: PatientTool
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def tool_path(self) -> Path:
        return self.directory / "tool.sock"

    @property
    def state(self) -> StateDir:
        return StateDir(self.directory / "state")

    def jobs(self) -> Jobs:
        return Jobs(
            Places(
                state_dir=self.state.path,
                run_dir=self.fleet.run_dir,
                host_policy=self.directory / "host-policy.xml",
            )
        )

    def boot(self) -> StandIn:
        (vm,) = self.fleet.start([f"vm{next(self.numbers)}"])
        return vm

    def element(self, *commands: str, **more: object) -> str:
        wanted = Wanted(tool=self.tool_path, commands=commands or (INFO,))
        return dataclasses.replace(wanted, **more).element()  # type: ignore[arg-type]

    def look(self, vm: StandIn, metadata: str = "", **argument: str) -> Outcome:
        outcome = self.jobs().run(
            "reconcile",
            {"name": vm.name, "uuid": vm.uuid, "asked": "", "may_call": "yes", **argument},
            domain_xml(vm, metadata).encode(),
        )
        if outcome.channel is not None:
            os.close(outcome.channel)
        assert self.is_alive(vm)
        return outcome

    def record(self, vm: StandIn) -> VmState:
        record = self.state.load(vm.uuid)
        assert record is not None
        return record

    def allowed(self, vm: StandIn) -> set[str] | None:
        ids = {**IDS, MORE: 14}
        errors = self.tool.check(vm.uuid, commands=list(ids.values()))
        if None in errors:
            return None
        return {name for name, error in zip(ids, errors, strict=True) if error == 0}

    def ioctls(self, vm: StandIn) -> list[str]:
        lines = trace_lines(self.directory / "trace.jsonl")
        return [
            line["ioctl"].removeprefix("KVM_INTROSPECTION_")
            for line in lines
            if line["tid"] == vm.pid and "CHECK" not in line["ioctl"] and line["errno"] == 0
        ]

    def has_made(self, vm: StandIn, *last: str) -> None:
        """Wait until these are the last ioctls in the trace, which is written behind."""
        wait_until(lambda: self.ioctls(vm)[-len(last) :] == list(last), what=f"the last are {last}")

    def is_alive(self, vm: StandIn) -> bool:
        with open_domain(vm.name, vm.uuid, run_dir=self.fleet.run_dir) as process:
            return process.is_alive()

    def sockets(self, vm: StandIn) -> list[str]:
        with open_domain(vm.name, vm.uuid, run_dir=self.fleet.run_dir) as process:
            return [link for link in process.fd_links().values() if link.startswith("socket:")]

    def by_hand(self, vm: StandIn, *names: str, allow: bool) -> None:
        with open_domain(vm.name, vm.uuid, run_dir=self.fleet.run_dir) as process:
            introspect.change_vm(
                process,
                vm.uuid,
                lambda record: changed(record, read_names(list(names)), allow=allow),
                state=self.state,
            )

    def leave(self, vm: StandIn) -> None:
        assert self.tool.drop(vm.uuid) == 1
        record = self.record(vm)
        wait_until(lambda: not introspect.channel_is_open(record), what="its channel ends")


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, programs: Path
) -> Iterator[tuple[Path, Fleet, PatientTool]]:
    directory = tmp_path_factory.mktemp("desk")
    options = ["--trace", str(directory / "trace.jsonl")]
    with (
        Fleet(programs, run_dir=directory / "run", options=options) as fleet,
        PatientTool(directory / "tool.sock") as tool,
    ):
        yield directory, fleet, tool


NUMBERS = itertools.count()


@pytest.fixture
def desk(shared: tuple[Path, Fleet, PatientTool]) -> Desk:
    directory, fleet, tool = shared
    write_policy(directory)
    return Desk(directory, fleet, tool, NUMBERS)


# -- the steps ---------------------------------------------------------------------------


def test_a_vm_without_a_policy_is_left_alone(desk: Desk) -> None:
    vm = desk.boot()
    outcome = desk.look(vm)
    assert (outcome.step, outcome.record, outcome.error) == (Step.NOTHING.value, None, None)
    assert desk.ioctls(vm) == []
    assert not list(desk.state.path.glob(f"{vm.uuid}*"))


def test_a_vm_is_hooked_and_looked_at_again_without_a_step(desk: Desk) -> None:
    vm = desk.boot()
    first = desk.look(vm, desk.element(INFO, READ))
    assert (first.step, first.error, first.retry_s) == (Step.HOOK.value, None, None)
    assert first.stall_us > 0
    desk.has_made(vm, "HOOK", "COMMAND", "COMMAND")
    again = desk.look(vm, desk.element(INFO, READ))
    assert (again.step, again.error, again.stall_us) == (Step.CHANGE.value, None, 0)
    assert desk.ioctls(vm) == ["HOOK", "COMMAND", "COMMAND"]
    assert desk.allowed(vm) == {INFO, READ}
    assert desk.sockets(vm) == []


def test_a_changed_policy_takes_before_it_gives(desk: Desk) -> None:
    vm = desk.boot()
    desk.look(vm, desk.element(INFO, READ))
    outcome = desk.look(vm, desk.element(INFO, MORE))
    assert (outcome.step, outcome.error) == (Step.CHANGE.value, None)
    assert desk.allowed(vm) == {INFO, MORE}
    assert set(desk.record(vm).commands) == {INFO, MORE}


def test_where_a_tool_may_not_be_called_nothing_is_done(desk: Desk) -> None:
    vm = desk.boot()
    outcome = desk.look(vm, desk.element(INFO), may_call="")
    assert outcome.must_call
    assert outcome.step == Step.NOTHING.value
    assert desk.ioctls(vm) == []
    # What needs no tool is done all the same.
    desk.look(vm, desk.element(INFO))
    changed_now = desk.look(vm, desk.element(READ), may_call="")
    assert (changed_now.must_call, changed_now.step) == (False, Step.CHANGE.value)
    assert desk.allowed(vm) == {READ}


def test_a_tool_that_is_gone_is_called_again(desk: Desk) -> None:
    vm = desk.boot()
    desk.look(vm, desk.element(INFO, READ))
    desk.leave(vm)
    outcome = desk.look(vm, desk.element(INFO, READ))
    assert (outcome.step, outcome.error) == (Step.HOOK.value, None)
    assert desk.allowed(vm) == {INFO, READ}
    wait_until(lambda: desk.ioctls(vm).count("HOOK") == 2, what="the second hook is traced")
    assert desk.ioctls(vm).count("UNHOOK") == 1
    assert desk.sockets(vm) == []


def test_a_tool_that_is_gone_for_good_ends_it(desk: Desk) -> None:
    vm = desk.boot()
    element = desk.element(INFO, reconnect_s=None)
    desk.look(vm, element)
    desk.leave(vm)
    outcome = desk.look(vm, element)
    assert (outcome.step, outcome.error) == (Step.UNHOOK.value, None)
    desk.has_made(vm, "UNHOOK")
    assert desk.record(vm).error == TOOL_HAS_GONE
    assert desk.look(vm, element).step == Step.NOTHING.value
    # Another policy is another matter.
    assert desk.look(vm, desk.element(INFO)).step == Step.HOOK.value


def test_no_tool_is_a_reason_to_wait_and_the_wait_ends_with_the_policy(desk: Desk) -> None:
    vm = desk.boot()
    nobody = desk.element(INFO, tool=desk.directory / "nobody.sock", reconnect_s=7)
    outcome = desk.look(vm, nobody)
    assert outcome.error is not None
    assert "no tool listens on" in outcome.error
    assert outcome.retry_s == 7
    assert desk.record(vm).state == st.WAITING
    gone = desk.look(vm)
    assert (gone.step, gone.record, gone.error) == (Step.NOTHING.value, None, None)
    assert desk.state.load(vm.uuid) is None


def test_a_vm_that_has_ended_is_told(desk: Desk) -> None:
    vm = desk.boot()
    desk.look(vm, desk.element(INFO))
    desk.fleet.stop(vm)
    outcome = desk.jobs().run(
        "reconcile",
        {"name": vm.name, "uuid": vm.uuid, "asked": "", "may_call": "yes"},
        domain_xml(vm).encode(),
    )
    assert outcome.is_gone
    assert outcome.error is None


# -- letting go --------------------------------------------------------------------------


def test_a_tool_that_asked_for_it_is_told_first_and_given_its_time(desk: Desk) -> None:
    vm = desk.boot()
    element = desk.element(INFO, CONTROL, events=(UNHOOK,), unhook_s=7)
    desk.look(vm, element)
    assert desk.tool.subscribe(vm.uuid, lets_go=False) == 0
    outcome = desk.look(vm)
    assert (outcome.step, outcome.leaving_s) == (Step.LEAVE.value, 7)
    assert desk.tool.asked(vm.uuid) == 1
    desk.has_made(vm, "PREUNHOOK")
    assert desk.allowed(vm) == {INFO, CONTROL}  # what it has to undo, it can
    inode = str(desk.record(vm).socket_inode)
    # Looked at again meanwhile, it is neither asked twice nor put out.
    meanwhile = desk.look(vm, asked=inode, has_time="yes")
    assert (meanwhile.step, meanwhile.leaving_s) == (Step.LEAVE.value, 7)
    assert desk.allowed(vm) == {INFO, CONTROL}
    # It has had its time.
    end = desk.look(vm, asked=inode)
    assert (end.step, end.leaving_s) == (Step.UNHOOK.value, None)
    assert desk.tool.asked(vm.uuid) == 1
    desk.has_made(vm, "UNHOOK")
    assert desk.record(vm).state == st.UNHOOKED


def test_a_vm_that_the_asking_could_kill_is_unhooked_without_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = desk.boot()
    desk.look(vm, desk.element(INFO, CONTROL, events=(UNHOOK,)))
    assert desk.tool.subscribe(vm.uuid, lets_go=False) == 0
    # QEMU ignores SIGPIPE, which PREUNHOOK raises where the tool has just gone.
    monkeypatch.setattr(Process, "ignores", lambda _process, number: number != signal.SIGPIPE)
    outcome = desk.look(vm)
    assert (outcome.leaving_s, outcome.error) == (None, None)
    assert desk.tool.asked(vm.uuid) == 0
    desk.has_made(vm, "UNHOOK")
    assert "PREUNHOOK" not in desk.ioctls(vm)


def test_a_tool_that_did_not_ask_for_it_is_not_waited_for(desk: Desk) -> None:
    vm = desk.boot()
    desk.look(vm, desk.element(INFO))
    outcome = desk.look(vm)
    assert (outcome.step, outcome.leaving_s) == (Step.LEAVE.value, None)
    desk.has_made(vm, "UNHOOK")
    assert desk.allowed(vm) is None


def test_a_policy_that_is_back_before_its_tool_left_stays_in_force(desk: Desk) -> None:
    vm = desk.boot()
    element = desk.element(INFO, CONTROL, events=(UNHOOK,))
    desk.look(vm, element)
    desk.tool.subscribe(vm.uuid, lets_go=False)
    assert desk.look(vm).leaving_s is not None
    outcome = desk.look(vm, element, asked=str(desk.record(vm).socket_inode))
    assert (outcome.step, outcome.error) == (Step.CHANGE.value, None)
    assert desk.allowed(vm) == {INFO, CONTROL}


def test_the_tool_that_was_asked_is_not_the_one_that_came_since(desk: Desk) -> None:
    vm = desk.boot()
    element = desk.element(INFO, CONTROL, events=(UNHOOK,))
    desk.look(vm, element)
    before = str(desk.record(vm).socket_inode)
    desk.leave(vm)
    desk.look(vm, element)
    desk.tool.subscribe(vm.uuid, lets_go=False)
    outcome = desk.look(vm, asked=before)
    assert (outcome.step, outcome.leaving_s) == (Step.LEAVE.value, 60)
    assert desk.tool.asked(vm.uuid) == 1


def test_another_tool_takes_the_place_of_the_first(desk: Desk) -> None:
    vm = desk.boot()
    other = desk.directory / "other.sock"
    desk.look(vm, desk.element(INFO))
    with PatientTool(other) as second:
        assert desk.look(vm, desk.element(READ, tool=other)).step == Step.LEAVE.value
        assert desk.look(vm, desk.element(READ, tool=other)).step == Step.HOOK.value
        assert second.connected() == [vm.uuid]
        assert second.check(vm.uuid, commands=[IDS[INFO], IDS[READ]]) == [1, 0]


# -- what was changed by hand ------------------------------------------------------------


def test_what_was_denied_by_hand_stays_denied_until_the_policy_changes(desk: Desk) -> None:
    vm = desk.boot()
    element = desk.element(INFO, READ)
    desk.look(vm, element)
    desk.by_hand(vm, READ, allow=False)
    desk.look(vm, element)
    assert desk.allowed(vm) == {INFO}
    desk.leave(vm)
    desk.look(vm, element)
    assert desk.allowed(vm) == {INFO}
    desk.look(vm, desk.element(INFO, READ, unhook_s=61))
    assert desk.allowed(vm) == {INFO, READ}


def test_what_was_denied_by_hand_outlives_a_tool_that_does_not_come_and_a_broken_policy(
    desk: Desk,
) -> None:
    vm = desk.boot()
    element = desk.element(INFO, READ)
    desk.look(vm, element)
    desk.by_hand(vm, READ, allow=False)
    desk.leave(vm)
    (desk.directory / "host-policy.xml").write_text("<broken", encoding="ascii")
    assert desk.look(vm, element).error is not None
    write_policy(desk.directory, sockets=())
    assert "not allowed on this host" in (desk.look(vm, element).error or "")
    write_policy(desk.directory)
    desk.look(vm, element)
    assert desk.allowed(vm) == {INFO}


def test_a_deny_that_comes_while_a_look_is_on_its_way_is_not_undone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = desk.boot()
    element = desk.element(INFO, READ)
    desk.look(vm, element)
    really = introspect.follow_policy

    def late(*arguments: object, **more: object) -> VmState:
        # What was recorded has been read; the VM's lock is not held yet.
        monkeypatch.undo()
        desk.by_hand(vm, READ, allow=False)
        return really(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(introspect, "follow_policy", late)
    desk.look(vm, element)
    assert desk.allowed(vm) == {INFO}
    assert desk.record(vm).adjusted == (f"-{READ}",)


@pytest.mark.parametrize("step", ["hook_vm", "unhook_vm"])
def test_what_is_done_by_hand_while_a_look_is_on_its_way_is_not_undone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    vm = desk.boot()
    element = desk.element(INFO, reconnect_s=10 if step == "hook_vm" else None)
    desk.look(vm, element)
    desk.leave(vm)  # and so the agent is about to hook it anew, or to take the hook off
    really = getattr(introspect, step)

    def late(process: Process, *arguments: object, **more: object) -> VmState:
        monkeypatch.undo()
        introspect.unhook_vm(process, desk.record(vm), state=desk.state)
        if step == "unhook_vm":
            again = parse_domain(domain_xml(vm, element).encode(), source="by hand")
            assert again.policy is not None
            introspect.hook_vm(process, again, again.policy, state=desk.state)
        return really(process, *arguments, **more)  # type: ignore[no-any-return]

    monkeypatch.setattr(introspect, step, late)
    outcome = desk.look(vm, element)
    assert outcome.error is None
    is_hooked = step == "unhook_vm"
    assert desk.record(vm).state == (st.HOOKED if is_hooked else st.UNHOOKED)
    assert desk.allowed(vm) == ({INFO} if is_hooked else None)
    desk.look(vm, element)
    assert desk.allowed(vm) == ({INFO} if is_hooked else None)


def test_a_tool_that_was_asked_by_hand_to_let_go_is_not_called_again(desk: Desk) -> None:
    vm = desk.boot()
    element = desk.element(INFO, CONTROL, events=(UNHOOK,))
    desk.look(vm, element)
    desk.state.save(dataclasses.replace(desk.record(vm), leaving=True))
    assert desk.look(vm, element).step == Step.CHANGE.value  # it has not gone yet
    assert desk.record(vm).leaving
    desk.leave(vm)
    # Whoever asked it may have been killed meanwhile.
    assert desk.look(vm, element).step == Step.UNHOOK.value
    desk.has_made(vm, "UNHOOK")
    assert (desk.record(vm).state, desk.record(vm).leaving) == (st.UNHOOKED, False)
    assert desk.look(vm, element).step == Step.NOTHING.value
    assert desk.look(vm, desk.element(READ)).step == Step.HOOK.value


def test_what_was_allowed_by_hand_does_not_go_above_the_ceiling(desk: Desk) -> None:
    vm = desk.boot()
    element = desk.element(INFO)
    desk.look(vm, element)
    desk.by_hand(vm, READ, MORE, allow=True)
    assert desk.allowed(vm) == {INFO, READ, MORE}
    write_policy(desk.directory, ceiling=(INFO, READ))
    desk.look(vm, element)
    assert desk.allowed(vm) == {INFO, READ}
    desk.leave(vm)
    desk.look(vm, element)
    assert desk.allowed(vm) == {INFO, READ}


def test_a_vm_unhooked_by_hand_stays_so_until_its_policy_changes(desk: Desk) -> None:
    vm = desk.boot()
    element = desk.element(INFO)
    desk.look(vm, element)
    with open_domain(vm.name, vm.uuid, run_dir=desk.fleet.run_dir) as process:
        introspect.take_leave(process, desk.record(vm), state=desk.state)
    assert desk.look(vm, element).step == Step.NOTHING.value
    (desk.directory / "host-policy.xml").write_text("<broken", encoding="ascii")
    assert desk.look(vm, element).error is not None
    write_policy(desk.directory)
    assert desk.look(vm, element).step == Step.NOTHING.value
    assert desk.look(vm, desk.element(READ)).step == Step.HOOK.value


# -- what the host allows ----------------------------------------------------------------


@pytest.mark.parametrize("excess", ["refuse", "trim"])
def test_a_ceiling_that_is_lowered_counts_at_once_and_raised_gives_it_back(
    desk: Desk, excess: str
) -> None:
    vm = desk.boot()
    element = desk.element(INFO, READ)
    desk.look(vm, element)
    write_policy(desk.directory, ceiling=(INFO,), excess=excess)
    outcome = desk.look(vm, element)
    assert outcome.step == Step.CHANGE.value
    assert (outcome.error is None) == (excess == "trim")
    assert desk.allowed(vm) == {INFO}
    assert desk.record(vm).commands == (INFO,)
    write_policy(desk.directory)
    assert desk.look(vm, element).error is None
    assert desk.allowed(vm) == {INFO, READ}


def test_a_ceiling_counts_for_a_vm_whose_element_is_wrong(desk: Desk) -> None:
    vm = desk.boot()
    desk.look(vm, desk.element(INFO, READ))
    write_policy(desk.directory, ceiling=(INFO,))
    outcome = desk.look(vm, desk.element(INFO, "KVMI_NO_SUCH"))
    assert "KVMI_NO_SUCH" in (outcome.error or "")
    assert desk.allowed(vm) == {INFO}


def test_a_place_that_is_not_allowed_any_more_ends_the_introspection(desk: Desk) -> None:
    vm = desk.boot()
    element = desk.element(INFO, CONTROL, events=(UNHOOK,), unhook_s=9)
    desk.look(vm, element)
    desk.tool.subscribe(vm.uuid, lets_go=False)
    write_policy(desk.directory, sockets=(desk.directory / "elsewhere" / "*",))
    asked = desk.look(vm, element)
    assert (asked.step, asked.leaving_s) == (Step.LEAVE.value, 9)
    end = desk.look(vm, element, asked=str(desk.record(vm).socket_inode))
    assert "not allowed on this host" in (end.error or "")
    assert desk.allowed(vm) is None
    desk.has_made(vm, "UNHOOK")


@pytest.mark.parametrize("text", ["<broken", "<host-policy/>", ""])
def test_a_broken_host_policy_changes_nothing_and_is_told(desk: Desk, text: str) -> None:
    vm, other = desk.boot(), desk.boot()
    element = desk.element(INFO, READ)
    desk.look(vm, element)
    before = desk.record(vm)
    (desk.directory / "host-policy.xml").write_text(text, encoding="ascii")
    outcome = desk.look(vm, desk.element(INFO, READ, MORE))
    assert "host-policy.xml" in (outcome.error or "")
    assert desk.record(vm) == before
    assert desk.allowed(vm) == {INFO, READ}
    # Nobody is hooked by what cannot be read, and a VM that asks for nothing stays clean.
    assert desk.look(other, element).step == Step.NOTHING.value
    assert desk.ioctls(other) == []
    write_policy(desk.directory)
    assert desk.look(other).record is None
    assert desk.state.load(other.uuid) is None


def test_a_policy_that_others_may_write_is_no_policy(desk: Desk) -> None:
    vm = desk.boot()
    path = desk.directory / "host-policy.xml"
    path.chmod(0o666)
    outcome = desk.look(vm, desk.element(INFO))
    assert "writable by others" in (outcome.error or "")
    assert desk.ioctls(vm) == []


def test_what_a_kernel_lacks_is_told_and_what_is_not_allowed_any_more_goes(
    tmp_path: Path, programs: Path
) -> None:
    options = ["--trace", str(tmp_path / "trace.jsonl")]
    with (
        Fleet(programs, run_dir=tmp_path / "run", abi="v7", options=options) as fleet,
        PatientTool(tmp_path / "tool.sock") as tool,
    ):
        desk = Desk(tmp_path, fleet, tool)
        write_policy(tmp_path)
        vm = desk.boot()
        desk.look(vm, desk.element(INFO, READ))
        outcome = desk.look(vm, desk.element(INFO, NOT_IN_V7))
        assert outcome.kind == "UnsupportedByKernel"
        assert outcome.retry_s is not None
        assert desk.record(vm).commands == (INFO,)
        denied = {"allow": 0, "id": V7.commands_by_name[READ].id}
        wait_until(
            lambda: trace_lines(tmp_path / "trace.jsonl")[-1]["args"] == denied,
            what="it is taken away",
        )
        assert desk.look(vm, desk.element(INFO, READ)).error is None
        assert set(desk.record(vm).commands) == {INFO, READ}


# -- workers that die --------------------------------------------------------------------


def die_in(session_name: str, count: int, look: Callable[[], Outcome]) -> bool:
    """Take a look in a worker that dies after so many calls of one session in QEMU.

    Returns
        whether it died; else there were fewer calls
    """
    pid = os.fork()
    if pid == 0:
        try:
            worker.become_worker()
            really = getattr(session, session_name)
            left = [count]

            def point(name: str) -> None:
                left[0] -= name == "call-returned"
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

            def dying(*arguments: object, **more: object) -> Report:
                tracee._trace = point
                report: Report = really(*arguments, **more)
                return report

            setattr(session, session_name, dying)
            look()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_a_worker_that_dies_between_two_ioctls_leaves_no_right_behind(desk: Desk) -> None:
    vm = desk.boot()
    first, second = {INFO, READ}, {READ, MORE, CONTROL}
    deaths = 0
    for count in itertools.count(1):
        desk.look(vm, desk.element(*first))
        assert desk.allowed(vm) == first
        has_died = die_in("change", count, lambda: desk.look(vm, desk.element(*second)))
        allowed = desk.allowed(vm)
        assert allowed is not None
        assert allowed <= first | second
        # The second policy is gone before anybody saw what became of it.
        assert desk.look(vm, desk.element(*first)).error is None
        assert desk.allowed(vm) == first
        assert desk.record(vm).unsure_commands == ()
        if not has_died:
            break
        deaths += 1
    assert deaths == 3


def test_a_worker_that_dies_while_it_hooks_is_cleaned_up_after(desk: Desk) -> None:
    vm = desk.boot()
    deaths = 0
    for count in itertools.count(1):
        has_died = die_in("hook", count, lambda: desk.look(vm, desk.element(INFO, READ)))
        # The policy is gone before anybody looked again: its journal tells what is left.
        again = desk.look(vm)
        assert again.error is None
        assert desk.state.load_journal(vm.uuid) is None
        assert desk.sockets(vm) == []
        wait_until(lambda: vm.uuid not in desk.tool.connected(), what="no channel is left")
        if not has_died:
            break
        assert again.step == Step.NOTHING.value
        desk.has_made(vm, "UNHOOK")
        deaths += 1
    assert deaths > 6
    desk.look(vm, desk.element(INFO))
    assert desk.allowed(vm) == {INFO}


def test_a_session_of_which_nobody_tells_the_end_is_settled_by_the_next(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = desk.boot()
    desk.look(vm, desk.element(INFO))
    really = worker.run

    def silent(*arguments: object, **more: object) -> Report:
        really(*arguments, **more)  # type: ignore[arg-type]
        raise SessionError("nobody tells", is_unfinished=True)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run", silent)
        outcome = desk.look(vm, desk.element(INFO, MORE))
    assert outcome.error == "nobody tells"
    assert outcome.retry_s is not None
    assert desk.allowed(vm) == {INFO, MORE}
    desk.look(vm, desk.element(INFO))
    assert desk.allowed(vm) == {INFO}
