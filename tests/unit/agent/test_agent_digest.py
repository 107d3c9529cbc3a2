# SPDX-License-Identifier: Apache-2.0
"""A policy's digest says whether it is the same one, and changes by hand stay in bounds."""

from __future__ import annotations

import dataclasses

import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as hs

from kvmi_libvirt.policy import rules
from kvmi_libvirt.policy.adjust import adjust, merged
from kvmi_libvirt.policy.digest import digest
from kvmi_libvirt.policy.limits import Ceiling
from kvmi_libvirt.policy.model import Mode, Policy, Reason, Rights, TcpSource, UnixSource

BASE = Policy(mode=Mode.OPTIONAL, source=UnixSource(path="/run/kvmi/tool.sock"))
INFO, READ = "KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL"


def rights(*names: str, **more: object) -> Rights:
    return Rights(allowed=frozenset(names), **more)  # type: ignore[arg-type]


DIFFERENT = {
    "mode": Mode.REQUIRED,
    "source": TcpSource(host="tool.example", port=1),
    "handshake_timeout_s": 4.0,
    "unhook_timeout_s": 61.0,
    "reconnect_s": 10.0,
    "secret": "db1",
    "commands": rights(INFO),
    "events": rights("KVMI_VM_EVENT_UNHOOK"),
    "kernel_abi": "v12",
    "early": True,
}


@settings(max_examples=50)
@given(hs.data(), strategies.policies())
def test_digests_are_equal_exactly_when_policies_are(data: hs.DataObject, first: Policy) -> None:
    field = data.draw(hs.sampled_from(sorted(DIFFERENT)))
    second = data.draw(
        strategies.policies()
        | hs.just(dataclasses.replace(first, line=1, origin="x", profile="observe"))
        | hs.just(dataclasses.replace(first, **{field: DIFFERENT[field]}))  # type: ignore[arg-type]
    )
    assert (digest(first) == digest(second)) == (first == second)


def test_every_field_that_counts_is_changed_below() -> None:
    compared = {field.name for field in dataclasses.fields(Policy) if field.compare}
    assert compared == set(DIFFERENT)


@pytest.mark.parametrize("field", DIFFERENT)
def test_each_field_that_counts_makes_another_digest(field: str) -> None:
    other = dataclasses.replace(BASE, **{field: DIFFERENT[field]})  # type: ignore[arg-type]
    assert digest(other) != digest(BASE)


def test_what_does_not_count_makes_none() -> None:
    told = Rights(why={INFO: Reason(rule="some")})
    other = dataclasses.replace(BASE, profile="observe", line=7, origin="x.xml", commands=told)
    assert digest(other) == digest(BASE)


@pytest.mark.parametrize(
    "some",
    [rights(INFO), rights(INFO, optional=frozenset({INFO})), rights(INFO, everything=True)],
)
def test_each_part_of_the_rights_counts(some: Rights) -> None:
    found = {
        digest(dataclasses.replace(BASE, commands=some)),
        digest(dataclasses.replace(BASE, events=some)),
        digest(BASE),
    }
    assert len(found) == 3


# -- by hand -----------------------------------------------------------------------------

NAMES = sorted(
    (rules.COMMANDS.names - rules.COMMANDS.always_allowed)
    | (rules.EVENTS.names - rules.EVENTS.always_allowed)
)
names = hs.sets(hs.sampled_from(NAMES))


@hs.composite
def ceilings(draw: hs.DrawFn) -> Ceiling:
    return Ceiling(
        commands=draw(strategies.rights(rules.COMMANDS)),
        events=draw(strategies.rights(rules.EVENTS)),
    )


@hs.composite
def words(draw: hs.DrawFn) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    for _ in range(draw(hs.integers(0, 3))):
        added = draw(names)
        found = merged(found, added=added, removed=draw(names) - added)
    return found


@settings(max_examples=50)
@given(strategies.policies(), words(), hs.none() | ceilings())
def test_what_is_added_by_hand_is_within_the_ceiling_and_what_is_denied_is_gone(
    policy: Policy, adjusted: tuple[str, ...], ceiling: Ceiling | None
) -> None:
    found = adjust(policy, adjusted, ceiling)
    for kind in ("commands", "events"):
        before, after = getattr(policy, kind), getattr(found, kind)
        denied = {word[1:] for word in adjusted if word.startswith("-")}
        added = {word[1:] for word in adjusted if word.startswith("+")}
        gained = after.allowed - before.allowed
        assert gained <= added
        if ceiling is not None:
            assert gained <= getattr(ceiling, kind).allowed
        assert not after.allowed & denied
        assert before.allowed - after.allowed <= denied
        # Nothing that was demanded of the kernel is demanded no longer, and nothing new is.
        assert after.demanded == before.demanded - denied
        assert not after.everything or before.everything
        if after.everything:
            assert not denied & before.allowed
    same = dataclasses.replace(found, commands=policy.commands, events=policy.events)
    assert same == policy


@settings(max_examples=30)
@given(strategies.policies(), hs.none() | ceilings())
def test_nothing_changed_by_hand_changes_nothing(policy: Policy, ceiling: Ceiling | None) -> None:
    assert adjust(policy, (), ceiling) == policy


@given(words(), names, names, hs.sampled_from(NAMES))
def test_the_last_word_counts(
    adjusted: tuple[str, ...], first: set[str], last: set[str], both: str
) -> None:
    first, last = first | {both}, last | {both}
    allowed = merged(merged(adjusted, added=(), removed=first), added=last, removed=())
    denied = merged(merged(adjusted, added=first, removed=()), added=(), removed=last)
    for name in first & last:
        assert f"+{name}" in allowed
        assert f"-{name}" not in allowed
        assert f"-{name}" in denied
    assert list(allowed) == sorted(allowed)
    assert len({word[1:] for word in allowed}) == len(allowed)


def test_everything_is_not_everything_when_something_is_denied() -> None:
    everything = Rights(
        allowed=rules.COMMANDS.names - rules.COMMANDS.always_allowed, everything=True
    )
    policy = dataclasses.replace(BASE, commands=everything)
    assert adjust(policy, (f"-{READ}",), None).commands.everything is False
    assert adjust(policy, (f"+{READ}",), None).commands.everything is True
    assert adjust(policy, ("-KVMI_VM_EVENT_UNHOOK",), None).commands.everything is True
