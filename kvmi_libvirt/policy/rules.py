# SPDX-License-Identifier: Apache-2.0
"""Weigh allow and deny rules: names as written in, :class:`Rights` out.

Deny beats allow whatever the order, and a plain allow beats an optional one.
Pure; imports abi and errors.
"""

from __future__ import annotations

import difflib
import enum
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from kvmi_libvirt.abi.revisions import ALL_COMMANDS, ALL_EVENTS, ALWAYS_ALLOWED, REVISIONS
from kvmi_libvirt.errors import PolicyValueError
from kvmi_libvirt.policy.findings import Finding, Severity
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.model import Reason, Rights
from kvmi_libvirt.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_PREFIX: Final = "KVMI_"

_MAX_SUGGESTIONS: Final = 100
"""Looking for near misses costs milliseconds each; a document may have 100,000 rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The names one kind of rule may use.

    Parameters
        noun            "command" or "event"; the element's name is its plural
        names           canonical names, of any revision
        always_allowed  those among them that cannot be denied
        respelt         other names a kernel header uses -> (canonical name, revision)
    """

    noun: str
    names: frozenset[str]
    always_allowed: frozenset[str]
    respelt: Mapping[str, tuple[str, str]]


def _respelt(*, commands: bool, known: frozenset[str]) -> Mapping[str, tuple[str, str]]:
    found = {
        entry.kernel_name: (entry.name, abi.name)
        for abi in REVISIONS
        for entry in (abi.commands if commands else abi.events)
        if entry.kernel_name not in known
    }
    return MappingProxyType(found)


COMMANDS: Final = Vocabulary(
    noun="command",
    names=ALL_COMMANDS,
    always_allowed=ALWAYS_ALLOWED,
    respelt=_respelt(commands=True, known=ALL_COMMANDS),
)
EVENTS: Final = Vocabulary(
    noun="event",
    names=ALL_EVENTS,
    always_allowed=frozenset(),
    respelt=_respelt(commands=False, known=ALL_EVENTS),
)


class Action(enum.Enum):
    """What a rule does, spelt as its element."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule as written: a name in any case, with or without KVMI_, or a group.

    Parameters
        name    or None for a rule with a group
        group   or None for a rule with a name
        source  file or document it stands in, for explanations
        is_base  it is a profile's, to which others are added: nothing is said about it
    """

    action: Action
    name: str | None = None
    group: str | None = None
    optional: bool = False
    line: int | None = None
    source: str | None = None
    is_base: bool = False

    def written(self) -> str:
        """Return the rule as an element without prefix."""
        what = f'name="{self.name}"' if self.group is None else f'group="{self.group}"'
        return f"<{self.action.value} {what}>"


def canonical(name: str, vocabulary: Vocabulary) -> str | None:
    """Return the canonical spelling of *name*, or None when there is no such name."""
    full = _full(name)
    return full if full in vocabulary.names else None


def _full(name: str) -> str:
    # Case is folded for ASCII only: upper() turns some other letters into ASCII ones.
    upper = name.upper() if name.isascii() else name
    return upper if upper.startswith(_PREFIX) else _PREFIX + upper


def unknown_name(name: str, vocabulary: Vocabulary, *, suggest: bool = True) -> str:
    """Return why *name* is not in *vocabulary* and what to write instead."""
    full, noun = _full(name), vocabulary.noun
    other = EVENTS if vocabulary.noun == "command" else COMMANDS
    if full in other.names:
        return f"{full} is no {noun}; move the rule to <{other.noun}s>"
    if full in vocabulary.respelt:
        ours, revision = vocabulary.respelt[full]
        return f"{full} is what {revision} calls {ours}; write that name"
    if name.lower() in GROUPS:
        return f'{quoted(name)} is a group; write group="{name.lower()}" in place of name='
    if suggest:
        close, likeness = _closest(full, vocabulary)
        elsewhere, likeness_elsewhere = _closest(full, other)
        if likeness_elsewhere > likeness:
            move = f"write it in <{other.noun}s>"
            return (
                f"unknown {noun} {quoted(name)}; did you mean the {other.noun} {elsewhere}? {move}"
            )
        if likeness:
            return f"unknown {noun} {quoted(name)}; did you mean {close}?"
    return f"unknown {noun} {quoted(name)}; 'kvmi-libvirt names' lists every {noun}"


