# SPDX-License-Identifier: Apache-2.0
"""The values: what they refuse to hold, and what counts as equal."""

from __future__ import annotations

import pytest
import strategies
from hypothesis import given

from kvmi_libvirt.errors import PolicyValueError
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource


def test_source_describes_itself_in_one_word() -> None:
    assert UnixSource(path="/run/kvmi/x").describe() == "unix:/run/kvmi/x"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("run/kvmi/x", "is not absolute"),
        ("", "is not absolute"),
        ("@abstract", "is not absolute"),
        ("/", "is a directory"),
        ("//", "is not normalised"),
        ("//run/kvmi/x", 'write path="/run/kvmi/x"'),
        ("/run//kvmi/x", 'write path="/run/kvmi/x"'),
        ("/run/./kvmi/x", 'write path="/run/kvmi/x"'),
        ("/run/kvmi/x/", 'write path="/run/kvmi/x"'),
        ("/run/kvmi/../x", 'climbs with ".."'),
        ("/run/kvmi/..", 'climbs with ".."'),
        ("/run/kvmi/x\0y", "cannot be printed"),
        ("/run/kvmi/x\x1b[2J", "cannot be printed"),
        ("/run/kvmi/\u202ex", "cannot be printed"),
        ("/run/kvmi/\udc80", "cannot be printed"),
        ("/" + "x" * 107, "108 bytes"),
        ("/" + "\u00e9" * 54, "109 bytes"),
    ],
)
def test_source_with_a_path_nobody_can_listen_on_is_refused(path: str, reason: str) -> None:
    with pytest.raises(PolicyValueError) as caught:
        UnixSource(path=path, line=7)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.line == 7


@pytest.mark.parametrize("path", ["/" + "x" * 106, "/" + "\u00e9" * 53, "/run/kvmi/..x", "/a b"])
def test_source_accepts_every_path_that_fits(path: str) -> None:
    assert UnixSource(path=path).path == path


def test_lines_take_no_part_in_comparison() -> None:
    one = Policy(mode=Mode.REQUIRED, source=UnixSource(path="/run/kvmi/x", line=1), line=2)
    other = Policy(mode=Mode.REQUIRED, source=UnixSource(path="/run/kvmi/x", line=8), line=9)
    assert one == other
    assert hash(one) == hash(other)


def test_rights_refuse_to_contradict_themselves() -> None:
    with pytest.raises(ValueError, match="optional but not allowed"):
        Rights(optional=frozenset({"KVMI_VM_GET_INFO"}))
    with pytest.raises(ValueError, match="needs no right"):
        Rights(allowed=frozenset({"KVMI_GET_VERSION"}))


@given(strategies.policies())
def test_demanded_is_what_is_allowed_and_not_optional(policy: Policy) -> None:
    for rights in (policy.commands, policy.events):
        assert rights.demanded | rights.optional == rights.allowed
        assert not rights.demanded & rights.optional
