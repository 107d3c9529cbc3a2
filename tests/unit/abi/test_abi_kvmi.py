# SPDX-License-Identifier: Apache-2.0
"""The KVMI tables against what each revision's header says (tests/data/abi)."""

from __future__ import annotations

import ctypes
import itertools
import json
from pathlib import Path
from typing import Any, Final

import pytest

from kvmi_libvirt.abi import ioc
from kvmi_libvirt.abi.kvmi import (
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_RUN,
    PROBE_ID,
    Ioctl,
    KvmiAbi,
    kvm_introspection_feature,
    kvm_introspection_hook,
)
from kvmi_libvirt.abi.revisions import (
    ALL_COMMANDS,
    ALL_EVENTS,
    ALWAYS_ALLOWED,
    BY_NAME,
    REVISIONS,
    by_name,
)
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11, V11_OR_V12
from kvmi_libvirt.abi.v12 import V12

DATA: Final = Path(__file__).resolve().parents[2] / "data" / "abi"

MAINLINE: Final = {
    0x0000AEC7: "KVM_RESET_DIRTY_RINGS",
    0x0000AEC3: "KVM_S390_NORMAL_RESET",
    0x0000AEC4: "KVM_S390_CLEAR_RESET",
}
"""VM ioctls of mainline kernels whose numbers other KVMI revisions used."""

every_revision = pytest.mark.parametrize("abi", [*REVISIONS, V11_OR_V12], ids=lambda abi: abi.name)


def header(abi: KvmiAbi) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / f"{abi.name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
def test_a_revision_is_as_its_header_says(abi: KvmiAbi) -> None:
    expected = header(abi)

    assert abi.capability == expected["capability"]
    assert abi.command_slots == expected["command_slots"]
    assert abi.event_slots == expected["event_slots"]
    assert abi.handshake_size == expected["handshake_size"]
    assert sorted(abi.always_allowed_ids) == expected["always_allowed"]


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
@pytest.mark.parametrize("ioctl", Ioctl)
def test_a_request_is_the_number_the_kernel_compares_with(abi: KvmiAbi, ioctl: Ioctl) -> None:
    assert f"{abi.request(ioctl):#010x}" == header(abi)["requests"][ioctl.value]


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
def test_commands_are_the_headers(abi: KvmiAbi) -> None:
    found = [[c.id, c.kernel_name, c.scope.value] for c in abi.commands]

    assert found == header(abi)["commands"]


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
def test_events_are_the_headers(abi: KvmiAbi) -> None:
    found = {(e.id, e.kernel_name): e.scope.value for e in abi.events}
    expected = {(id_, name): scope for id_, name, scope in header(abi)["events"]}

    assert found.keys() == expected.keys()
    # "both": it may come from either; ours is then the one who sends it in practice.
    assert [key for key in found if expected[key] not in (found[key], "both")] == []


@every_revision
def test_ids_and_names_are_unique_and_within_the_bitmaps(abi: KvmiAbi) -> None:
    for entries, slots in ((abi.commands, abi.command_slots), (abi.events, abi.event_slots)):
        ids = [entry.id for entry in entries]
        assert ids == sorted(set(ids))
        assert ids[0] >= 0
        assert ids[-1] < slots
        assert len({entry.name for entry in entries}) == len(entries)
        assert all(entry.name.startswith("KVMI_") for entry in entries)
        assert all(entry.meaning for entry in entries)
    assert PROBE_ID < -1  # out of range everywhere, and not "all"


@every_revision
def test_look_ups_by_name_hold_every_entry(abi: KvmiAbi) -> None:
    assert tuple(abi.commands_by_name.values()) == abi.commands
    assert tuple(abi.events_by_name.values()) == abi.events


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
def test_a_canonical_name_is_v12s_where_v12_has_the_thing(abi: KvmiAbi) -> None:
    canonical = {c.name for c in V12.commands} | {e.name for e in V12.events}
    names = {c.kernel_name: c.name for c in abi.commands}
    names |= {e.kernel_name: e.name for e in abi.events}
    spelt_differently = {theirs: ours for theirs, ours in names.items() if theirs != ours}

    assert set(spelt_differently.values()) <= canonical
    assert set(spelt_differently).isdisjoint(canonical)
    if abi is not V7:
        assert spelt_differently == {}
    else:
        assert spelt_differently["KVMI_VCPU_PAUSE"] == "KVMI_VM_PAUSE_VCPU"
        assert spelt_differently["KVMI_EVENT_PAUSE_VCPU"] == "KVMI_VCPU_EVENT_PAUSE"


