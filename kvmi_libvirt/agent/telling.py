# SPDX-License-Identifier: Apache-2.0
"""What the agent's log says about its VMs: one line an event.

A VM that requires introspection and is without it is an error, one that does not a
warning.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import state as st

if TYPE_CHECKING:
    from kvmi_libvirt.agent.jobs import Outcome
    from kvmi_libvirt.agent.vm import Vm
    from kvmi_libvirt.state import VmState

logger = logging.getLogger(__name__)

TOOL_LEFT: Final = "the tool has closed its channel"


def fields_of(vm: Vm, event: str = "") -> dict[str, str]:
    """Return the fields that a line about *vm* carries."""
    return {"domain": vm.name, "uuid": vm.uuid, "event": event}


def tell_outcome(vm: Vm, before: VmState | None, error: str | None, outcome: Outcome) -> None:
    """Say what a job made of *vm*; the tenth failure for the same reason is not said.

    Parameters
        before, error  what was known of the VM until then
    """
    record = vm.record
    if outcome.stall_us:
        return  # hooked, and told with what it cost
    is_same = (before and before.state) == (record and record.state)
    if is_same and outcome.error in (None, error):
        return
    state = "not known" if record is None else record.state
    line = f"domain {vm.name}: {state}"
    problem = outcome.error
    if record is not None and record.state == st.HOOKED:
        line += f" by {record.source}, {len(record.commands)} commands"
        line += f" and {len(record.events)} events allowed"
    elif record is not None:
        problem = problem or record.error
    elif problem is None:
        return
    level = logging.INFO
    if problem is not None or state in (st.FAILED, st.WAITING):
        level = _level_without(record)
    if problem is not None:
        line += f": {problem}"
    logger.log(level, "%s", line, extra=fields_of(vm, state.replace(" ", "-")))


def tell_departure(vm: Vm, record: VmState) -> None:
    """Say that the tool of *vm*, hooked as *record* says, has gone."""
    line = f"domain {vm.name}: {TOOL_LEFT}"
    logger.log(_level_without(record), "%s", line, extra=fields_of(vm, "left"))


def tell_asked(vm: Vm, seconds: int) -> None:
    """Say that the tool of *vm* was asked to let go."""
    line = f"domain {vm.name}: its tool was asked to let go, and has {seconds} s"
    logger.info("%s", line, extra=fields_of(vm, "asked-to-leave"))


def tell_vcpus(vm: Vm, error: str) -> None:
    """Say that *vm* has vCPUs that are not watched."""
    logger.error("domain %s: %s", vm.name, error, extra=fields_of(vm, "vcpu-added"))


def _level_without(record: VmState | None) -> int:
    return logging.ERROR if record is not None and record.mode == "required" else logging.WARNING
