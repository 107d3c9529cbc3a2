# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt plan``: the contract of its JSON, its text and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmi_libvirt.cli import main, plan
from kvmi_libvirt.datafiles import data_file
from kvmi_libvirt.policy.host import HostPolicy
from kvmi_libvirt.policy.model import NAMESPACE

INVALID = sorted((data_file("xml-schemas/introspection.rng").parent / "examples/invalid").iterdir())
POLICY = f"""<introspection xmlns="{NAMESPACE}">
  <source type="unix" path="/run/kvmi/x"/>
  <commands><allow name="VM_READ_PHYSICAL"/><allow name="VM_GET_MAX_GFN"/></commands>
  <events default="allow"/>
</introspection>"""


@pytest.fixture(autouse=True)
def _host_without_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "load_host_policy", HostPolicy)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "web1.xml"
    path.write_text(POLICY, encoding="utf-8")
    return str(path)


def test_json_is_the_documented_one(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", file, "--abi", "v11", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    hook, command, event = (
        "KVM_INTROSPECTION_HOOK",
        "KVM_INTROSPECTION_COMMAND",
        "KVM_INTROSPECTION_EVENT",
    )
    read, gfn = "KVMI_VM_READ_PHYSICAL", "KVMI_VM_GET_MAX_GFN"
    assert json.loads(out) == {
        "abi": "v11",
        "steps": [
            {"ioctl": hook, "request": "0x4018aec8", "allow": None, "id": None, "name": None},
            {"ioctl": command, "request": "0x4008aeca", "allow": 1, "id": 12, "name": read},
            {"ioctl": command, "request": "0x4008aeca", "allow": 1, "id": 20, "name": gfn},
            {"ioctl": event, "request": "0x4008aecb", "allow": 1, "id": -1, "name": None},
        ],
    }


def test_text_is_one_line_a_step(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", file, "--abi", "v7"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "KVM_INTROSPECTION_HOOK",
        "KVM_INTROSPECTION_COMMAND allow 17 KVMI_VM_READ_PHYSICAL",
        "KVM_INTROSPECTION_COMMAND allow 29 KVMI_VM_GET_MAX_GFN",
        "KVM_INTROSPECTION_EVENT allow -1 all",
    ]


def test_kernel_that_lacks_a_command_is_exit_4(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", file]) == 4  # v12 is the default
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        (
            "kvmi-libvirt: KVMI v12 (October 2021) has no command KVMI_VM_GET_MAX_GFN; "
            'remove the rule, or write optional="yes"'
        )
    ]


def test_domain_without_the_element_has_an_empty_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "web1.xml"
    path.write_text("<domain><name>web1</name></domain>", encoding="ascii")
    assert main(["plan", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"abi": "v12", "steps": []}
    assert err == f"{path}: no introspection element, nothing to do\n"


def test_unknown_revision_is_a_usage_error(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", file, "--abi", "v9"]) == 2
    assert "invalid choice: 'v9'" in capsys.readouterr().err


def test_unreadable_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none.xml")]) == 1
    err = capsys.readouterr().err
    assert err == f"kvmi-libvirt: {tmp_path}/none.xml: No such file or directory\n"


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_every_invalid_example_is_exit_3_and_one_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(path)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"kvmi-libvirt: {path}:")