def test_the_commands_no_policy_can_deny_are_the_same_three_everywhere() -> None:
    expected = {"KVMI_GET_VERSION", "KVMI_VM_CHECK_COMMAND", "KVMI_VM_CHECK_EVENT"}

    assert expected == ALWAYS_ALLOWED
    for abi in BY_NAME.values():
        assert {c.name for c in abi.commands if c.always_allowed} == expected


def test_v11_and_v12_differ_in_two_ids_and_share_all_requests() -> None:
    assert {V11.request(i) for i in Ioctl} == {V12.request(i) for i in Ioctl}
    ids = {abi.name: {c.name: c.id for c in abi.commands if c.id in (20, 22)} for abi in (V11, V12)}
    assert ids == {
        "v11": {"KVMI_VM_GET_MAX_GFN": 20, "KVMI_VM_SET_PAGE_ACCESS": 22},
        "v12": {"KVMI_VM_SET_PAGE_ACCESS": 20},
    }


def test_in_doubt_between_v11_and_v12_neither_id_has_a_name() -> None:
    both = {(c.id, c.name) for c in V11.commands} & {(c.id, c.name) for c in V12.commands}

    assert {(c.id, c.name) for c in V11_OR_V12.commands} == both
    assert not {20, 22} & {c.id for c in V11_OR_V12.commands}
    assert V11_OR_V12.events == V11.events == V12.events


def test_v7_shares_no_request_with_the_others() -> None:
    # Else the probe could take one kernel for another.
    assert not {V7.request(i) for i in Ioctl} & {V12.request(i) for i in Ioctl}


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
def test_no_request_means_something_else_to_a_mainline_kernel(abi: KvmiAbi) -> None:
    assert [MAINLINE[abi.request(i)] for i in Ioctl if abi.request(i) in MAINLINE] == []


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
def test_one_revisions_requests_are_all_different(abi: KvmiAbi) -> None:
    assert len({abi.request(ioctl) for ioctl in Ioctl}) == len(Ioctl)


def test_what_a_policy_may_name_is_what_any_revision_knows() -> None:
    assert {c.name for abi in REVISIONS for c in abi.commands} == ALL_COMMANDS
    assert {e.name for abi in REVISIONS for e in abi.events} == ALL_EVENTS
    assert not ALL_COMMANDS & ALL_EVENTS


@pytest.mark.parametrize("name", ["v12", "v11", "v7", "v11-or-v12"])
def test_a_revision_is_found_by_its_name(name: str) -> None:
    assert by_name(name).name == name


def test_an_unknown_revision_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        by_name("v13")


def test_the_argument_structures_have_the_kernels_layout() -> None:
    layout = {
        struct.__name__: (
            ctypes.sizeof(struct),
            {name: getattr(struct, name).offset for name, *_ in struct._fields_},
        )
        for struct in (kvm_introspection_hook, kvm_introspection_feature)
    }

    assert layout == {
        "kvm_introspection_hook": (24, {"fd": 0, "padding": 4, "uuid": 8}),
        "kvm_introspection_feature": (8, {"allow": 0, "id": 4}),
    }


def test_a_feature_is_allow_first_then_a_signed_id() -> None:
    assert bytes(kvm_introspection_feature(1, -1)) == b"\1\0\0\0\xff\xff\xff\xff"
    assert bytes(kvm_introspection_feature(0, PROBE_ID)) == b"\0\0\0\0\xfe\xff\xff\xff"


def test_a_hook_keeps_the_uuids_byte_order() -> None:
    uuid = bytes(range(16))

    assert bytes(kvm_introspection_hook(5, 0, tuple(uuid))) == b"\5\0\0\0\0\0\0\0" + uuid


def test_kvms_own_requests() -> None:
    assert (KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_RUN) == (0xAE01, 0xAE03, 0xAE80)


def test_requests_are_composed_as_asm_generic_does() -> None:
    class Pair(ctypes.Structure):
        _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint32))

    composed = [
        ioc.io(0xAE, 0x01),
        *(make(0xAE, 0x01, Pair) for make in (ioc.iow, ioc.ior, ioc.iowr)),
    ]

    assert composed == [0x0000AE01, 0x4008AE01, 0x8008AE01, 0xC008AE01]
    assert all(ioc.nr(request) == 0x01 for request in composed)
    assert all(a != b for a, b in itertools.combinations(composed, 2))
