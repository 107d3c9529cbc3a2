# SPDX-License-Identifier: Apache-2.0
"""Read what the element, the host's policy and profiles have in common.

Elements come here after their shape was checked. Imports errors, lxml (types).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import PolicyError, PolicyValueError
from kvmi_libvirt.policy import rules
from kvmi_libvirt.policy.document import line_of
from kvmi_libvirt.policy.findings import Finding, Severity
from kvmi_libvirt.policy.model import (
    DEFAULT_HANDSHAKE_TIMEOUT_S,
    DEFAULT_RECONNECT_S,
    DEFAULT_UNHOOK_TIMEOUT_S,
    NAMESPACE,
    Mode,
    Policy,
    Reason,
    Rights,
    Source,
    TcpSource,
    UnixSource,
    VsockSource,
)
from kvmi_libvirt.policy.shape import split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lxml import etree

_KINDS: Final = (rules.COMMANDS, rules.EVENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    """The rules of one kind as written in one place.

    Parameters
        default  "allow", "deny", or None when it was left out
    """

    default: str | None
    rules: tuple[rules.Rule, ...]
    source: str | None
    line: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A named set of rules, ready to be a base.

    Parameters
        path  the file it is from
    """

    name: str
    title: str
    path: str
    commands: RuleSet | None
    events: RuleSet | None


def child(element: etree._Element, name: str) -> etree._Element | None:
    """Return *element*'s child *name* of our namespace, or None."""
    return element.find(f"{{{NAMESPACE}}}{name}")


def rule_set(element: etree._Element, kind: str, *, source: str | None) -> RuleSet | None:
    """Return what *element* holds in its <commands> or <events>, or None without one."""
    parent = child(element, kind)
    if parent is None:
        return None
    written = tuple(
        rules.Rule(
            action=rules.Action(split(rule)[1]),
            name=rule.get("name"),
            group=rule.get("group"),
            optional=rule.get("optional") == "yes",
            line=line_of(rule),
            source=source,
        )
        for rule in parent
    )
    return RuleSet(
        default=parent.get("default"), rules=written, source=source, line=line_of(parent)
    )


def weighed(
    element: etree._Element,
    vocabulary: rules.Vocabulary,
    base: Profile | None,
    findings: list[Finding],
    *,
    source: str | None,
) -> Rights:
    """Return the rights that *element*'s rules, added to *base*'s, amount to.

    A ``default`` in the element beats the base's; ``deny`` beats ``allow`` wherever
    either stands.
    """
    kind = f"{vocabulary.noun}s"
    findings += _demanded_groups(element, kind)
    own = rule_set(element, kind, source=source)
    below = None
    if base is not None:
        below = base.commands if vocabulary is rules.COMMANDS else base.events
    places = [found for found in (own, below) if found is not None]
    said = next((found for found in places if found.default is not None), None)
    if said is not None:
        reason = _default_reason(f'default="{said.default}" on <{kind}>', said)
    elif places:
        reason = _default_reason(f'default="deny", left out on <{kind}>', places[0])
    else:
        reason = Reason(rule=f"no <{kind}> in it", source=source, line=line_of(element))
    default_allow = said is not None and said.default == "allow"
    base_rules = [] if below is None else [replace(rule, is_base=True) for rule in below.rules]
    written = (*base_rules, *(() if own is None else own.rules))
    rights, found_here = rules.weigh(
        written, vocabulary, default_allow=default_allow, default_reason=reason
    )
    findings += found_here
    return rights


def _demanded_groups(element: etree._Element, kind: str) -> Iterator[Finding]:
    parent = child(element, kind)
    for rule in () if parent is None else parent:
        if rule.get("group") is not None and rule.get("optional") == "no":
            text = (
                "what a kernel lacks of a group is left out; to demand a right write it with "
                'name=, else remove optional="no"'
            )
            yield Finding(message=text, line=line_of(rule), error=PolicyValueError)


def _default_reason(rule: str, found: RuleSet) -> Reason:
    return Reason(rule=rule, source=found.source, line=found.line)


def read_content(
    element: etree._Element,
    findings: list[Finding],
    profiles: Callable[[str], Profile],
    *,
    source: str | None,
) -> Policy | None:
    """Return the policy that an <introspection> or <assign> element amounts to.

    Adds to *findings*; returns None when one of them is an error.
    """
    where = _source(element, findings)
    base = base_of(element, findings, profiles)
    commands = weighed(element, rules.COMMANDS, base, findings, source=source)
    events = weighed(element, rules.EVENTS, base, findings, source=source)
    if where is None or any(f.severity is Severity.ERROR for f in findings):
        return None
    handshake, unhook, secret = (child(element, n) for n in ("handshake", "unhook", "secret"))
    return Policy(
        mode=Mode(element.get("mode", Mode.OPTIONAL.value)),
        source=where,
        handshake_timeout_s=(
            DEFAULT_HANDSHAKE_TIMEOUT_S if handshake is None else float(handshake.attrib["timeout"])
        ),
        unhook_timeout_s=(
            DEFAULT_UNHOOK_TIMEOUT_S if unhook is None else float(unhook.attrib["timeout"])
        ),
        reconnect_s=_reconnect_s(element),
        early=element.get("early") == "yes",
        secret=None if secret is None else str(secret.attrib["name"]),
        commands=commands,
        events=events,
        profile=None if base is None else base.name,
        line=line_of(element),
        origin=source,
    )


def base_of(
    element: etree._Element, findings: list[Finding], profiles: Callable[[str], Profile]
) -> Profile | None:
    """Return the profile *element* names, or None; adds to *findings* what is wrong with it."""
    name = element.get("profile")
    if name is None:
        return None
    try:
        return profiles(name)
    except PolicyError as error:
        text = error.message if error.source is None else f"profile {name}: {error}"
        findings.append(Finding(message=text, line=line_of(element), error=type(error)))
        return None


def _source(element: etree._Element, findings: list[Finding]) -> Source | None:
    (source,) = element.iterchildren(f"{{{NAMESPACE}}}source")
    line = line_of(source)
    kind = source.attrib["type"]
    try:
        if kind == "unix":
            return UnixSource(path=str(source.attrib["path"]), line=line)
        port = int(source.attrib["port"])
        if kind == "vsock":
            return VsockSource(cid=int(source.attrib["cid"]), port=port, line=line)
        return TcpSource(host=str(source.attrib["host"]), port=port, line=line)
    except PolicyError as error:
        findings.append(Finding.of(error))
        return None


def _reconnect_s(element: etree._Element) -> float | None:
    reconnect = element.find(f"{{{NAMESPACE}}}source/{{{NAMESPACE}}}reconnect")
    if reconnect is None or reconnect.get("enabled") != "yes":
        return None
    return float(reconnect.get("timeout", DEFAULT_RECONNECT_S))
