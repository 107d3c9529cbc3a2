# SPDX-License-Identifier: Apache-2.0
"""What the agent's worker processes do: one job at a time about one VM.

Everything that reads a policy, calls a tool or stops a QEMU happens here, never in
the daemon itself. A job's outcome is plain data, since it crosses a process boundary;
the channel of a VM that was just hooked goes along as a descriptor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt import early, introspect, proxmoxfiles
from kvmi_libvirt import state as st
from kvmi_libvirt.agent.decide import FINAL, TOOL_HAS_GONE, Seen, Step, next_step
from kvmi_libvirt.agent.managers import Libvirt, Manager, Proxmox
from kvmi_libvirt.errors import (
    KvmiLibvirtError,
    PolicyError,
    SessionError,
    StateError,
    TargetGone,
    TargetNotFound,
)
from kvmi_libvirt.hook import Hook
from kvmi_libvirt.policy.digest import digest
from kvmi_libvirt.policy.host import HOST_POLICY_PATH, load_host_policy
from kvmi_libvirt.policy.model import DEFAULT_RECONNECT_S, parse_source
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR
from kvmi_libvirt.state import StateDir, VmState

if TYPE_CHECKING:
    import socket

    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.limits import HostPolicy
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.qemu.process import Process
    from kvmi_libvirt.session import Report

logger = logging.getLogger(__name__)

_LOCK_S: Final = 5.0
_ATTEMPTS: Final = 3
SLOW_RETRY_S: Final = 60.0
"""Between tries of what only something else than time is likely to mend."""

_HOPELESS: Final = frozenset(
    {"UnsupportedByKernel", "EmulatorGone", "PlanError", "TargetUnsuitable", "TargetAmbiguous"}
)
"""Kinds of failure that only another kernel, QEMU or policy would mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a host keeps what jobs need; tests use others.

    Parameters
        proxmox  of a Proxmox VE node; None where libvirt runs the VMs
    """

    state_dir: Path = st.STATE_DIR
    run_dir: Path = LIBVIRT_QEMU_RUN_DIR
    host_policy: Path = HOST_POLICY_PATH
    proxmox: proxmoxfiles.Places | None = None
    allow_standin: bool = False


def _kind(error: Exception) -> str:
    return getattr(error, "kind", None) or type(error).__name__


def _by_hand(record: VmState) -> bool:
    # What we unhook ourselves has no policy any more that was acted upon.
    return record.state == st.UNHOOKED and bool(record.policy)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a job.

    Parameters
        step        what was done, by its name
        record      what is recorded about the VM now, as a dict; None for nothing
        error       what failed, one line
        kind        class name of the error
        retry_s     try again, waiting at most so many seconds between tries; None: do not,
                    until something changes
        is_gone     the VM has ended
        early       a start is to be watched, by the job of that name
        leaving_s   the tool was asked to let go, and has so many seconds
        warning     what is wrong with the VM though it is hooked
        left        inode of the channel that its tool, unasked, was found to have ended;
                    0 for none
        must_call   nothing was done: the tool has to be called, and may not be yet
        veto        why libvirt is to be told no
        stall_us, gap_us, took_us   what hooking cost
        channel     descriptor of our copy of the channel, owned by the receiver
    """

    step: str = Step.NOTHING.value
    record: dict[str, Any] | None = None
    error: str | None = None
    kind: str | None = None
    retry_s: float | None = None
    is_gone: bool = False
    leaving_s: int | None = None
    warning: str | None = None
    left: int = 0
    must_call: bool = False
    early: bool = False
    veto: str | None = None
    stall_us: int = 0
    gap_us: int = 0
    took_us: int = 0
    channel: int | None = field(default=None, compare=False)


