# SPDX-License-Identifier: Apache-2.0
"""Decide which policy a domain gets on this host.

An assignment of the host comes before the domain's own element; what either asks for
is held against the host's sockets and its ceiling. Imports errors.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmi_libvirt.errors import PolicyRefused
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.policy.findings import Finding, Severity
from kvmi_libvirt.policy.model import Reason, Rights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.facts import Identity
    from kvmi_libvirt.policy.limits import Ceiling, HostPolicy
    from kvmi_libvirt.policy.model import Policy


def decide(xml: bytes, host: HostPolicy, *, source: str) -> tuple[Domain, Policy | None]:
    """Return the domain that *xml* describes, and the policy it gets on *host*.

    Where the host assigns a policy the domain's own element is not even read, so that
    nothing in it can keep the assignment from its effect.

    Raises
        PolicyError  *xml* is no domain, its element counts and is wrong, or the host
                     refuses what is asked for.
    """
    if host.assignments:
        domain = parse_domain(xml, source=source, with_policy=False)
        if host.assignment(domain) is not None:
            return domain, resolve(domain, host)
    domain = parse_domain(xml, source=source)
    return domain, resolve(domain, host)


def decide_for(who: Identity, host: HostPolicy) -> Policy | None:
    """Return the policy *host* assigns to *who*, or None for no introspection.

    For a machine that has no domain XML, such as one of Proxmox VE, known by its VMID,
    its name or its UUID: without an element of its own it gets what the host assigns,
    and nothing else. Not for a libvirt domain, whose element may count: use decide().

    Raises
        PolicyRefused  the host assigns what it does not allow itself.
    """
    assigned = host.assignment(who)
    if assigned is None:
        return None
    return permit(assigned.policy, host, source=host.path or "host policy")


def resolve(domain: Domain, host: HostPolicy) -> Policy | None:
    """Return the policy *domain* gets on *host*, or None for no introspection.

    Raises
        PolicyRefused  the domain asks for something the host does not allow.
    """
    assigned = decide_for(domain, host)
    if assigned is not None or domain.policy is None:
        return assigned
    source = domain.origin or f"domain XML of {domain.name}"
    return permit(domain.policy, host, source=source)


def permit(policy: Policy, host: HostPolicy, *, source: str) -> Policy:
    """Return *policy* as *host* allows it: as it is, or cut down to the ceiling.

    Parameters
        source  of the policy, for messages
    Raises
        PolicyRefused  the host does not allow it; has the line where it was written.
    """
    for finding in refusals(policy, host):
        raise PolicyRefused(finding.message, source=source, line=finding.line)
    allowed = policy
    if host.ceiling is not None:
        allowed = trim(policy, host.ceiling, place=host.path)
    if host.kernel_abi is not None:
        allowed = replace(allowed, kernel_abi=host.kernel_abi)
    return allowed


def refusals(policy: Policy, host: HostPolicy) -> list[Finding]:
    """Return everything in *policy* that *host* does not allow."""
    found = []
    reason = host.refusal(policy.source)
    if reason is not None:
        found.append(Finding(message=reason, line=policy.source.line, error=PolicyRefused))
    if host.ceiling is not None and not host.ceiling.trim:
        found += _excesses(policy, host, "ask for less", Severity.ERROR)
    return found


def cuts(policy: Policy, host: HostPolicy) -> list[Finding]:
    """Return a warning for each kind of right that *host* cuts from *policy*."""
    if host.ceiling is None or not host.ceiling.trim:
        return []
    return list(_excesses(policy, host, "not granted here", Severity.WARNING))


def _excesses(policy: Policy, host: HostPolicy, then: str, severity: Severity) -> Iterator[Finding]:
    assert host.ceiling is not None
    for noun, asked, limit in _kinds(policy, host.ceiling):
        excess = asked.allowed - limit.allowed
        if excess or (asked.everything and not limit.everything):
            text, line = _excess(noun, asked, excess, policy, host)
            message = f"{text}; {then}"
            yield Finding(message=message, line=line, severity=severity, error=PolicyRefused)


def _kinds(policy: Policy, ceiling: Ceiling) -> tuple[tuple[str, Rights, Rights], ...]:
    return (
        ("command", policy.commands, ceiling.commands),
        ("event", policy.events, ceiling.events),
    )


_SHOWN = 4


def _excess(
    noun: str, asked: Rights, excess: frozenset[str], policy: Policy, host: HostPolicy
) -> tuple[str, int | None]:
    names = sorted(excess)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    listed = ", ".join(names[:_SHOWN]) + more if names else f"{noun}s without a name"
    line = None if host.ceiling is None else host.ceiling.line
    place = Reason(rule="", source=host.path, line=line).place()
    is_or_are = "is" if len(names) == 1 else "are"
    rules = (asked.why.get(name) for name in names)
    lines = [rule.line for rule in rules if rule and rule.line and rule.source == policy.origin]
    text = f"{listed} {is_or_are} above this host's ceiling ({place})"
    return text, min(lines, default=policy.line)


def trim(policy: Policy, ceiling: Ceiling, *, place: str | None = None) -> Policy:
    """Return *policy* without what is above *ceiling*; the policy itself when nothing is.

    Parameters
        place  file of the ceiling, for explanations
    """
    commands = trim_rights(policy.commands, ceiling.commands, ceiling, place=place)
    events = trim_rights(policy.events, ceiling.events, ceiling, place=place)
    if (commands, events) == (policy.commands, policy.events):
        return policy
    return replace(policy, commands=commands, events=events)


def trim_rights(asked: Rights, limit: Rights, ceiling: Ceiling, *, place: str | None) -> Rights:
    """Return what of *asked* is within *limit*."""
    cut = asked.allowed - limit.allowed
    why = dict(asked.why)
    for name in cut:
        decided = limit.why.get(name)
        told = f"cut by the ceiling: {decided.rule}" if decided else "cut by the ceiling"
        line = decided.line if decided and decided.source == place else ceiling.line
        why[name] = Reason(rule=told, source=place, line=line)
    return Rights(
        allowed=asked.allowed & limit.allowed,
        optional=asked.optional & limit.allowed,
        everything=asked.everything and limit.everything,
        cut=asked.cut | cut,
        why=MappingProxyType(why),
    )
