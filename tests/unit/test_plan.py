# SPDX-License-Identifier: Apache-2.0
"""Plans: what they come to, and what is allowed at each of their steps."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import strategies
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvmi_libvirt.abi.kvmi import ALL_IDS, Ioctl, KvmiAbi
from kvmi_libvirt.abi.revisions import BY_NAME, REVISIONS, by_name
from kvmi_libvirt.errors import ExitCode, UnsupportedByKernel
from kvmi_libvirt.plan import (
    NO_GRANTS,
    Grants,
    Plan,
    Step,
    grants_after,
    make_plan,
    names_of,
    unhook_plan,
)
from kvmi_libvirt.policy.explain import ALLOWED, explain
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource

V12, V11, V7, DOUBT = map(by_name, ("v12", "v11", "v7", "v11-or-v12"))
READ, WRITE, PAUSE = "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL", "KVMI_VM_PAUSE_VCPU"
GFN, ACCESS = "KVMI_VM_GET_MAX_GFN", "KVMI_VM_SET_PAGE_ACCESS"
BREAKPOINT, UNHOOK = "KVMI_VCPU_EVENT_BREAKPOINT", "KVMI_VM_EVENT_UNHOOK"

abis = st.sampled_from(sorted(BY_NAME)).map(by_name)


def rights(*names: str, optional: tuple[str, ...] = (), everything: bool = False) -> Rights:
    return Rights(
        allowed=frozenset({*names, *optional}),
        optional=frozenset(optional),
        everything=everything,
    )


def policy(commands: Rights = Rights(), events: Rights = Rights()) -> Policy:  # noqa: B008
    source = UnixSource(path="/run/kvmi/x")
    return Policy(mode=Mode.OPTIONAL, source=source, commands=commands, events=events)


def described(plan: Plan) -> list[str]:
    return [step.describe().replace("KVM_INTROSPECTION_", "") for step in plan.steps]


def all_slots(abi: KvmiAbi) -> Grants:
    return Grants(
        commands=frozenset(range(abi.command_slots)) - abi.always_allowed_ids,
        events=frozenset(range(abi.event_slots)),
    )


def target(some: Policy, abi: KvmiAbi) -> Grants:
    # What a policy means on a kernel, said without the code under test.
    everything = all_slots(abi)
    return Grants(
        commands=everything.commands
        if some.commands.everything
        else frozenset(c.id for c in abi.commands if c.name in some.commands.allowed),
        events=everything.events
        if some.events.everything
        else frozenset(e.id for e in abi.events if e.name in some.events.allowed),
    )


def tolerant(some: Policy) -> Policy:
    def every(r: Rights) -> Rights:
        return Rights(allowed=r.allowed, optional=r.allowed, everything=r.everything)

    return Policy(
        mode=some.mode,
        source=some.source,
        commands=every(some.commands),
        events=every(some.events),
    )


tolerant_policies = strategies.policies().map(tolerant)


@st.composite
def states(draw: st.DrawFn, abi: KvmiAbi) -> Grants:
    everything = all_slots(abi)
    ids = (
        st.just(frozenset(possible))
        | st.frozensets(st.sampled_from(sorted(possible)))
        | st.frozensets(st.sampled_from(sorted(possible)), max_size=3)
        for possible in (everything.commands, everything.events)
    )
    commands, events = map(draw, ids)
    return Grants(commands=commands, events=events)


def test_hook_comes_first_then_commands_then_events_by_id() -> None:
    plan = make_plan(policy(rights(PAUSE, READ), rights(BREAKPOINT, UNHOOK)), V12, None)
    assert described(plan) == [
        "HOOK",
        f"COMMAND allow 12 {READ}",
        f"COMMAND allow 16 {PAUSE}",
        f"EVENT allow 0 {UNHOOK}",
        f"EVENT allow 5 {BREAKPOINT}",
    ]


def test_steps_carry_the_numbers_of_the_revision() -> None:
    hook, grant = make_plan(policy(rights(READ)), V7, None).steps
    assert hook == Step(ioctl=Ioctl.HOOK, request=0x4018AEFF)
    assert grant == Step(ioctl=Ioctl.COMMAND, request=0x4008AEFD, allow=1, id=17, name=READ)


def test_policy_that_allows_nothing_is_only_hooked() -> None:
    assert described(make_plan(policy(), V12, None)) == ["HOOK"]


def test_everything_is_granted_at_once_for_its_own_kind_only() -> None:
    plan = make_plan(policy(rights(READ), rights(everything=True)), V12, None)
    assert described(plan) == ["HOOK", f"COMMAND allow 12 {READ}", "EVENT allow -1 all"]


def test_name_that_only_another_revision_has_is_left_out_when_optional() -> None:
    plan = make_plan(policy(rights(READ, optional=(GFN,))), V12, None)
    assert described(plan) == ["HOOK", f"COMMAND allow 12 {READ}"]
    plan = make_plan(policy(rights(READ, optional=(GFN,))), V11, None)
    assert described(plan)[2] == f"COMMAND allow 20 {GFN}"


@pytest.mark.parametrize(
    ("some", "abi", "message"),
    [
        (
            policy(rights(GFN)),
            V12,
            f"KVMI v12 (October 2021) has no command {GFN}; remove",
        ),
        (
            policy(rights("KVMI_VM_CONTROL_CLEANUP"), rights("KVMI_EVENT_CPUID")),
            V12,
            "has no event KVMI_EVENT_CPUID;",
        ),
        (
            policy(rights(GFN, "KVMI_VCPU_SET_VE_INFO"), rights("KVMI_EVENT_CPUID")),
            V12,
            f"has no command KVMI_VCPU_SET_VE_INFO, {GFN}; KVMI v12 (October 2021) has no event ",
        ),
        (
            policy(rights(ACCESS)),
            DOUBT,
            f"the id of command {ACCESS} is not the same in v11 and v12,",
        ),
        (
            policy(rights(GFN)),
            DOUBT,
            f"the id of command {GFN} is not the same in v11 and v12,",
        ),
        (policy(rights("KVMI_VM_CONTROL_SPP")), DOUBT, "has no command KVMI_VM_CONTROL_SPP;"),
        (policy(rights(GFN, everything=True)), V12, f"has no command {GFN};"),
    ],
)
def test_kernel_without_what_is_demanded_is_refused(
    some: Policy, abi: KvmiAbi, message: str
) -> None:
    with pytest.raises(UnsupportedByKernel) as caught:
        make_plan(some, abi, None)
    assert message in str(caught.value)
    assert caught.value.exit_code is ExitCode.UNSUPPORTED


def test_kernel_in_doubt_is_granted_neither_of_the_two_ids() -> None:
    plan = make_plan(policy(rights(READ, optional=(GFN, ACCESS))), DOUBT, None)
    assert described(plan) == ["HOOK", f"COMMAND allow 12 {READ}"]


def test_kernel_in_doubt_can_still_be_granted_everything() -> None:
    # SET_PAGE_ACCESS has another id on v11 than on v12, but -1 means both.
    plan = make_plan(policy(rights(ACCESS, everything=True)), DOUBT, None)
    assert described(plan) == ["HOOK", "COMMAND allow -1 all"]


def test_change_takes_away_before_it_gives() -> None:
    plan = make_plan(
        policy(rights(READ, PAUSE), rights(UNHOOK)),
        V12,
        Grants(commands=frozenset({12, 14}), events=frozenset({5})),
    )
    assert described(plan) == [
        f"COMMAND deny 14 {WRITE}",
        f"EVENT deny 5 {BREAKPOINT}",
        f"COMMAND allow 16 {PAUSE}",
        f"EVENT allow 0 {UNHOOK}",
    ]


def test_change_to_the_same_is_no_step_at_all() -> None:
    same = policy(rights(READ), rights(everything=True))
    assert make_plan(same, V12, target(same, V12)).steps == ()


def test_taking_everything_away_is_one_step_a_kind() -> None:
    assert described(make_plan(policy(), V12, all_slots(V12))) == [
        "COMMAND deny -1 all",
        "EVENT deny -1 all",
    ]


def test_right_that_stays_is_not_interrupted_to_save_ioctls() -> None:
    plan = make_plan(policy(rights(READ)), V12, all_slots(V12))
    assert "COMMAND deny -1 all" not in described(plan)
    for length in range(len(plan.steps) + 1):
        part = Plan(abi=V12, steps=plan.steps[:length])
        assert 12 in grants_after(part, all_slots(V12)).commands


def test_commands_that_cannot_be_denied_are_not_even_if_recorded_as_allowed() -> None:
    recorded = Grants(commands=frozenset({2, 4, 6, 12}))
    plan = make_plan(policy(), V12, recorded)
    assert described(plan) == [f"COMMAND deny 12 {READ}"]


def test_ids_without_a_name_are_taken_away_too() -> None:
    # A kernel in doubt has something behind ids 20 and 22; granting all granted these.
    plan = make_plan(policy(rights(READ)), DOUBT, all_slots(DOUBT))
    assert "COMMAND deny 20 (no name)" in described(plan)
    assert "COMMAND deny 22 (no name)" in described(plan)


def test_unhook_is_one_step() -> None:
    plan = unhook_plan(V7)
    assert plan == Plan(abi=V7, steps=(Step(ioctl=Ioctl.UNHOOK, request=0xAEFB),))
    assert described(plan) == ["UNHOOK"]
    assert grants_after(plan, all_slots(V7)) == NO_GRANTS


def test_announcing_the_unhook_changes_no_right() -> None:
    step = Step(ioctl=Ioctl.PREUNHOOK, request=V12.request(Ioctl.PREUNHOOK))
    assert grants_after(Plan(abi=V12, steps=(step,)), all_slots(V12)) == all_slots(V12)


def test_model_refuses_what_the_kernel_refuses() -> None:
    hooked = make_plan(policy(rights(READ)), V12, None)
    with pytest.raises(ValueError, match="is hooked"):
        grants_after(hooked, NO_GRANTS)
    with pytest.raises(ValueError, match="not hooked"):
        grants_after(Plan(abi=V12, steps=hooked.steps[1:]), None)


def test_model_knows_that_always_allowed_commands_never_change() -> None:
    request = V12.request(Ioctl.COMMAND)
    steps = tuple(
        Step(ioctl=Ioctl.COMMAND, request=request, allow=1, id=id_) for id_ in (2, 4, 6, ALL_IDS)
    )
    assert grants_after(Plan(abi=V12, steps=steps[:3]), NO_GRANTS) == NO_GRANTS
    assert not grants_after(Plan(abi=V12, steps=steps), NO_GRANTS).commands & {2, 4, 6}


@given(tolerant_policies, abis)
def test_first_plan_ends_in_the_policy_and_never_goes_beyond(some: Policy, abi: KvmiAbi) -> None:
    plan = make_plan(some, abi, None)
    assert plan.steps[0].ioctl is Ioctl.HOOK
    assert grants_after(plan, None) == target(some, abi)
    for length in range(len(plan.steps)):
        now = grants_after(Plan(abi=abi, steps=plan.steps[:length]), None)
        assert now.commands <= target(some, abi).commands
        assert now.events <= target(some, abi).events


@given(st.data(), tolerant_policies, abis)
def test_no_beginning_of_a_change_allows_more_than_before_or_after(
    data: st.DataObject, some: Policy, abi: KvmiAbi
) -> None:
    old, new = data.draw(states(abi)), target(some, abi)
    plan = make_plan(some, abi, old)
    assert all(step.ioctl is not Ioctl.HOOK for step in plan.steps)
    assert grants_after(plan, old) == new
    for length in range(len(plan.steps) + 1):
        now = grants_after(Plan(abi=abi, steps=plan.steps[:length]), old)
        for was, is_now, will in (
            (old.commands, now.commands, new.commands),
            (old.events, now.events, new.events),
        ):
            assert is_now <= was | will
            assert is_now - was <= will
            assert is_now >= was & will  # what stays is never interrupted
            if is_now - was:
                assert is_now <= will  # nothing is given while something is yet to go


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
@given(old=tolerant_policies, new=tolerant_policies)
def test_on_the_way_from_policy_to_policy_no_more_is_ever_allowed_than_both(
    abi: KvmiAbi, old: Policy, new: Policy
) -> None:
    before, after = target(old, abi), target(new, abi)
    assert grants_after(make_plan(old, abi, None), None) == before
    plan = make_plan(new, abi, before)
    assert grants_after(plan, before) == after
    for length in range(len(plan.steps) + 1):
        now = grants_after(Plan(abi=abi, steps=plan.steps[:length]), before)
        assert now.commands <= before.commands | after.commands
        assert now.events <= before.events | after.events
        assert now.commands - before.commands <= after.commands
        assert now.events - before.events <= after.events


@given(st.data(), tolerant_policies, abis)
def test_changes_deny_before_they_allow_and_know_no_always_allowed_id(
    data: st.DataObject, some: Policy, abi: KvmiAbi
) -> None:
    current = data.draw(st.none() | states(abi))
    steps = make_plan(some, abi, current).steps
    grants = [step for step in steps if step.ioctl is not Ioctl.HOOK]
    order = [(step.allow == 1, step.ioctl is Ioctl.EVENT, step.id) for step in grants]
    assert order == sorted(order, key=lambda key: (key[0], key[1], key[2] or 0))
    for step in grants:
        if step.ioctl is Ioctl.COMMAND:
            assert step.id not in abi.always_allowed_ids


@given(st.data(), tolerant_policies, abis)
def test_all_at_once_is_granted_only_where_nothing_is_denied(
    data: st.DataObject, some: Policy, abi: KvmiAbi
) -> None:
    current = data.draw(st.none() | states(abi))
    for step in make_plan(some, abi, current).steps:
        if step.id == ALL_IDS and step.allow == 1:
            kind = some.commands if step.ioctl is Ioctl.COMMAND else some.events
            assert kind.everything


@given(st.data(), strategies.policies(), strategies.revisions().map(by_name))
def test_demands_are_refused_exactly_when_the_revision_lacks_them(
    data: st.DataObject, some: Policy, abi: KvmiAbi
) -> None:
    current = data.draw(st.none() | states(abi))
    lacking = (some.commands.demanded - abi.commands_by_name.keys()) | (
        some.events.demanded - abi.events_by_name.keys()
    )
    if lacking:
        with pytest.raises(UnsupportedByKernel) as caught:
            make_plan(some, abi, current)
        assert all(name in str(caught.value) for name in lacking)
    else:
        make_plan(some, abi, current)


@given(strategies.policies(), abis)
def test_explanation_says_yes_to_exactly_what_the_plan_grants(some: Policy, abi: KvmiAbi) -> None:
    try:
        plan = make_plan(some, abi, None)
    except UnsupportedByKernel:
        plan = make_plan(tolerant(some), abi, None)
    granted = names_of(grants_after(plan, None), abi)
    for decisions, names, everything in zip(
        explain(some, abi),
        granted,
        (some.commands.everything, some.events.everything),
        strict=True,
    ):
        said = {d.name for d in decisions if d.verdict == ALLOWED and d.in_kernel}
        assert said == set(names)
        doubted = {d.name for d in decisions if d.in_kernel is None}
        assert doubted == ({GFN, ACCESS} & {d.name for d in decisions} if abi is DOUBT else set())
        assert everything or not doubted & set(names)


@given(st.data(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_no_shorter_change_keeps_the_promises(
    data: st.DataObject,
    everything: bool,
) -> None:
    # Brute force over every sequence of ioctls on three events of a small kernel.
    small = _small_abi()
    old = data.draw(st.frozensets(st.integers(0, 2)))
    wanted = frozenset(range(3)) if everything else data.draw(st.frozensets(st.integers(0, 2)))
    names = [event.name for event in small.events if event.id in wanted]
    some = policy(events=rights(*names, everything=everything))
    plan = make_plan(some, small, Grants(events=old))
    moves = [(allow, id_) for allow in (0, 1) for id_ in (ALL_IDS, 0, 1, 2)]
    if not everything:
        moves.remove((1, ALL_IDS))
    assume(plan.steps)
    for length in range(len(plan.steps)):
        for sequence in itertools.product(moves, repeat=length):
            assert not _keeps_promises(sequence, old, wanted)


def _small_abi() -> KvmiAbi:
    events = tuple(dataclasses.replace(e, id=i) for i, e in enumerate(V12.events[:3]))
    return dataclasses.replace(V12, events=events, event_slots=3)


def _keeps_promises(
    sequence: tuple[tuple[int, int], ...], old: frozenset[int], wanted: frozenset[int]
) -> bool:
    now = old
    for allow, id_ in sequence:
        changed = frozenset(range(3)) if id_ == ALL_IDS else frozenset({id_})
        now = now | changed if allow else now - changed
        if not old & wanted <= now <= old | wanted:
            return False
    return now == wanted
