# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt explain``: the verdict of every right, and the rule that decided it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.abi.revisions import ALL_COMMANDS, ALL_EVENTS, by_name
from kvmi_libvirt.cli import explain, main
from kvmi_libvirt.kernel import NO_KVMI
from kvmi_libvirt.policy.host import HostPolicy, parse_host_policy
from kvmi_libvirt.policy.model import NAMESPACE

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi

V12, V11, V7, DOUBT = map(by_name, ("v12", "v11", "v7", "v11-or-v12"))
ELEMENT = f"""<introspection xmlns="{NAMESPACE}">
  <source type="unix" path="/run/kvmi/x"/>
  <secret name="db1"/>
  <commands>
    <allow name="VM_READ_PHYSICAL"/>
    <deny group="memory-write"/>
  </commands>
</introspection>"""


@pytest.fixture(autouse=True)
def _host_without_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "load_host_policy", HostPolicy)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "web1.xml"
    path.write_text(ELEMENT, encoding="utf-8")
    return str(path)


def test_json_has_every_name_with_verdict_rule_file_line_and_kernel(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", file, "--abi", "v12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    commands = {entry["name"]: entry for entry in found["commands"]}
    assert set(commands) == ALL_COMMANDS
    assert {entry["name"] for entry in found["events"]} == ALL_EVENTS
    assert commands["KVMI_VM_READ_PHYSICAL"] == {
        "name": "KVMI_VM_READ_PHYSICAL",
        "verdict": "allowed",
        "optional": False,
        "rule": '<allow name="VM_READ_PHYSICAL">',
        "file": file,
        "line": 5,
        "in_kernel": True,
    }
    assert commands["KVMI_VM_WRITE_PHYSICAL"]["rule"] == '<deny group="memory-write">'
    assert commands["KVMI_GET_VERSION"]["verdict"] == "always"
    assert commands["KVMI_VM_GET_MAX_GFN"]["in_kernel"] is False
    assert found["policy"]["secret"] == "db1"


def test_what_is_denied_can_be_left_out(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", file, "--abi", "v7", "--allowed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found["commands"]] == ["KVMI_VM_READ_PHYSICAL"]


def test_without_abi_the_running_kernel_is_asked(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for told, column in (("/dev/kvm cannot be opened", "  ?  "), (NO_KVMI, "  no  ")):
        monkeypatch.setattr(explain, "running_abi", lambda told=told: (None, told))
        assert main(["explain", file]) == 0
        out = capsys.readouterr().out
        assert f"kernel:    {told}\n" in out
        assert all(column in line for line in out.splitlines() if line.startswith("KVMI_"))


@pytest.mark.parametrize(
    ("found", "pin", "abi", "told"),
    [
        (V12, None, "v12", V12.title),
        (V12, "v12", "v12", V12.title),
        (DOUBT, None, "v11-or-v12", DOUBT.title),
        (DOUBT, "v11", "v11", f"{V11.title}, as the host policy says"),
        (
            V12,
            "v11",
            "v11-or-v12",
            f"{V12.title}, but the host policy says v11: what differs is not granted",
        ),
        (V7, "v12", None, f"{V7.title}; the host policy says v12, with which nothing is hooked"),
        (None, "v12", None, "cannot tell"),
    ],
)
def test_what_the_host_policy_says_of_the_kernel_is_weighed_as_for_a_hook(
    found: KvmiAbi | None,
    pin: str | None,
    abi: str | None,
    told: str,
    file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = (found, "cannot tell" if found is None else found.title)
    monkeypatch.setattr(explain, "running_abi", lambda: answer)
    monkeypatch.setattr(explain, "load_host_policy", lambda: HostPolicy(kernel_abi=pin))
    assert main(["explain", file]) == 0
    assert f"kernel:    {told}\n" in capsys.readouterr().out
    assert main(["explain", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["abi"] == abi


def test_right_whose_id_is_in_doubt_is_told_not_to_be_granted(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "running_abi", lambda: (DOUBT, DOUBT.title))
    note = "?  the kernel does not tell which id this has, so it is not granted\n"
    assert main(["explain", file]) == 0
    assert note not in capsys.readouterr().out
    path = Path(file)
    path.write_text(
        ELEMENT.replace("VM_READ_PHYSICAL", 'VM_SET_PAGE_ACCESS" optional="yes'), encoding="utf-8"
    )
    assert main(["explain", file]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^KVMI_VM_SET_PAGE_ACCESS +allowed \(optional\) +\?  ", out, re.MULTILINE)
    assert note in out
    assert "problem:" not in out
    # Granted all at once, it needs no id of its own.
    path.write_text(
        re.sub(r"<commands>.*</commands>", '<commands default="allow"/>', ELEMENT, flags=re.S)
    )
    assert main(["explain", file]) == 0
    assert note not in capsys.readouterr().out


def test_right_that_is_demanded_and_not_there_is_a_problem(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(file)
    path.write_text(ELEMENT.replace("VM_READ_PHYSICAL", "VM_GET_MAX_GFN"), encoding="utf-8")
    for abi, has_problem in (("v12", True), ("v11", False), ("v7", False)):
        assert main(["explain", file, "--abi", abi]) == 0
        out = capsys.readouterr().out
        assert ("problem:   KVMI v12 (October 2021) has no command" in out) == has_problem


PAUSE, INJECT = "KVMI_VM_PAUSE_VCPU", "KVMI_VCPU_INJECT_EXCEPTION"
CONTROL_VM, CONTROL_VCPU = "KVMI_VM_CONTROL_EVENTS", "KVMI_VCPU_CONTROL_EVENTS"


@pytest.mark.parametrize(
    ("commands", "events", "told"),
    [
        ((PAUSE,), (), f"{PAUSE} is of no use without the event KVMI_VCPU_EVENT_PAUSE"),
        ((PAUSE,), ("KVMI_VCPU_EVENT_PAUSE",), None),
        ((INJECT,), (), f"{INJECT} is of no use without the event KVMI_VCPU_EVENT_TRAP"),
        ((), ("KVMI_VCPU_EVENT_TRAP",), None),
        (
            (CONTROL_VCPU,),
            ("KVMI_VM_EVENT_UNHOOK",),
            f"KVMI_VM_EVENT_UNHOOK is of no use without the command {CONTROL_VM}",
        ),
        (
            (CONTROL_VM,),
            ("KVMI_VCPU_EVENT_CR", "KVMI_VCPU_EVENT_BREAKPOINT"),
            (
                "KVMI_VCPU_EVENT_BREAKPOINT, KVMI_VCPU_EVENT_CR are of no use without the "
                f"command {CONTROL_VCPU}"
            ),
        ),
        ((CONTROL_VM, CONTROL_VCPU), ("KVMI_VCPU_EVENT_PF", "KVMI_VM_EVENT_UNHOOK"), None),
    ],
)
def test_right_that_is_of_no_use_alone_is_told(
    commands: tuple[str, ...],
    events: tuple[str, ...],
    told: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "x.xml"
    rules = "".join(f'<allow name="{name}"/>' for name in commands)
    more = "".join(f'<allow name="{name}"/>' for name in events)
    path.write_text(
        f'<introspection xmlns="{NAMESPACE}"><source type="unix" path="/run/kvmi/x"/>'
        f"<commands>{rules}</commands><events>{more}</events></introspection>",
        encoding="ascii",
    )
    assert main(["explain", str(path), "--abi", "v12", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes == ([] if told is None else [f"{told}, which is not allowed"])
    assert main(["explain", str(path), "--abi", "v12"]) == 0
    out = capsys.readouterr().out
    assert [line[6:] for line in out.splitlines() if line.startswith("note: ")] == notes


def test_assignment_is_named_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    xml = f"""<host-policy xmlns="{NAMESPACE}">
      <assign profile="observe"><match name="web*"/>
      <source type="unix" path="/run/kvmi/x"/></assign></host-policy>"""
    host = parse_host_policy(xml.encode(), source="/etc/hp.xml")
    monkeypatch.setattr(explain, "load_host_policy", lambda: host)
    path = tmp_path / "d.xml"
    path.write_text("<domain><name>web1</name></domain>", encoding="ascii")
    assert main(["explain", str(path), "--abi", "v12"]) == 0
    out = capsys.readouterr().out
    assert "policy:    assigned by the host, /etc/hp.xml:2\n" in out


def test_domain_without_policy_is_said_to_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.xml"
    path.write_text("<domain><name>web1</name></domain>", encoding="ascii")
    assert main(["explain", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["policy"] is None
    assert err == "web1: no introspection: it has no element, and the host assigns none\n"
