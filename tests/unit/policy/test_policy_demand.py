# SPDX-License-Identifier: Apache-2.0
"""A host policy with a mistake grants nothing, and demands what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
from assignments import MODES, assign, policy
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.errors import PolicyError
from kvmi_libvirt.policy.demand import is_demanded
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.policy.facts import Identity
from kvmi_libvirt.policy.host import parse_host_policy
from kvmi_libvirt.policy.model import Mode

ROOT = Path(__file__).resolve().parents[3]
GUARDED = (ROOT / "tests" / "data" / "nova" / "32.2.1-flavor.xml").read_bytes()
PLAIN = (ROOT / "tests" / "data" / "nova" / "32.2.1-plain.xml").read_bytes()


def demanded(data: bytes, xml: bytes = GUARDED) -> bool:
    return is_demanded(data, parse_domain(xml, source="x", with_policy=False))


@pytest.mark.parametrize(
    "mistake",
    [
        ("VM_GET_INFO", "VM_GET_INFOS"),
        ("</host-policy>", ""),
        ("</commands>", ""),
        ("</assign>", ""),
        ("<host-policy xmlns", "<host-policy x="),
        ("required", "requird"),
        ("<assign", "<k:assign"),
    ],
)
def test_a_mistake_elsewhere_changes_nothing_about_who_is_meant(mistake: tuple[str, str]) -> None:
    right = policy(assign("nova-flavor='guarded.*'"))
    wrong = right.decode().replace(*mistake).encode()
    assert wrong != right
    with pytest.raises(PolicyError):
        parse_host_policy(wrong, source="x")

    assert demanded(wrong)
    assert not demanded(wrong, PLAIN)
    assert demanded(wrong.replace(b"'", b'"'))


def test_the_first_that_fits_counts_and_a_comment_does_not() -> None:
    optional, required = assign("nova-flavor='g*'", mode=""), assign("nova-flavor='*'")
    assert not demanded(policy(optional, required))
    assert demanded(policy(f"<!-- {optional} -->", required))
    assert not demanded(policy(f"<!-- {required} -->"))


def test_a_selector_that_nobody_knows_may_fit_and_one_beside_it_must() -> None:
    assert demanded(policy(assign("flavour='guarded.*'")))
    assert demanded(policy(assign("flavour='x' nova-flavor='guarded.*'")))
    assert not demanded(policy(assign("flavour='x' nova-flavor='other'")))
    assert not demanded(policy(assign("proxmox-vmid='1OO'")))


def test_what_only_may_fit_and_demands_nothing_does_not_end_the_search() -> None:
    required = assign("nova-flavor='guarded.*'")
    for match in ("flavour='x'", "flavour='x' nova-flavor='guarded.*'"):
        assert not demanded(policy(assign(match, mode="")))
        assert demanded(policy(assign(match, mode=""), required))


SELECTORS = st.sampled_from(
    [
        *("nova-flavor='guarded.*'", "nova-flavor='m1.*'", "nova-flavor-id='42'", "name='inst*'"),
        *("nova-project='0f0e0d0c-0b0a-0908-0706-050403020100'", "uuid='8d1f7a5e'"),
        "nova-extra-spec='kvmi:profile=protect'",
    ]
)


@given(
    assignments=st.lists(st.builds(assign, SELECTORS, MODES), max_size=4),
    xml=st.sampled_from([GUARDED, PLAIN]),
)
def test_of_a_policy_without_mistake_it_says_what_the_policy_does(
    assignments: list[str], xml: bytes
) -> None:
    data = policy(*assignments).replace(b"'8d1f7a5e'", b"'8d1f7a5e-3c46-4b9b-9a55-5f0c2f7d1a01'")
    domain = parse_domain(xml, source="x", with_policy=False)
    found = parse_host_policy(data, source="x").assignment(domain)

    assert demanded(data, xml) == (found is not None and found.policy.mode is Mode.REQUIRED)


@given(st.binary())
def test_any_bytes_can_be_there(data: bytes) -> None:
    assert is_demanded(data, Identity(name="x")) in (True, False)