class Jobs:
    """The jobs, for one set of places.

    Parameters
        manager  who runs the VMs, if not whom the places tell of
    """

    def __init__(self, places: Places, *, manager: Manager | None = None) -> None:
        """Nothing is touched yet."""
        self._places = places
        self._state = StateDir(places.state_dir)
        self._manager = manager or self._manager_of(places)
        self._started = 0.0
        self._outcome = Outcome()

    def _manager_of(self, places: Places) -> Manager:
        if places.proxmox is not None:
            return Proxmox(places.proxmox, self._state)
        return Libvirt(places.run_dir, places.host_policy)

    def run(self, job: str, argument: dict[str, str], xml: bytes) -> Outcome:
        """Do *job*, one of "operation", "early" and "reconcile"; never raises.

        Parameters
            argument  "name" and "uuid" of the domain. For the first "operation"; for the
                      other "may_call", not empty when a tool may be called; "asked",
                      the channel whose tool was asked to let go; and "has_time", "yes"
                      while that tool may still take its time
            xml       the domain XML
        """
        self._started = time.monotonic()
        self._outcome = Outcome()
        try:
            if job == "operation":
                self._operation(argument, xml)
            elif job == "early":
                self._early(argument, xml)
            else:
                self._reconcile_surely(argument, xml)
        except (TargetGone, TargetNotFound):
            self._outcome.is_gone = True
        except (KvmiLibvirtError, OSError) as error:
            self._failed(error)
            self._outcome.retry_s = SLOW_RETRY_S
        self._outcome.took_us = round((time.monotonic() - self._started) * 1e6)
        return self._outcome

    # -- what libvirt's hook hands over ----------------------------------------------

    def _operation(self, argument: dict[str, str], xml: bytes) -> None:
        hook = Hook(
            state=self._state,
            run_dir=self._places.run_dir,
            host_policy=self._places.host_policy,
            watch_start=self._note_early,
            on_hooked=self._keep_channel,
            allow_standin=self._places.allow_standin,
        )
        self._outcome.step = argument["operation"]
        self._outcome.veto = hook.run(argument["name"], argument["operation"], xml)
        if hook.failure is not None:
            self._outcome.kind = _kind(hook.failure)
        with contextlib.suppress(StateError):
            self._note(self._state.load(argument["uuid"]))

    def _note_early(self, _domain: Domain, _policy: Policy) -> None:
        self._outcome.early = True

    def _early(self, argument: dict[str, str], xml: bytes) -> None:
        # A job of its own, which lasts as long as the start; the mark was made before.
        host = load_host_policy(self._places.host_policy)
        domain, policy = decide(xml, host, source=f"XML of domain '{argument['name']}'")
        self._outcome.step = "early"
        if policy is not None:
            early.watch_start(
                domain,
                policy,
                state=self._state,
                run_dir=self._places.run_dir,
                allow_standin=self._places.allow_standin,
                on_hooked=self._keep_channel,
            )

    # -- wanted against actual -------------------------------------------------------

    def _reconcile_surely(self, argument: dict[str, str], xml: bytes) -> None:
        # What somebody does by hand while we decide must not be undone by us.
        for _ in range(_ATTEMPTS):
            try:
                self._reconcile(argument, xml)
            except SessionError as error:
                if error.kind != introspect.OVERTAKEN:
                    raise
                self._outcome = Outcome()
            else:
                return
        raise SessionError("it is changed all the time by somebody else")

    def _reconcile(self, argument: dict[str, str], xml: bytes) -> None:
        name, uuid = argument["name"], argument["uuid"]
        with self._manager.open(name, uuid) as process:
            record = self._record_of(process, uuid)
            self._note(record)
            if record is not None and record.state == st.HOOKED:
                self._outcome.warning = introspect.unwatched_vcpus(record, process)
            if record is None and self._manager.is_being_started(process):
                self._outcome.retry_s = DEFAULT_RECONNECT_S
                return
            host: HostPolicy | None = None
            try:
                host = self._manager.host_policy(name)
                domain, policy = self._manager.decide(process, name, xml, host)
            except PolicyError as error:
                self._bad_policy(process, argument, xml, record, host, error)
                return
            seen = Seen(
                wanted=policy,
                digest="" if policy is None else digest(policy),
                record=record,
                is_open=self._is_open(record),
            )
            if record is not None and not seen.is_open and not record.leaving:
                was_asked = argument["asked"] == str(record.socket_inode)
                self._outcome.left = 0 if was_asked else record.socket_inode
            step = next_step(seen)
            if step is Step.HOOK and not argument["may_call"]:
                self._outcome.must_call = True
                return
            self._outcome.step = step.value
            try:
                self._do(step, process, domain, seen, host, argument)
            except (TargetGone, TargetNotFound):
                raise
            except KvmiLibvirtError as error:
                if getattr(error, "kind", None) == introspect.OVERTAKEN:
                    raise
                self._failed(error)
                self._plan_retry(error, process, uuid, policy)

    def _do(
        self,
        step: Step,
        process: Process,
        domain: Domain,
        seen: Seen,
        host: HostPolicy,
        argument: dict[str, str],
    ) -> None:
        policy, record = seen.wanted, seen.record
        if step is Step.NOTHING:
            self._tidy(process, domain.uuid, seen)
        elif step is Step.HOOK:
            assert policy is not None
            introspect.hook_vm(
                process,
                domain,
                policy,
                state=self._state,
                allow_standin=self._places.allow_standin,
                keeps_adjusted=True,
                ceiling=host.ceiling,
                still=lambda now: now == record,
                on_hooked=self._keep_channel,
            )
        elif step is Step.CHANGE:
            assert policy is not None
            self._change(process, domain.uuid, policy, host)
        elif step is Step.LEAVE:
            assert record is not None
            self._see_off(process, record, policy, argument)
        else:
            assert record is not None
            self._take_off(process, record, policy)

    def _change(self, process: Process, uuid: str, policy: Policy, host: HostPolicy) -> None:
        record = introspect.follow_policy(
            process,
            uuid,
            policy,
            state=self._state,
            keeps_adjusted=True,
            ceiling=host.ceiling,
        )
        self._note(record)

    def _tidy(self, process: Process, uuid: str, seen: Seen) -> None:
        record = seen.record
        is_told = record is not None and record.socket_inode
        if not is_told and self._state.load_journal(uuid) is not None:
            # What a session that died has left: no record tells of a hook.
            introspect.unhook_unrecorded(process, uuid, state=self._state)
        if seen.wanted is None and record is not None and record.state in (st.FAILED, st.WAITING):
            with self._state.locked(uuid, deadline=time.monotonic() + _LOCK_S):
                if self._state.load(uuid) == record:  # nobody asks for it any more
                    self._state.remove(uuid)
                    self._note(None)

    def _see_off(
        self,
        process: Process,
        record: VmState,
        policy: Policy | None,
        argument: dict[str, str],
    ) -> None:
        was_asked = argument["asked"] == str(record.socket_inode)
        must_wait = (
            argument.get("has_time", "") == "yes"
            if was_asked
            else introspect.ask_to_leave(process, record, state=self._state)
        )
        if must_wait:
            self._outcome.leaving_s = record.unhook_s
            return
        if was_asked:
            self._outcome.step = Step.UNHOOK.value
        self._take_off(process, record, policy)

    def _take_off(self, process: Process, record: VmState, policy: Policy | None) -> None:
        # The policy that is next acted upon must count as new, unless it was this one
        # that ended the introspection: a tool that went away and is not called again.
        is_end = policy is not None and policy.reconnect_s is None
        done = introspect.unhook_vm(
            process, record, state=self._state, still=lambda now: now == record
        )
        if record.leaving:
            pass  # by hand: the policy that it had was acted upon
        elif is_end and policy is not None and record.policy == digest(policy):
            done = dataclasses.replace(done, state=st.FAILED, error=TOOL_HAS_GONE)
        else:
            done = dataclasses.replace(done, policy="")
        self._save(done)

    # -- failures --------------------------------------------------------------------

    def _bad_policy(
        self,
        process: Process,
        argument: dict[str, str],
        xml: bytes,
        record: VmState | None,
        host: HostPolicy | None,
        error: PolicyError,
    ) -> None:
        # What is in force stays in force: nobody asked for less, only wrongly for other.
        # Unless the host says what it does not allow, which counts for everybody.
        self._failed(error)
        if record is not None and record.socket_inode:
            if host is not None and self._is_open(record):
                self._hold_to(host, process, record, argument)
            return
        if record is not None and (record.error in FINAL or _by_hand(record)):
            return
        name, uuid = argument["name"], argument["uuid"]
        mode = self._manager.demand(name, xml)
        introspect.record_failure(process, name, uuid, mode, error, state=self._state)
        self._note(self._record_of(process, uuid))

    def _hold_to(
        self, host: HostPolicy, process: Process, record: VmState, argument: dict[str, str]
    ) -> None:
        try:
            if host.refusal(parse_source(record.source or "")) is not None:
                self._outcome.step = Step.LEAVE.value
                self._see_off(process, record, None, argument)
            elif host.ceiling is not None:
                self._outcome.step = Step.CHANGE.value
                self._note(
                    introspect.lower_vm(process, record.uuid, host.ceiling, state=self._state)
                )
        except (TargetGone, TargetNotFound):
            raise
        except KvmiLibvirtError as error:
            if getattr(error, "kind", None) == introspect.OVERTAKEN:
                raise
            self._failed(error)
            self._outcome.retry_s = SLOW_RETRY_S

    def _failed(self, error: Exception) -> None:
        line = " ".join(str(error).split())
        self._outcome.error = line
        self._outcome.kind = _kind(error)

    def _plan_retry(
        self, error: KvmiLibvirtError, process: Process, uuid: str, policy: Policy | None
    ) -> None:
        record = self._record_of(process, uuid)
        if policy is not None and self._outcome.step == Step.HOOK.value:
            is_hopeless = self._outcome.kind in _HOPELESS
            self._outcome.retry_s = (
                SLOW_RETRY_S if is_hopeless else policy.reconnect_s or DEFAULT_RECONNECT_S
            )
            if record is not None and record.state == st.FAILED and not is_hopeless:
                record = dataclasses.replace(record, state=st.WAITING)
                self._save(record)
        else:
            self._outcome.retry_s = SLOW_RETRY_S
        self._note(record)

    # -- the record ------------------------------------------------------------------

    def _record_of(self, process: Process, uuid: str) -> VmState | None:
        try:
            record = self._state.load(uuid)
        except StateError as error:
            logger.warning("%s", error)
            return None
        if record is None or not introspect.is_same_process(record, process):
            return None
        return record

    def _is_open(self, record: VmState | None) -> bool:
        if record is None or not record.socket_inode:
            return False
        try:
            return introspect.channel_is_open(record)
        except StateError as error:
            # Unhooking a VM whose tool may be there would be the greater harm.
            logger.warning("domain %s: %s", record.domain, error)
            return True

    def _save(self, record: VmState) -> None:
        with self._state.locked(record.uuid, deadline=time.monotonic() + _LOCK_S):
            self._state.save(record)
        self._note(record)

    def _note(self, record: VmState | None) -> None:
        self._outcome.record = None if record is None else dataclasses.asdict(record)

    def _keep_channel(self, record: VmState, report: Report, sock: socket.socket) -> None:
        self._note(record)
        self._outcome.channel = os.dup(sock.fileno())
        self._outcome.stall_us = report.stall_us
        self._outcome.gap_us = report.gap_us
