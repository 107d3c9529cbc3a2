# SPDX-License-Identifier: Apache-2.0
"""Which rights a set of rules amounts to."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.abi.revisions import ALL_COMMANDS, ALL_EVENTS, ALWAYS_ALLOWED
from kvmi_libvirt.errors import PolicyValueError
from kvmi_libvirt.policy.findings import Finding, Severity
from kvmi_libvirt.policy.model import Rights
from kvmi_libvirt.policy.rules import (
    COMMANDS,
    EVENTS,
    Action,
    Rule,
    Vocabulary,
    canonical,
    unknown_name,
    weigh,
)

READ = "KVMI_VM_READ_PHYSICAL"
WRITE = "KVMI_VM_WRITE_PHYSICAL"
GRANTABLE = ALL_COMMANDS - ALWAYS_ALLOWED


def allow(name: str, *, optional: bool = False, line: int | None = None) -> Rule:
    return Rule(action=Action.ALLOW, name=name, optional=optional, line=line)


def deny(name: str, *, line: int | None = None) -> Rule:
    return Rule(action=Action.DENY, name=name, line=line)


def group(action: Action, *, line: int | None = None, is_base: bool = False) -> Rule:
    return Rule(action=action, group="memory-read", line=line, is_base=is_base)


def weighed(*rules: Rule, default_allow: bool = False) -> Rights:
    return weigh(rules, COMMANDS, default_allow=default_allow)[0]


def found(*rules: Rule, default_allow: bool = False) -> list[Finding]:
    return weigh(rules, COMMANDS, default_allow=default_allow)[1]


def test_nothing_is_allowed_by_default() -> None:
    assert weighed() == Rights()


def test_default_deny_allows_what_is_named() -> None:
    assert weighed(allow(READ)) == Rights(allowed=frozenset({READ}))


def test_default_allow_without_any_deny_is_everything() -> None:
    rights = weighed(default_allow=True)
    assert rights == Rights(allowed=GRANTABLE, optional=GRANTABLE, everything=True)


def test_default_allow_with_a_deny_is_all_other_names_and_not_everything() -> None:
    rights = weighed(deny(WRITE), default_allow=True)
    assert rights == Rights(allowed=GRANTABLE - {WRITE}, optional=GRANTABLE - {WRITE})


def test_default_allow_demands_only_what_is_named() -> None:
    rights = weighed(allow(READ), default_allow=True)
    assert rights.everything
    assert rights.demanded == {READ}


def test_denying_an_unnamed_right_still_takes_everything_away() -> None:
    # SET_VE_INFO is a command of v7 only: on another kernel nothing is left to deny,
    # but what such a kernel has in its place was not meant to be granted either.
    assert not weighed(deny("KVMI_VCPU_SET_VE_INFO"), default_allow=True).everything


@pytest.mark.parametrize("default_allow", [True, False])
def test_deny_beats_allow_whatever_the_order(default_allow: bool) -> None:
    rules = (allow(READ), deny(WRITE), allow(WRITE), allow(WRITE, optional=True))
    results = {
        weighed(*order, default_allow=default_allow) for order in itertools.permutations(rules)
    }
    assert len(results) == 1
    (rights,) = results
    assert READ in rights.demanded
    assert WRITE not in rights.allowed | rights.optional


def test_plain_allow_beats_optional_allow() -> None:
    for order in itertools.permutations((allow(READ), allow(READ, optional=True))):
        assert weighed(*order) == Rights(allowed=frozenset({READ}))


def test_optional_allow_is_tolerated() -> None:
    rights = weighed(allow(READ, optional=True))
    assert rights == Rights(allowed=frozenset({READ}), optional=frozenset({READ}))


@given(st.sampled_from(sorted(ALL_COMMANDS | ALL_EVENTS)), st.data())
def test_names_may_be_written_in_any_case_with_or_without_prefix(
    name: str, data: st.DataObject
) -> None:
    written = name[len("KVMI_") :] if data.draw(st.booleans()) else name
    mixed = "".join(data.draw(st.sampled_from((c.lower(), c.upper()))) for c in written)
    vocabulary = COMMANDS if name in ALL_COMMANDS else EVENTS
    assert canonical(mixed, vocabulary) == name


@pytest.mark.parametrize(
    "name", ["KVM\u0131_VM_GET_INFO", "VM_GET_\u0131NFO", "", "KVMI_", "kvmi_kvmi_vm_get_info"]
)
def test_names_that_only_look_like_names_are_unknown(name: str) -> None:
    assert canonical(name, COMMANDS) is None


def test_commands_and_events_share_no_name() -> None:
    # Else "move the rule" would be wrong advice.
    assert not ALL_COMMANDS & ALL_EVENTS


@pytest.mark.parametrize(
    ("name", "vocabulary", "message"),
    [
        (
            "vm_read_phys",
            COMMANDS,
            'unknown command "vm_read_phys"; did you mean KVMI_VM_READ_PHYSICAL?',
        ),
        (
            "BREAKPOINT",
            EVENTS,
            'unknown event "BREAKPOINT"; did you mean KVMI_VCPU_EVENT_BREAKPOINT?',
        ),
        ("zzz", EVENTS, "unknown event \"zzz\"; 'kvmi-libvirt names' lists every event"),
        ("vcpu_event_pf", COMMANDS, "KVMI_VCPU_EVENT_PF is no command; move the rule to <events>"),
        ("vm_get_info", EVENTS, "KVMI_VM_GET_INFO is no event; move the rule to <commands>"),
        ("cr", EVENTS, 'unknown event "cr"; did you mean KVMI_VCPU_EVENT_CR?'),
        ("pause", COMMANDS, 'unknown command "pause"; did you mean KVMI_VM_PAUSE_VCPU?'),
        ("vcpu", COMMANDS, "unknown command \"vcpu\"; 'kvmi-libvirt names' lists every command"),
        ("Query", EVENTS, '"Query" is a group; write group="query" in place of name='),
        (
            "VCPU_EVENT_BREAKPIONT",
            COMMANDS,
            (
                'unknown command "VCPU_EVENT_BREAKPIONT"; did you mean the event '
                "KVMI_VCPU_EVENT_BREAKPOINT? write it in <events>"
            ),
        ),
        (
            "vm_read_physcal",
            EVENTS,
            (
                'unknown event "vm_read_physcal"; did you mean the command '
                "KVMI_VM_READ_PHYSICAL? write it in <commands>"
            ),
        ),
        (
            "vcpu_pause",
            COMMANDS,
            "KVMI_VCPU_PAUSE is what v7 calls KVMI_VM_PAUSE_VCPU; write that name",
        ),
        (
            "kvmi_event_pf",
            EVENTS,
            "KVMI_EVENT_PF is what v7 calls KVMI_VCPU_EVENT_PF; write that name",
        ),
    ],
)
def test_unknown_name_says_what_to_write(name: str, vocabulary: Vocabulary, message: str) -> None:
    assert unknown_name(name, vocabulary) == message


def test_unknown_name_is_an_error_with_its_line() -> None:
    (finding,) = found(allow("vm_read_phys", line=5))
    assert (finding.severity, finding.error, finding.line) == (Severity.ERROR, PolicyValueError, 5)


def test_suggestions_stop_after_a_hundred_mistakes() -> None:
    findings = found(*(allow(f"vm_read_phys{i}") for i in range(102)))
    assert ["did you mean" in finding.message for finding in findings] == [True] * 100 + [False] * 2


@pytest.mark.parametrize("name", sorted(ALWAYS_ALLOWED))
def test_denying_what_is_always_allowed_is_an_error(name: str) -> None:
    (finding,) = found(deny(name, line=3))
    assert (finding.severity, finding.error, finding.line) == (Severity.ERROR, PolicyValueError, 3)
    assert f"{name} cannot be denied" in finding.message


@pytest.mark.parametrize("name", sorted(ALWAYS_ALLOWED))
def test_allowing_what_is_always_allowed_changes_nothing_and_warns(name: str) -> None:
    assert weighed(allow(name)) == Rights()
    (finding,) = found(allow(name))
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize(
    ("rules", "line", "message"),
    [
        (
            (allow(READ, line=1), allow("vm_read_physical", line=2)),
            2,
            "has the same rule on line 1",
        ),
        ((deny(READ, line=1), deny(READ, line=2)), 2, "has the same rule on line 1"),
        ((allow(READ, line=1), deny(READ, line=2)), 1, "denied on line 2; deny wins"),
        ((deny(READ, line=1), allow(READ, line=2)), 2, "denied on line 1; deny wins"),
        (
            (allow(READ, optional=True, line=1), allow(READ, line=2)),
            1,
            "optional here but not on line 2",
        ),
        (
            (group(Action.DENY, line=1), group(Action.ALLOW, line=2)),
            2,
            "group memory-read is allowed here and denied on line 1; deny wins",
        ),
        (
            (group(Action.DENY, is_base=True), group(Action.ALLOW, line=2)),
            2,
            "denied by the profile; deny wins",
        ),
    ],
)
def test_pointless_rules_get_one_warning_each(
    rules: tuple[Rule, ...], line: int, message: str
) -> None:
    (finding,) = found(*rules)
    assert (finding.severity, finding.line) == (Severity.WARNING, line)
    assert message in finding.message


def test_taking_a_group_away_from_a_profile_is_no_reason_to_warn() -> None:
    assert found(group(Action.ALLOW, is_base=True), group(Action.DENY, line=2)) == []


def test_denying_what_the_default_denies_is_no_reason_to_warn() -> None:
    assert found(deny(WRITE), allow(READ)) == []
