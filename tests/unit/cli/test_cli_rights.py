# SPDX-License-Identifier: Apache-2.0
"""``allow`` and ``deny``: what names mean, what the ceiling leaves, what the plan is then."""

from __future__ import annotations

import pytest
import strategies
from hypothesis import given, settings

from kvmi_libvirt.abi.revisions import by_name
from kvmi_libvirt.cli.rights import Named, changed, read_names, within_ceiling
from kvmi_libvirt.errors import PolicyRefused, PolicyValueError, UnsupportedByKernel
from kvmi_libvirt.plan import grants_after, grants_of, holds_all_ids, make_plan, names_of
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.host import HostPolicy, parse_host_policy
from kvmi_libvirt.policy.model import NAMESPACE, Policy, parse_source
from kvmi_libvirt.state import HOOKED, VmState

V12, V11 = by_name("v12"), by_name("v11")
READ, WRITE, PAUSE = "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL", "KVMI_VM_PAUSE_VCPU"
TRAP = "KVMI_VCPU_EVENT_TRAP"


def state(*commands: str, events: tuple[str, ...] = (), all_ids: tuple[str, ...] = ()) -> VmState:
    return VmState(
        domain="web1",
        uuid="4dea22b3-1d52-d8f3-2516-782e98ab3fa0",
        pid=1,
        start_ticks=1,
        abi="v12",
        mode="required",
        state=HOOKED,
        source="unix:/run/kvmi/x",
        commands=commands,
        events=events,
        since="",
        error=None,
        socket_inode=1,
        all_ids=all_ids,
    )


def steps(before: VmState, named: Named, *, allow: bool) -> list[str]:
    current = grants_of(
        before.commands,
        before.events,
        V12,
        all_commands="commands" in before.all_ids,
        all_events="events" in before.all_ids,
    )
    plan = make_plan(changed(before, named, allow=allow), V12, current)
    return [step.describe().replace("KVM_INTROSPECTION_", "") for step in plan.steps]


def test_names_are_commands_events_and_groups_in_any_spelling() -> None:
    named = read_names(["vm_read_physical", TRAP.lower(), "memory-protect"])
    assert named.commands == {READ} | GROUPS["memory-protect"].commands
    assert named.events == {TRAP, "KVMI_VCPU_EVENT_PF"}
    assert READ not in named.tolerated
    assert named.tolerated == GROUPS["memory-protect"].commands | {"KVMI_VCPU_EVENT_PF"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vm_reed_physical", "did you mean KVMI_VM_READ_PHYSICAL"),
        ("vcpu_event_trab", "did you mean KVMI_VCPU_EVENT_TRAP"),
        ("get_version", "is always allowed"),
        ("breakpoint", 'group "breakpoint"; did you mean KVMI_VCPU_EVENT_BREAKPOINT'),
        ("memory-raed", 'group "memory-raed"; did you mean memory-read'),
        ("vcpu_pause", "is what v7 calls KVMI_VM_PAUSE_VCPU"),
        ("event_cr", "is what v7 calls KVMI_VCPU_EVENT_CR"),
        ("", "unknown command, event or group \"\"; 'kvmi-libvirt names' lists them all"),
    ],
)
def test_name_that_means_nothing_is_refused(name: str, reason: str) -> None:
    with pytest.raises(PolicyValueError, match=reason):
        read_names([name])


def test_allow_adds_one_step_and_deny_takes_one() -> None:
    assert steps(state(READ), Named(commands=frozenset({PAUSE})), allow=True) == [
        f"COMMAND allow 16 {PAUSE}"
    ]
    assert steps(state(READ, PAUSE), Named(commands=frozenset({PAUSE})), allow=False) == [
        f"COMMAND deny 16 {PAUSE}"
    ]


def test_what_holds_already_is_no_step() -> None:
    assert steps(state(READ), Named(commands=frozenset({READ})), allow=True) == []
    assert steps(state(READ), Named(commands=frozenset({WRITE})), allow=False) == []


def test_denying_one_of_everything_denies_what_has_no_name_too() -> None:
    names = tuple(c.name for c in V12.commands if not c.always_allowed)
    before = state(*names, all_ids=("commands",))
    done = steps(before, Named(commands=frozenset({WRITE})), allow=False)
    assert f"COMMAND deny 14 {WRITE}" in done
    assert "COMMAND deny 22 (no name)" in done
    assert not any("allow" in step for step in done)


def test_allowing_an_event_leaves_all_commands_alone() -> None:
    names = tuple(c.name for c in V12.commands if not c.always_allowed)
    before = state(*names, all_ids=("commands",))
    assert steps(before, Named(events=frozenset({TRAP})), allow=True) == [f"EVENT allow 9 {TRAP}"]


def test_name_the_kernel_lacks_is_refused_but_not_one_of_a_group() -> None:
    with pytest.raises(UnsupportedByKernel):
        steps(state(), read_names(["VM_GET_MAX_GFN"]), allow=True)
    assert steps(state(), read_names(["query"]), allow=True)


CEILING = f"""<host-policy xmlns="{NAMESPACE}"><ceiling{{}}><commands>
<allow group="memory-read"/></commands></ceiling></host-policy>"""


def host(attributes: str = "") -> HostPolicy:
    return parse_host_policy(CEILING.format(attributes).encode(), source="hp.xml")


def test_nothing_above_the_ceiling_is_ever_allowed() -> None:
    named = Named(commands=frozenset({READ, WRITE}), events=frozenset({TRAP}))
    with pytest.raises(PolicyRefused, match=f"{TRAP}, {WRITE}: above this host's ceiling"):
        within_ceiling(named, host())
    assert within_ceiling(named, host(' excess="trim"')) == Named(commands=frozenset({READ}))
    with pytest.raises(PolicyRefused, match="not granted"):
        within_ceiling(Named(commands=frozenset({WRITE})), host(' excess="trim"'))
    assert within_ceiling(named, HostPolicy()) == named


@given(strategies.policies())
@settings(deadline=None)
def test_source_is_told_in_a_form_that_can_be_read_back(policy: Policy) -> None:
    assert parse_source(policy.source.describe()) == policy.source


@pytest.mark.parametrize("text", ["", "unix:", "unix:x", "vsock:1", "tcp:x", "pipe:/x", "tcp:a:b"])
def test_other_texts_are_no_source(text: str) -> None:
    with pytest.raises(PolicyValueError):
        parse_source(text)


@given(strategies.policies())
@settings(deadline=None)
def test_what_is_recorded_leads_back_to_what_was_granted(policy: Policy) -> None:
    for one in (V12, V11, by_name("v7"), by_name("v11-or-v12")):
        try:
            plan = make_plan(policy, one, None)
        except UnsupportedByKernel:
            continue
        grants = grants_after(plan, None)
        commands, events = names_of(grants, one)
        all_commands, all_events = holds_all_ids(grants, one)
        assert grants == grants_of(
            commands, events, one, all_commands=all_commands, all_events=all_events
        )
