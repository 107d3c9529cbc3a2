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
