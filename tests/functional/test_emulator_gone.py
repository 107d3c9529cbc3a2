# SPDX-License-Identifier: Apache-2.0
"""The emulator of a hooked VM has ended: what sessions and the agent make of it.

The VM must run on, nothing may be told as in force, and the reason is one line to act on. The
verbs: test_cli_target.py.
"""

from __future__ import annotations

import os
import signal
from functools import cached_property
from typing import TYPE_CHECKING

import pytest
from agent_harness import INFO, READ, programs
from agent_rig import Wanted, domain_xml, write_policy
from emulator_harness import EMULATOR_ENDED as ENDED
from emulator_harness import end_supervisor
from fleet import Fleet, StandIn
from patient_tool import PatientTool
from support import stop_process, wait_until

from kvmi_libvirt import introspect, session
from kvmi_libvirt import state as st
from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.agent.decide import Step
from kvmi_libvirt.agent.jobs import SLOW_RETRY_S, Jobs, Outcome, Places
from kvmi_libvirt.errors import ExitCode, SessionError
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource
from kvmi_libvirt.qemu.process import open_domain
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmi_libvirt.newtypes import RemoteFd
    from kvmi_libvirt.qemu.process import Process
    from kvmi_libvirt.qemu.remote import Remote

__all__ = ["programs"]

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]


# -- the sessions --------------------------------------------------------------------------


class Site:
    """VMs below a supervisor of their own, and a tool."""

    def __init__(self, directory: Path, fleet: Fleet, tool: PatientTool) -> None:
        self.directory = directory
        self.fleet = fleet
        self.tool = tool
        self.state = StateDir(directory / "state")
        self.policy = Policy(
            mode=Mode.REQUIRED,
            source=UnixSource(path=str(directory / "tool.sock")),
            commands=Rights(allowed=frozenset({INFO, READ})),
        )

    @cached_property
    def supervisor(self) -> int:
        """Who serves the VMs; there are some."""
        (found,) = self.fleet.supervisors()
        return found

    def opened(self, vm: StandIn) -> Process:
        return open_domain(vm.name, vm.uuid, run_dir=self.fleet.run_dir)

    def hook(self, vm: StandIn) -> st.VmState:
        with self.opened(vm) as process:
            return introspect.hook_vm(process, vm.domain(), self.policy, state=self.state)

    def sockets(self, vm: StandIn) -> list[str]:
        with self.opened(vm) as process:
            return [link for link in process.fd_links().values() if link.startswith("socket:")]

    def look(self, vm: StandIn, metadata: str = "") -> Outcome:
        """Take a look at *vm* as the agent does."""
        places = Places(
            state_dir=self.state.path,
            run_dir=self.fleet.run_dir,
            host_policy=self.directory / "host-policy.xml",
        )
        argument = {"name": vm.name, "uuid": vm.uuid, "asked": "", "may_call": "yes"}
        xml = domain_xml(vm, metadata).encode()
        outcome = Jobs(places).run("reconcile", argument, xml)
        if outcome.channel is not None:
            os.close(outcome.channel)
        return outcome


@pytest.fixture
def site(tmp_path: Path, programs: Path) -> Iterator[Site]:
    write_policy(tmp_path)
    with (
        Fleet(programs, run_dir=tmp_path / "run") as fleet,
        PatientTool(tmp_path / "tool.sock") as tool,
    ):
        yield Site(tmp_path, fleet, tool)


def after(monkeypatch: pytest.MonkeyPatch, ioctl: Ioctl, action: Callable[[], None]) -> None:
    """Do *action* in the session, between the first *ioctl* and the call that follows."""
    really = session._introspection
    done = [False]

    def acting(remote: Remote, name: str, fd: RemoteFd, request: int, argument: int) -> None:
        really(remote, name, fd, request, argument)
        if ioctl.value in name and fd >= 0 and not done[0]:  # not the rehearsal's
            done[0] = True
            action()

    monkeypatch.setattr(session, "_introspection", acting)


