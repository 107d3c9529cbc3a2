# SPDX-License-Identifier: Apache-2.0
"""Move the rights of a hooked VM to another policy."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import session, worker
from kvmi_libvirt import state as st
from kvmi_libvirt.errors import (
    ExitCode,
    PlanError,
    SessionError,
)
from kvmi_libvirt.introspect.hooking import _kept
from kvmi_libvirt.introspect.probing import SESSION_S, tell_what_is_left_out
from kvmi_libvirt.introspect.records import (
    LOCK_S,
    abi_of,
    grants_in_force,
    grants_unsure,
    is_same_process,
    with_grants,
    with_unsure,
)
from kvmi_libvirt.introspect.seeing import is_closed
from kvmi_libvirt.plan import (
    NO_GRANTS,
    Plan,
    grants_after,
    make_plan,
    touched_by,
)
from kvmi_libvirt.policy.adjust import adjust, merged
from kvmi_libvirt.policy.digest import digest
from kvmi_libvirt.policy.model import Mode, Policy, Rights, parse_source
from kvmi_libvirt.qemu.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.policy.limits import Ceiling
    from kvmi_libvirt.state import StateDir, VmState

logger = logging.getLogger(__name__)

OTHER_TOOL: Final = "OtherTool"
NOT_PROVEN: Final = "NotProven"
"""SessionError.kind when a policy is for another tool than the one that is there."""


def follow_policy(
    process: Process,
    uuid: str,
    policy: Policy,
    *,
    state: StateDir,
    keeps_adjusted: bool = False,
    ceiling: Ceiling | None = None,
) -> VmState:
    """Do :func:`change_vm`, and where that cannot be, take away what *policy* does not allow.

    So a policy that is only good for taking away is good for that. What it is raised for
    is raised all the same.
    """
    try:
        return change_vm(
            process, uuid, policy, state=state, keeps_adjusted=keeps_adjusted, ceiling=ceiling
        )
    except PlanError:
        lower_vm(process, uuid, policy, state=state)
        raise
    except SessionError as error:
        if error.kind in (OTHER_TOOL, NOT_PROVEN):
            lower_vm(process, uuid, policy, state=state)
        raise


def change_vm(
    process: Process,
    uuid: str,
    wanted: Policy | Callable[[VmState], Policy],
    *,
    state: StateDir,
    by_hand: bool = True,
    keeps_adjusted: bool = False,
    ceiling: Ceiling | None = None,
) -> VmState:
    """Move the rights of a hooked VM from what is in force to what *wanted* says.

    Disallows first, then allows, in the fewest ioctls; a right that stays is never
    interrupted. The channel stays: a policy that names another tool is refused, since
    the one that is there would get the other's rights.

    Parameters
        process  identified by the caller; borrowed
        uuid     the domain's
        wanted   a policy, or what makes one of what is recorded now: the latter is a
                 change by hand, which the VM keeps while its policy stays the same
        by_hand  False: such a change is not kept
        keeps_adjusted  what was changed by hand on top of this very policy is kept
        ceiling  what is kept may not go above it
    Returns
        the recorded state, with what is in force now
    Raises
        SessionError  not hooked, another tool, or a step failed; then the steps before
                      it are in force, and recorded
        PlanError     the kernel lacks what the policy demands; nothing was changed
    """
    with state.locked(uuid, deadline=time.monotonic() + LOCK_S):
        recorded = state.load(uuid)
        if (
            recorded is None
            or recorded.state != st.HOOKED
            or not is_same_process(recorded, process)
        ):
            name = uuid if recorded is None else recorded.domain
            text = f"domain '{name}' is not hooked; 'kvmi-libvirt hook' hooks it"
            raise SessionError(text, exit_code=ExitCode.TARGET)
        if is_closed(recorded):
            text = f"domain '{recorded.domain}': the tool has closed its channel; hook it anew"
            raise SessionError(text, exit_code=ExitCode.HANDSHAKE)
        adjusted: tuple[str, ...] = ()
        if callable(wanted):
            policy = wanted(recorded)
        else:
            adjusted = _kept(process, uuid, wanted, state) if keeps_adjusted else ()
            policy = adjust(wanted, adjusted, ceiling)
        if recorded.source != policy.source.describe():
            raise SessionError(
                f"the policy names the tool at {policy.source.describe()}, but domain "
                f"'{recorded.domain}' is hooked by {recorded.source}; unhook it, then hook it",
                kind=OTHER_TOOL,
                exit_code=ExitCode.FAILED,
            )
        _require_proven(recorded, policy)
        abi = abi_of(recorded)
        before, unsure = grants_in_force(recorded, abi), grants_unsure(recorded)
        plan = make_plan(policy, abi, before, unsure=unsure)
        tell_what_is_left_out(recorded.domain, policy, abi)
        done = len(plan.steps)
        failure: SessionError | None = None
        if plan.steps:
            process.require_traceable()
            fds = process.vm_fds(allow_standin=True)
            deadline = time.monotonic() + SESSION_S
            # Should nobody live to tell how far it came, the next change starts from that.
            unsure = touched_by(plan, unsure)
            state.save(with_unsure(recorded, unsure))
            try:
                worker.run(
                    lambda: session.change(process, fds.vm, plan, deadline=deadline),
                    deadline=deadline,
                    keep_fds=process.owned_fds,
                )
            except SessionError as error:
                done, failure = len(error.applied), error
        after = grants_after(Plan(abi=abi, steps=plan.steps[:done]), before)
        unsure = unsure if failure is not None else NO_GRANTS
        record = dataclasses.replace(
            with_unsure(with_grants(recorded, after, abi), unsure),
            mode=policy.mode.value,
            error=None if failure is None else f"changing its rights failed half way: {failure}",
        )
        if callable(wanted):
            record = _adjusted(record, recorded) if by_hand else record
        elif failure is None:
            record = dataclasses.replace(
                record,
                policy=digest(wanted),
                adjusted=adjusted,
                unhook_s=math.ceil(wanted.unhook_timeout_s),
            )
        if plan.steps or record != recorded:
            state.save(record)
        if failure is not None:
            raise failure
        if plan.steps:
            logger.info(
                "domain %s: rights changed, %d steps",
                *(record.domain, len(plan.steps)),
                extra={"event": "changed"},
            )
        return record


def _adjusted(record: VmState, before: VmState) -> VmState:
    now, then = ({*some.commands, *some.events} for some in (record, before))
    adjusted = merged(before.adjusted, added=now - then, removed=then - now)
    return dataclasses.replace(record, adjusted=adjusted)


def lower_vm(process: Process, uuid: str, limit: Ceiling | Policy, *, state: StateDir) -> VmState:
    """Take what is above *limit* from a hooked VM; allow nothing, and end nothing.

    For when its policy cannot be carried out: what the limit does not allow goes all
    the same. The record keeps the policy that it tells of.

    Returns
        the recorded state, with what is in force now
    Raises
        SessionError  as :func:`change_vm`
    """

    def lowered(recorded: VmState) -> Policy:
        def within(names: tuple[str, ...], kind: str, most: Rights) -> Rights:
            kept = frozenset(names) & most.allowed
            everything = kind in recorded.all_ids and most.everything
            return Rights(allowed=kept, optional=kept, everything=everything)

        return Policy(
            mode=Mode(recorded.mode),
            source=parse_source(recorded.source or ""),
            commands=within(recorded.commands, "commands", limit.commands),
            events=within(recorded.events, "events", limit.events),
        )

    return change_vm(process, uuid, lowered, state=state, by_hand=False)


def _require_proven(recorded: VmState, policy: Policy) -> None:
    # The tool was asked when it was hooked, and cannot be asked again on this channel.
    if policy.secret in (None, recorded.secret):
        return
    proven = "none" if recorded.secret is None else f"'{recorded.secret}'"
    raise SessionError(
        f"the policy asks for the secret '{policy.secret}', but the tool of domain "
        f"'{recorded.domain}' was asked for {proven} when it was hooked; unhook it, then hook it",
        kind=NOT_PROVEN,
        exit_code=ExitCode.FAILED,
    )