def unknown_right(name: str) -> str:
    """Return why *name*, given without saying of which kind, is nothing, and what to write."""
    full = _full(name)
    for vocabulary in (COMMANDS, EVENTS):
        if full in vocabulary.respelt:
            return unknown_name(name, vocabulary)
    for group in difflib.get_close_matches(name.lower(), GROUPS, n=1, cutoff=_ALIKE_GROUP):
        return f"unknown command, event or group {quoted(name)}; did you mean {group}?"
    close, likeness = max((_closest(full, v) for v in (COMMANDS, EVENTS)), key=lambda c: c[1])
    instead = f"did you mean {close}?" if likeness else "'kvmi-libvirt names' lists them all"
    return f"unknown command, event or group {quoted(name)}; {instead}"


_ALIKE: Final = 0.6
_ALIKE_GROUP: Final = 0.8
"""Names of groups are short, and few: others look like them by chance."""


def _closest(full: str, vocabulary: Vocabulary) -> tuple[str, float]:
    # The name most like this one, and how much: 0 for not at all, 1 for part of its words.
    bare = full[len(_PREFIX) :]
    names = sorted(vocabulary.names)
    within = [name for name in names if f"_{bare}_" in f"{name}_"]
    if len(within) == 1:
        return within[0], 1.0
    # Without the prefix, which would make every name look alike.
    ends = [name[len(_PREFIX) :] for name in names]
    for close in difflib.get_close_matches(bare, ends, n=1, cutoff=_ALIKE):
        return _PREFIX + close, difflib.SequenceMatcher(None, close, bare).ratio()
    return "", 0.0


def unknown_group(group: str, *, suggest: bool = True) -> str:
    """Return why *group* is none and what to write instead."""
    close = difflib.get_close_matches(group.lower(), GROUPS, n=1) if suggest else []
    if close:
        return f"unknown group {quoted(group)}; did you mean {close[0]}?"
    return f"unknown group {quoted(group)}; there are {', '.join(GROUPS)}"


def members(group: str, vocabulary: Vocabulary) -> frozenset[str]:
    """Return the names of *group* in *vocabulary*, the always allowed ones included."""
    known = GROUPS[group]
    return known.commands if vocabulary.noun == "command" else known.events


NOTHING_SAID: Final = Reason(rule="nothing allows it")


class _Atom(NamedTuple):
    # What one rule says about one name.
    action: Action
    optional: bool
    name: str


def weigh(
    rules: Sequence[Rule],
    vocabulary: Vocabulary,
    *,
    default_allow: bool,
    default_reason: Reason = NOTHING_SAID,
) -> tuple[Rights, list[Finding]]:
    """Return the rights that *rules* amount to, and what is wrong with them.

    The rights are to be used only when no finding is an error. They are
    ``everything`` only when the default is allow and nothing at all is denied.

    Parameters
        default_reason  what decides about names that no rule names
    """
    findings: list[tuple[Rule, Finding]] = []
    named: dict[_Atom, Rule] = {}
    grouped: dict[_Atom, Rule] = {}
    unknown_count = 0
    seen_groups: dict[tuple[Action, str], Rule] = {}
    for rule in rules:
        suggest = unknown_count < _MAX_SUGGESTIONS
        if rule.group is not None:
            problem = _group_problem(rule.group, vocabulary, suggest=suggest)
            if problem is not None:
                unknown_count += 1
                findings.append((rule, _error(rule, problem)))
                continue
            earlier = seen_groups.setdefault((rule.action, rule.group), rule)
            if earlier is not rule:
                if earlier.is_base == rule.is_base:
                    where = _line(earlier)
                    text = f"group {rule.group} has the same rule{where}; remove one of them"
                    findings.append((rule, _warning(rule, text)))
                continue
            for name in members(rule.group, vocabulary) - vocabulary.always_allowed:
                grouped.setdefault(_Atom(rule.action, True, name), rule)
            continue
        written = rule.name or ""
        name_or_none = canonical(written, vocabulary)
        if name_or_none is None:
            unknown_count += 1
            text = unknown_name(written, vocabulary, suggest=suggest)
            findings.append((rule, _error(rule, text)))
            continue
        atom = _Atom(rule.action, rule.optional, name_or_none)
        earlier = named.setdefault(atom, rule)
        if earlier is not rule:
            if earlier.is_base == rule.is_base:
                where = _line(earlier)
                text = f"{atom.name} has the same rule{where}; remove one of them"
                findings.append((rule, _warning(rule, text)))
        elif atom.name in vocabulary.always_allowed:
            findings.append((rule, _about_always_allowed(rule, atom.name)))
    findings += _contradictions(named, grouped)
    findings += _group_contradictions(seen_groups)
    rights = _rights(named, grouped, vocabulary, default_allow, default_reason)
    return rights, [finding for rule, finding in findings if not rule.is_base]


