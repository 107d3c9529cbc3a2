# SPDX-License-Identifier: Apache-2.0
"""Say of each command and event what a policy decides, by which rule, and on which kernel.

Pure; imports abi and policy.model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi.revisions import (
    ALL_COMMANDS,
    ALL_EVENTS,
    ALWAYS_ALLOWED,
    REVISIONS,
    candidates,
)
from kvmi_libvirt.policy.model import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.policy.model import Policy, Rights

ALLOWED: Final = "allowed"
DENIED: Final = "denied"
ALWAYS: Final = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What holds for one command or event.

    Parameters
        verdict    ALLOWED, DENIED, or ALWAYS for what no policy can deny
        optional   allowed, and a kernel without it is put up with
        reason     what decided
        in_kernel  whether the kernel has it; None when the kernel is not known, or does
                   not tell which id it has there, so that it is not granted
    """

    name: str
    verdict: str
    optional: bool
    reason: Reason
    in_kernel: bool | None


def explain(policy: Policy, abi: KvmiAbi | None) -> tuple[list[Decision], list[Decision]]:
    """Return a decision for every command and every event, in the order of the tables.

    Parameters
        policy  as the host permits it
        abi     the kernel's revision, None when it is not known
    """
    commands = [command.name for one in REVISIONS for command in one.commands]
    events = [event.name for one in REVISIONS for event in one.events]
    in_kernel = _in_kernel(abi)
    return (
        _decisions(commands, policy.commands, in_kernel),
        _decisions(events, policy.events, in_kernel),
    )


def _in_kernel(abi: KvmiAbi | None) -> Mapping[str, bool | None]:
    if abi is None:
        return {}
    known = {*abi.commands_by_name, *abi.events_by_name}
    possible = {
        name for one in candidates(abi) for name in (*one.commands_by_name, *one.events_by_name)
    }
    answers = {name: None if name in possible else False for name in ALL_COMMANDS | ALL_EVENTS}
    return {**answers, **dict.fromkeys(known, True)}


_UNSAID: Final = Reason(rule="no rule is known")


def _decisions(
    names: Iterable[str], rights: Rights, in_kernel: Mapping[str, bool | None]
) -> list[Decision]:
    found = []
    for name in dict.fromkeys(names):
        verdict = ALLOWED if name in rights.allowed else DENIED
        found.append(
            Decision(
                name=name,
                verdict=ALWAYS if name in ALWAYS_ALLOWED else verdict,
                optional=name in rights.optional,
                reason=rights.why.get(name, _UNSAID),
                in_kernel=in_kernel.get(name),
            )
        )
    return found


_NEEDS_EVENT: Final = {
    "KVMI_VM_PAUSE_VCPU": "KVMI_VCPU_EVENT_PAUSE",
    "KVMI_VCPU_INJECT_EXCEPTION": "KVMI_VCPU_EVENT_TRAP",
}
"""Commands that the kernel refuses where the event they cause is not allowed."""

_UNCONTROLLED: Final = frozenset(_NEEDS_EVENT.values())
"""Events that come of a command, and cannot be switched on or off."""

_OF_THE_VM: Final = frozenset(
    {"KVMI_VM_EVENT_UNHOOK", "KVMI_EVENT_CREATE_VCPU", "KVMI_EVENT_CMD_ERROR"}
)


def notes(policy: Policy) -> list[str]:
    """Return, in one line each, which rights of *policy* cannot be used without another.

    Source
        Documentation/virt/kvm/kvmi.rst of the patch series.
    """
    commands, events = policy.commands, policy.events
    found = [
        f"{command} is of no use without the event {event}, which is not allowed"
        for command, event in _NEEDS_EVENT.items()
        if command in commands.allowed and event not in events.allowed
    ]
    subjects = events.allowed - _UNCONTROLLED
    for names, switch in (
        (subjects & _OF_THE_VM, "KVMI_VM_CONTROL_EVENTS"),
        (subjects - _OF_THE_VM, "KVMI_VCPU_CONTROL_EVENTS"),
    ):
        if names and switch not in commands.allowed:
            is_or_are = "is" if len(names) == 1 else "are"
            listed = ", ".join(sorted(names))
            found.append(
                f"{listed} {is_or_are} of no use without the command {switch}, which is not allowed"
            )
    return found
