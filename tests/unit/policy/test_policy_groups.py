# SPDX-License-Identifier: Apache-2.0
"""Groups and profiles: what they hold, and how rules with them are weighed."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest

from kvmi_libvirt.abi.revisions import ALL_COMMANDS, ALL_EVENTS, ALWAYS_ALLOWED, REVISIONS
from kvmi_libvirt.errors import PolicyError, PolicyRefused, PolicyValueError
from kvmi_libvirt.plan import left_out, make_plan
from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.model import NAMESPACE, Policy
from kvmi_libvirt.policy.profile import SHIPPED, SHIPPED_DIRECTORY, Profiles

OWNER = os.geteuid()
SOURCE = '<source type="unix" path="/run/kvmi/x"/>'
READ, WRITE = "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL"


def policy(inner: str = "", attributes: str = "") -> Policy:
    xml = f'<introspection xmlns="{NAMESPACE}"{attributes}>{SOURCE}{inner}</introspection>'
    found = parse_document(xml.encode(), source="x.xml")
    assert found is not None
    return found


def commands(inner: str, attributes: str = "") -> frozenset[str]:
    return policy(f"<commands>{inner}</commands>", attributes).commands.allowed


def profile(name: str) -> Policy:
    return policy(attributes=f' profile="{name}"')


def test_groups_are_the_documented_ones() -> None:
    assert list(GROUPS) == [
        *("query", "memory-read", "memory-write", "memory-protect", "registers-read"),
        *("registers-write", "events-control", "vcpu-control"),
    ]


@pytest.mark.parametrize(("kind", "names"), [("commands", ALL_COMMANDS), ("events", ALL_EVENTS)])
def test_every_name_is_in_exactly_one_group(kind: str, names: frozenset[str]) -> None:
    held = Counter(name for group in GROUPS.values() for name in getattr(group, kind))
    assert held == dict.fromkeys(names, 1)


@pytest.mark.parametrize("name", GROUPS)
def test_group_is_its_grantable_members_and_demands_none(name: str) -> None:
    found = policy(f'<commands><allow group="{name}"/></commands>').commands
    assert found.allowed == GROUPS[name].commands - ALWAYS_ALLOWED
    assert found.demanded == frozenset()


def test_plan_leaves_out_what_of_a_group_the_kernel_lacks() -> None:
    some = profile("protect")
    for one in REVISIONS:
        granted = {step.name for step in make_plan(some, one, None).steps if step.name}
        missing = left_out(some, one)
        known = one.commands_by_name.keys() | one.events_by_name.keys()
        assert granted == (some.commands.allowed | some.events.allowed) & known
        assert missing[0] | missing[1] == (some.commands.allowed | some.events.allowed) - known


def test_deny_beats_allow_for_groups_and_names_whatever_the_order() -> None:
    rules = (
        *('<allow group="memory-read"/>', f'<deny name="{READ}"/>', f'<allow name="{WRITE}"/>'),
        '<deny group="memory-write"/>',
    )
    for order in itertools.permutations(rules):
        assert commands("".join(order)) == GROUPS["memory-read"].commands - {READ}


def test_name_beside_its_group_is_demanded() -> None:
    both = policy(
        f'<commands><allow group="memory-read"/><allow name="{READ}"/></commands>'
    ).commands
    assert both.demanded == {READ}
    assert both.why[READ].rule == f'<allow name="{READ}">'


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_is_a_policy_for_every_kernel(name: str) -> None:
    some = profile(name)
    assert some.profile == name
    for abi in REVISIONS:
        assert make_plan(some, abi, None).steps


def test_observe_can_neither_change_nor_stop_the_guest() -> None:
    some = profile("observe")
    changing = ("memory-write", "memory-protect", "registers-write", "vcpu-control")
    assert not some.commands.allowed & {n for g in changing for n in GROUPS[g].commands}
    assert some.events.allowed == {"KVMI_VM_EVENT_UNHOOK"}  # a vCPU's event stops that vCPU


def test_full_is_everything_and_contains_the_others() -> None:
    full = profile("full")
    assert full.commands.everything
    assert full.events.everything
    assert profile("observe").commands.allowed < profile("debug").commands.allowed
    assert profile("observe").commands.allowed < profile("protect").commands.allowed


def test_own_rules_are_added_to_the_profile_and_its_denies_hold() -> None:
    base = profile("observe").commands.allowed
    assert commands('<allow name="KVMI_VM_PAUSE_VCPU"/>', ' profile="observe"') == base | {
        "KVMI_VM_PAUSE_VCPU"
    }
    assert commands(f'<deny name="{READ}"/>', ' profile="observe"') == base - {READ}


def test_own_default_beats_the_profiles() -> None:
    narrowed = policy('<commands default="deny"/>', ' profile="full"')
    assert narrowed.commands.allowed == frozenset()
    assert narrowed.events.everything
    assert policy("<commands/>", ' profile="full"').commands.everything
    assert policy('<commands default="allow"/>', ' profile="observe"').commands.everything


def test_reason_names_file_and_line_of_the_rule_that_decided() -> None:
    some = policy(f'\n<commands>\n<deny name="{READ}"/></commands>', ' profile="observe"')
    why = some.commands.why
    assert why[READ].place() == "x.xml:3"
    path = str(SHIPPED_DIRECTORY / "observe.xml")
    assert why["KVMI_VCPU_GET_CPUID"].source == path
    assert why["KVMI_VCPU_GET_CPUID"].rule == '<allow group="query">'
    assert why[WRITE].rule == 'default="deny", left out on <commands>'
    assert set(why) == ALL_COMMANDS


def own(directory: Path, name: str, text: str = '<commands default="allow"/>') -> Profiles:
    path = directory / f"{name}.xml"
    path.write_text(f'<profile xmlns="{NAMESPACE}" name="{name}">{text}</profile>', "utf-8")
    path.chmod(0o644)
    return Profiles(directory, owner=OWNER)


def test_profile_of_the_host_is_read_by_its_file_name(tmp_path: Path) -> None:
    profiles = own(tmp_path, "site")
    assert profiles("site").commands is not None
    assert profiles.names() == [*SHIPPED, "site"]


def test_profile_of_the_host_may_not_pose_as_a_shipped_one(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match="give this one another name"):
        own(tmp_path, "observe")("observe")


def test_profile_that_others_can_write_is_refused(tmp_path: Path) -> None:
    profiles = own(tmp_path, "site")
    (tmp_path / "site.xml").chmod(0o666)
    with pytest.raises(PolicyRefused, match="writable by others"):
        profiles("site")


@pytest.mark.parametrize("name", ["../site", "", ".x", "a/b", "x" * 65, "a\nb"])
def test_no_path_can_be_formed_from_a_profiles_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(PolicyValueError, match="no plain name"):
        Profiles(tmp_path)(name)


def test_profile_must_be_called_as_its_file(tmp_path: Path) -> None:
    profiles = own(tmp_path, "site")
    (tmp_path / "site.xml").rename(tmp_path / "other.xml")
    with pytest.raises(PolicyError, match="is not the file's name"):
        profiles("other")


def test_mistake_in_a_profile_is_told_with_its_own_line(tmp_path: Path) -> None:
    profiles = own(tmp_path, "site", '<commands>\n<allow name="nope"/></commands>')
    with pytest.raises(PolicyError, match=r"site.xml:2: unknown command"):
        profiles("site")
