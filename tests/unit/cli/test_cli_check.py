# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt check``: one line for each finding, an exit code, never a traceback."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmi_libvirt.cli import check, main
from kvmi_libvirt.datafiles import data_file
from kvmi_libvirt.errors import PolicyRefused
from kvmi_libvirt.policy.host import HostPolicy
from kvmi_libvirt.policy.model import NAMESPACE

INVALID = sorted((data_file("xml-schemas/introspection.rng").parent / "examples/invalid").iterdir())
SOURCE = '<source type="unix" path="/run/kvmi/x"/>'
RULES = '<commands><allow name="KVMI_VM_GET_INFO"/></commands>'
GOOD = f'<introspection xmlns="{NAMESPACE}" mode="required">{SOURCE}{RULES}</introspection>'
TWO_ERRORS = f"""<introspection xmlns="{NAMESPACE}">
  {SOURCE}
  <commands>
    <allow name="VM_REED_PHYSICAL"/>
    <deny name="GET_VERSION"/>
    <allow name="VM_CHECK_EVENT"/>
  </commands>
</introspection>"""

BAD_BYTES = {
    "empty": b"",
    "nul": b"\0" * 100,
    "random": bytes(range(256)),
    "latin-1": b"<domain>\xe9</domain>",
    "utf-16": "<domain/>".encode("utf-16"),
    "truncated": GOOD.encode()[:-1],
    "doctype": b'<!DOCTYPE d [<!ENTITY e SYSTEM "/etc/passwd">]><domain>&e;</domain>',
    "deep": b"<domain>" * 5000,
    "escape": b"<domain>\x1b[2J</domain>",
    "html": b"<!doctype html><p>not found",
    "json": b'{"mode": "required"}',
    "elf": b"\x7fELF\x02\x01\x01" + b"\0" * 57,
}


@pytest.fixture(autouse=True)
def _host_without_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "load_host_policy", HostPolicy)


def write(directory: Path, text: str | bytes, name: str = "web1.xml") -> str:
    path = directory / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_good_file_is_silent_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, GOOD)
    assert main(["check", file]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{file}: ok, required, unix:/run/kvmi/x, 1 command, 0 events\n"


def test_domain_without_the_element_is_said_to_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "<domain><name>web1</name></domain>")
    assert main(["check", file]) == 0
    assert capsys.readouterr().err == f"{file}: no introspection element\n"


def test_everything_is_said_to_be_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, GOOD.replace(RULES, '<commands default="allow"/>'))
    assert main(["check", file]) == 0
    assert capsys.readouterr().err.endswith(", all commands, 0 events\n")


def test_findings_are_lines_as_a_compiler_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, TWO_ERRORS)
    assert main(["check", file]) == 3
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f'{file}:4: unknown command "VM_REED_PHYSICAL"; did you mean KVMI_VM_READ_PHYSICAL?',
        (
            f"{file}:5: KVMI_GET_VERSION cannot be denied: the kernel always allows it; "
            "remove the rule"
        ),
        (
            f"{file}:6: warning: KVMI_VM_CHECK_EVENT is always allowed; "
            "the rule has no effect, remove it"
        ),
    ]
    assert err == ""


def test_json_lists_the_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, TWO_ERRORS)
    good = write(tmp_path, GOOD, "good.xml")
    assert main(["check", "--json", file, good]) == 3
    found = json.loads(capsys.readouterr().out)
    assert [(f["file"], f["line"], f["severity"]) for f in found] == [
        (file, 4, "error"),
        (file, 5, "error"),
        (file, 6, "warning"),
    ]
    assert set(found[0]) == {"file", "line", "severity", "message"}
    assert main(["check", "--json", good]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_warnings_alone_are_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, GOOD.replace(RULES, ""))
    assert main(["check", file]) == 0
    assert capsys.readouterr().out.startswith(f"{file}:1: warning: nothing is allowed")


def test_line_that_is_not_known_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "\n" * 70_000 + GOOD.replace("GET_INFO", "GET_INF"))
    assert main(["check", "--json", file]) == 3
    assert json.loads(capsys.readouterr().out)[0]["line"] is None
    assert main(["check", file]) == 3
    assert capsys.readouterr().out.startswith(f'{file}: unknown command "KVMI_VM_GET_INF"')


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_every_invalid_example_fails_with_one_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(path)]) == 3
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert line.startswith(f"{path}:")
    assert err == ""


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bytes_that_are_no_policy_fail_with_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, BAD_BYTES[name])
    assert main(["check", file]) == 3
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert line.isprintable()
    assert err == ""


def test_unreadable_files_are_said_and_the_others_still_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, good = str(tmp_path / "none.xml"), write(tmp_path, GOOD)
    assert main(["check", missing, str(tmp_path), good]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"kvmi-libvirt: {missing}: No such file or directory",
        f"kvmi-libvirt: {tmp_path}: Is a directory",
        f"{good}: ok, required, unix:/run/kvmi/x, 1 command, 0 events",
    ]
    assert main(["check", missing, write(tmp_path, "<x/>", "bad.xml")]) == 3


def test_standard_input_is_a_dash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"<x/>")))
    assert main(["check", "-"]) == 3
    assert capsys.readouterr().out.startswith("-:1: root element is <x>")


def test_file_name_cannot_forge_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "<x/>", "a\nb\udcff\x1b.xml")
    assert main(["check", file]) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}/a\\nb\\udcff\\x1b.xml:1: ")


def test_host_policy_that_cannot_be_read_is_a_finding_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> HostPolicy:
        raise PolicyRefused("not this one", source="/etc/host-policy.xml")

    monkeypatch.setattr(check, "load_host_policy", refuse)
    assert main(["check", write(tmp_path, "<x/>")]) == 3
    first, second = capsys.readouterr().out.splitlines()
    assert first == "/etc/host-policy.xml: not this one"
    assert "root element is <x>" in second
