# SPDX-License-Identifier: Apache-2.0
"""What is written down about a VM, and what follows from it."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import state as st
from kvmi_libvirt.abi import revisions
from kvmi_libvirt.abi.kvmi import KvmiAbi
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import (
    SessionError,
    StateError,
)
from kvmi_libvirt.plan import (
    Grants,
    grants_of,
    holds_all_ids,
    names_of,
)
from kvmi_libvirt.policy.digest import digest
from kvmi_libvirt.policy.model import Policy
from kvmi_libvirt.qemu.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.state import StateDir, VmState

logger = logging.getLogger(__name__)

LOCK_S: Final = 5.0


def load_record(state: StateDir, uuid: str) -> VmState | None:
    """Return what is recorded about the VM *uuid*, None for nothing or a damaged record."""
    # A damaged record is no reason to fail: HOOK itself says if the VM is hooked.
    try:
        return state.load(uuid)
    except StateError as error:
        logger.warning("%s", error)
        return None


def abi_of(recorded: VmState) -> KvmiAbi:
    """Return the revision a VM was hooked with. Raises StateError for an unknown one."""
    try:
        return revisions.by_name(recorded.abi or V12.name)
    except KeyError:
        raise StateError(
            f"the record of domain '{recorded.domain}' names an unknown revision {recorded.abi!r}"
        ) from None


def is_same_process(recorded: VmState, process: Process) -> bool:
    """Say whether *recorded* is about this very process, not an earlier one."""
    return (recorded.pid, recorded.start_ticks) == (process.pid, process.start_ticks)


OVERTAKEN: Final = "Overtaken"
"""SessionError.kind when what was decided on is not so any more; nothing was touched."""


def require_still(
    process: Process, uuid: str, state: StateDir, still: Callable[[VmState | None], bool] | None
) -> None:
    """Ask *still* whether what is recorded now is what was decided on. Hold the VM's lock.

    Raises
        SessionError  of kind OVERTAKEN: it is not
    """
    if still is None:
        return
    recorded = load_record(state, uuid)
    if recorded is not None and not is_same_process(recorded, process):
        recorded = None
    if not still(recorded):
        raise SessionError("somebody else changed the VM meanwhile", kind=OVERTAKEN)


def new_record(
    process: Process,
    domain: Domain,
    policy: Policy,
    *,
    state: str,
    abi: str | None = None,
    error: str | None = None,
) -> VmState:
    """Return a record of the VM in *process* in *state*, without any rights."""
    return st.VmState(
        domain=domain.name,
        uuid=domain.uuid,
        pid=process.pid,
        start_ticks=process.start_ticks,
        abi=abi,
        mode=policy.mode.value,
        state=state,
        source=policy.source.describe(),
        commands=(),
        events=(),
        since=st.now_text(),
        error=error,
        socket_inode=0,
        policy=digest(policy),
        secret=policy.secret,
        unhook_s=math.ceil(policy.unhook_timeout_s),
    )


def with_grants(record: VmState, grants: Grants, abi: KvmiAbi) -> VmState:
    """Return *record* with the rights that *grants* amount to."""
    commands, events = names_of(grants, abi)
    kinds = zip(("commands", "events"), holds_all_ids(grants, abi), strict=True)
    all_ids = tuple(kind for kind, holds in kinds if holds)
    return dataclasses.replace(record, commands=commands, events=events, all_ids=all_ids)


def grants_in_force(record: VmState, abi: KvmiAbi) -> Grants:
    """Return the grants that *record* says are in force."""
    return grants_of(
        record.commands,
        record.events,
        abi,
        all_commands="commands" in record.all_ids,
        all_events="events" in record.all_ids,
    )


def grants_unsure(record: VmState) -> Grants:
    """Return the grants of which *record* cannot say whether they are in force."""
    return Grants(
        commands=frozenset(record.unsure_commands), events=frozenset(record.unsure_events)
    )


def with_unsure(record: VmState, unsure: Grants) -> VmState:
    """Return *record* with the grants of which nobody knows whether they are in force."""
    return dataclasses.replace(
        record,
        unsure_commands=tuple(sorted(unsure.commands)),
        unsure_events=tuple(sorted(unsure.events)),
    )
