# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt names``: what a policy can name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.abi.revisions import REVISIONS
from kvmi_libvirt.cli import main
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.profile import SHIPPED

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi


def test_json_is_the_documented_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["names", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"abi", "commands", "events", "groups", "profiles"}
    assert [group["name"] for group in found["groups"]] == list(GROUPS)
    assert found["groups"][1]["commands"] == sorted(GROUPS["memory-read"].commands)
    assert [profile["name"] for profile in found["profiles"]][:4] == list(SHIPPED)
    assert found["abi"] == "v12"
    assert found["commands"][0] == {
        "name": "KVMI_GET_VERSION",
        "id": 2,
        "scope": "vm",
        "always_allowed": True,
        "meaning": "protocol version plus hardware feature flags (v10+: also the payload limit)",
    }
    assert found["events"][1] == {
        "name": "KVMI_VCPU_EVENT_PAUSE",
        "id": 1,
        "scope": "vcpu",
        "meaning": "vCPU stopped as a result of the pause command",
    }


@pytest.mark.parametrize("known", REVISIONS, ids=lambda abi: abi.name)
def test_json_lists_every_name_of_the_revision(
    known: KvmiAbi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["names", "--json", "--abi", known.name]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c["id"] for c in found["commands"]] == [c.id for c in known.commands]
    assert {e["name"]: e["id"] for e in found["events"]} == {e.name: e.id for e in known.events}


def test_table_marks_what_is_always_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["names", "--abi", "v7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if " *  " in line] == [
        "KVMI_GET_VERSION",
        "KVMI_VM_CHECK_COMMAND",
        "KVMI_VM_CHECK_EVENT",
    ]
    assert "33  KVMI_VCPU_DISABLE_VE" in "\n".join(lines)
    assert "13  KVMI_EVENT_CPUID" in "\n".join(lines)


def test_unknown_revision_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["names", "--abi", "v6"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def selected(capsys: pytest.CaptureFixture[str], *names: str) -> dict[str, set[str]]:
    assert main(["names", "--json", *names]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = ("commands", "events", "groups", "profiles")
    return {kind: {entry["name"] for entry in found[kind]} for kind in kinds}


def test_a_name_shows_itself_in_any_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("KVMI_VM_GET_INFO", "vm_get_info"):
        found = selected(capsys, name)
        assert found == {
            "commands": {"KVMI_VM_GET_INFO"},
            "events": set(),
            "groups": set(),
            "profiles": set(),
        }


def test_a_group_shows_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = selected(capsys, "memory-write", "VCPU_EVENT_PF")

    assert found["groups"] == {"memory-write"}
    assert found["commands"] == {"KVMI_VM_WRITE_PHYSICAL"}
    assert found["events"] == {"KVMI_VCPU_EVENT_PF"}


def test_a_profile_shows_what_it_allows(capsys: pytest.CaptureFixture[str]) -> None:
    observe, full = selected(capsys, "observe"), selected(capsys, "full")

    assert observe["profiles"] == {"observe"}
    assert observe["events"] == {"KVMI_VM_EVENT_UNHOOK"}
    assert "KVMI_VM_READ_PHYSICAL" in observe["commands"]
    assert "KVMI_VM_WRITE_PHYSICAL" not in observe["commands"]
    everything = {entry.name for entry in REVISIONS[0].commands}
    assert full["commands"] == everything


def test_only_the_tables_that_say_something_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["names", "VM_GET_INFO"]) == 0
    text = capsys.readouterr().out
    assert "KVMI_VM_GET_INFO" in text
    assert len(text.splitlines()) == 4

    assert main(["names", "--abi", "v12", "KVMI_VM_GET_MAP_TOKEN"]) == 0  # of v7 only
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "KVMI v12 (October 2021) has none of these\n"


def test_an_unknown_name_is_one_line_and_a_policy_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["names", "VM_GET_INFOO"]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