def test_hook_when_the_emulator_ends_half_way_then_nothing_is_told_as_left_or_in_force(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (vm,) = site.fleet.start(["vm"])
    supervisor = site.supervisor
    after(monkeypatch, Ioctl.HOOK, lambda: os.kill(supervisor, signal.SIGKILL))
    with pytest.raises(SessionError) as raised:
        site.hook(vm)

    error = raised.value
    assert (str(error), error.kind) == (ENDED, "EmulatorGone")
    assert (error.applied, error.left, error.exit_code) == ((), (), ExitCode.UNSUPPORTED)
    assert site.sockets(vm) == []
    assert site.state.load_journal(vm.uuid) is None
    record = site.state.load(vm.uuid)
    assert record is not None
    assert (record.state, record.error, record.commands) == (st.FAILED, ENDED, ())


def test_undo_of_a_hook_when_the_emulator_has_ended_then_the_first_error_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (vm,) = site.fleet.start(["vm"])
    supervisor = site.supervisor

    def fail() -> None:
        os.kill(supervisor, signal.SIGKILL)
        raise RuntimeError("made to fail")

    after(monkeypatch, Ioctl.HOOK, fail)
    with pytest.raises(SessionError, match=r"^made to fail; the VM was unhooked again$") as raised:
        site.hook(vm)

    assert raised.value.left == ()
    assert site.sockets(vm) == []


def test_leftovers_of_a_session_that_died_when_the_emulator_has_ended_then_they_are_closed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (vm,) = site.fleet.start(["vm"])
    with monkeypatch.context() as patch:
        after(patch, Ioctl.HOOK, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(SessionError, match="ended without a result"):
            site.hook(vm)
    assert site.sockets(vm) != []
    end_supervisor(site.supervisor)

    with site.opened(vm) as process:
        assert introspect.unhook_unrecorded(process, vm.uuid, state=site.state)
    assert site.sockets(vm) == []
    assert site.state.load_journal(vm.uuid) is None


# -- the agent -----------------------------------------------------------------------------


@pytest.mark.parametrize("reconnect_s", [1, None])
def test_agent_when_the_emulator_has_ended_then_it_says_so_and_tries_seldom(
    site: Site, reconnect_s: int | None
) -> None:
    (vm,) = site.fleet.start(["vm"])
    wanted = Wanted(tool=site.directory / "tool.sock", commands=(INFO,), reconnect_s=reconnect_s)
    assert site.look(vm, wanted.element()).error is None
    end_supervisor(site.supervisor)
    wait_until(lambda: site.tool.connected() == [], what="the tool knows")

    outcome = site.look(vm, wanted.element())
    assert (outcome.kind, outcome.error) == ("EmulatorGone", ENDED)
    assert outcome.retry_s == SLOW_RETRY_S
    record = site.state.load(vm.uuid)
    assert record is not None
    assert (record.state, record.error, record.commands) == (st.FAILED, ENDED, ())
    # The policy is gone: there is nothing to undo, and nothing to tell for ever.
    for _ in range(2):
        last = site.look(vm)
    assert (last.step, last.error) == (Step.NOTHING.value, None)
    assert site.state.load(vm.uuid) is None
    with site.opened(vm) as process:
        assert process.is_alive()


# -- it is there, and does nothing ---------------------------------------------------------


def test_supervisor_when_it_does_not_answer_then_the_call_is_abandoned_and_the_vm_is_as_before(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(introspect.probing, "SESSION_S", 1.0)
    (vm,) = site.fleet.start(["vm"])
    stop_process(site.supervisor)
    try:
        with pytest.raises(SessionError) as raised:
            site.hook(vm)
    finally:
        os.kill(site.supervisor, signal.SIGCONT)

    assert (raised.value.kind, raised.value.is_unfinished) == ("RemoteCallTimeout", False)
    assert site.sockets(vm) == []
    assert site.tool.connected() == []
    # Nothing was half done: now it works.
    assert site.hook(vm).state == st.HOOKED
