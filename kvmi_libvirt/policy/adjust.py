# SPDX-License-Identifier: Apache-2.0
"""What an operator changed by hand on a hooked VM, on top of its policy. Pure.

An adjustment is a canonical name behind "+" (allowed by hand) or "-" (denied by
hand). It lives as long as the policy it was made on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvmi_libvirt.policy import rules

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from kvmi_libvirt.policy.limits import Ceiling
    from kvmi_libvirt.policy.model import Policy, Rights


def merged(
    adjusted: Iterable[str], *, added: Collection[str], removed: Collection[str]
) -> tuple[str, ...]:
    """Return *adjusted* after a further change by hand: the later word counts."""
    words = {text[1:]: text[:1] for text in adjusted}
    words.update(dict.fromkeys(added, "+"))
    words.update(dict.fromkeys(removed, "-"))
    return tuple(sorted(f"{sign}{name}" for name, sign in words.items()))


def adjust(policy: Policy, adjusted: Iterable[str], ceiling: Ceiling | None) -> Policy:
    """Return *policy* with what was changed by hand, never above *ceiling*.

    What was added by hand is not demanded of the kernel: it had it when it was added,
    or never will.
    """
    words = tuple(adjusted)
    if not words:
        return policy
    added = frozenset(text[1:] for text in words if text[:1] == "+")
    removed = {text[1:] for text in words if text[:1] == "-"}
    commands = policy.commands, added & rules.COMMANDS.names
    events = policy.events, added & rules.EVENTS.names
    if ceiling is not None:
        commands = commands[0], commands[1] & ceiling.commands.allowed
        events = events[0], events[1] & ceiling.events.allowed
    return replace(policy, commands=_rights(*commands, removed), events=_rights(*events, removed))


def _rights(rights: Rights, added: frozenset[str], removed: set[str]) -> Rights:
    allowed = (rights.allowed | added) - removed
    optional = (rights.optional | (added - rights.allowed)) - removed
    everything = rights.everything and allowed >= rights.allowed
    return replace(rights, allowed=allowed, optional=optional, everything=everything, why={})