def _group_problem(group: str, vocabulary: Vocabulary, *, suggest: bool) -> str | None:
    if group not in GROUPS:
        return unknown_group(group, suggest=suggest)
    if not members(group, vocabulary):
        return f"group {group} has no {vocabulary.noun}s; remove the rule"
    return None


def _rights(
    named: Mapping[_Atom, Rule],
    grouped: Mapping[_Atom, Rule],
    vocabulary: Vocabulary,
    default_allow: bool,
    default_reason: Reason,
) -> Rights:
    atoms = {**grouped, **named}  # of two rules that say the same, the plainer explains
    denied = {atom.name for atom in atoms if atom.action is Action.DENY}
    plain = {atom.name for atom in atoms if atom.action is Action.ALLOW and not atom.optional}
    optional = {atom.name for atom in atoms if atom.action is Action.ALLOW and atom.optional}
    grantable = vocabulary.names - vocabulary.always_allowed - denied
    allowed = grantable if default_allow else grantable & (plain | optional)
    why = dict.fromkeys(vocabulary.names, default_reason)
    # The strongest last: deny, then a plain allow, then an optional one, then the default.
    for wanted in ((Action.ALLOW, True), (Action.ALLOW, False), (Action.DENY, False)):
        for atom, rule in (*grouped.items(), *named.items()):
            is_weak = atom.optional and atom.action is Action.ALLOW
            if (atom.action, is_weak) == wanted:
                why[atom.name] = _reason(rule)
    why.update(dict.fromkeys(vocabulary.always_allowed, _ALWAYS))
    return Rights(
        allowed=allowed,
        optional=allowed - plain,
        everything=default_allow and not denied,
        why=MappingProxyType(why),
    )


_ALWAYS: Final = Reason(rule="the kernel always allows it")


def _reason(rule: Rule) -> Reason:
    return Reason(rule=rule.written(), source=rule.source, line=rule.line)


def _contradictions(
    named: Mapping[_Atom, Rule], grouped: Mapping[_Atom, Rule]
) -> list[tuple[Rule, Finding]]:
    found = []
    for (action, optional, name), rule in named.items():
        if action is Action.DENY:
            continue
        deny = named.get(_Atom(Action.DENY, False, name))
        deny = deny or grouped.get(_Atom(Action.DENY, True, name))
        plain = named.get(_Atom(Action.ALLOW, False, name))
        if deny is not None:
            where = " by the profile" if deny.is_base else _line(deny)
            text = f"{name} is allowed here and denied{where}; deny wins, remove one of them"
            found.append((rule, _warning(rule, text)))
        elif optional and plain is not None and plain.is_base == rule.is_base:
            text = f"{name} is optional here but not{_line(plain)}; it is demanded, remove one"
            found.append((rule, _warning(rule, text)))
    return found


def _group_contradictions(
    groups: Mapping[tuple[Action, str], Rule],
) -> Iterator[tuple[Rule, Finding]]:
    for (action, group), rule in groups.items():
        deny = groups.get((Action.DENY, group))
        # Taking away from a profile is what a deny is for; the profile's own allow says nothing.
        if action is Action.ALLOW and deny is not None and not rule.is_base:
            where = " by the profile" if deny.is_base else _line(deny)
            text = f"group {group} is allowed here and denied{where}; deny wins, remove one of them"
            yield rule, _warning(rule, text)


def _about_always_allowed(rule: Rule, name: str) -> Finding:
    if rule.action is Action.DENY:
        text = f"{name} cannot be denied: the kernel always allows it; remove the rule"
        return _error(rule, text)
    return _warning(rule, f"{name} is always allowed; the rule has no effect, remove it")


def _line(rule: Rule) -> str:
    return "" if rule.line is None else f" on line {rule.line}"


def _error(rule: Rule, message: str) -> Finding:
    return Finding(message=message, line=rule.line, error=PolicyValueError)


def _warning(rule: Rule, message: str) -> Finding:
    return Finding(message=message, line=rule.line, severity=Severity.WARNING)
