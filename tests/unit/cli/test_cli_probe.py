# SPDX-License-Identifier: Apache-2.0
"""The probe verb: its arguments and its output. The rest is in tests/functional."""

from __future__ import annotations

import argparse
import json
import signal

import pytest

from kvmi_libvirt.cli import main, probe
from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.tool.inquiry import ProbeResult, Verdict

RESULT = ProbeResult(
    name="db\x1b1",
    uuid="c7a5fdbd-edaf-9455-926a-d65c16db1809",
    abi="v12",
    version=1,
    commands={
        "KVMI_GET_VERSION": Verdict.ALLOWED,
        "KVMI_VCPU_GET_INFO": Verdict.UNKNOWN,
        "KVMI_VM_GET_INFO": Verdict.DENIED,
        "KVMI_VM_READ_PHYSICAL": Verdict.ALLOWED,
    },
    events={"KVMI_VM_EVENT_UNHOOK": Verdict.DENIED},
)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "--listen"),
        (["--listen", "/run/kvmi/tool.sock"], "'/run/kvmi/tool.sock' is not of the form unix:PATH"),
        (["--listen", "tcp:127.0.0.1:1"], "is not of the form unix:PATH"),
        (["--listen", "unix:"], "is not of the form unix:PATH"),
        (["--listen", "unix:a\0b"], "is not of the form unix:PATH"),
        (["--listen", "unix:a", "--timeout", "0"], "more than 0 seconds"),
        (["--listen", "unix:a", "--timeout", "soon"], "'soon' is not a number of seconds"),
        (["--listen", "unix:a", "--timeout", "inf"], "'inf' is not a number of seconds"),
        (["--listen", "unix:a", "--settle", "nan"], "'nan' is not a number of seconds"),
        (["--listen", "unix:a", "--settle", "-1"], "is not a number of seconds"),
        (["--listen", "unix:a", "--abi", "v6"], "v6"),
    ],
)
def test_main_when_arguments_are_wrong_then_usage_error_of_one_line(
    arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["probe", *arguments])
    printed = capsys.readouterr()

    assert code == ExitCode.USAGE
    assert match in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_main_when_place_cannot_be_used_then_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    code = main(["probe", "--listen", "unix:/nonexistent/directory/tool.sock"])

    assert code == ExitCode.FAILED
    assert capsys.readouterr().err == (
        "kvmi-libvirt: cannot listen on unix:/nonexistent/directory/tool.sock: "
        "its directory does not exist; next: kvmi-libvirt doctor\n"
    )
    assert signal.getsignal(signal.SIGTERM) is before


def test_add_arguments_when_only_listen_given_then_defaults() -> None:
    parser = argparse.ArgumentParser()
    probe.add_arguments(parser)
    args = parser.parse_args(["--listen", "unix:tool.sock"])

    assert vars(args) == {
        "listen": "tool.sock",
        "once": False,
        "hold": False,
        "watch": False,
        "json": False,
        "timeout": 10.0,
        "settle": 0.3,
        "wait": None,
        "abi": None,
        "secret": None,
    }


def test_report_when_for_people_then_tables_grouped_by_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    probe._reporter(as_json=False, one_document=True)(RESULT)

    assert capsys.readouterr().out == (
        "VM db\\x1b1 (c7a5fdbd-edaf-9455-926a-d65c16db1809): KVMI v12, protocol version 1\n"
        "COMMAND                VERDICT\n"
        "KVMI_GET_VERSION       allowed\n"
        "KVMI_VM_READ_PHYSICAL  allowed\n"
        "KVMI_VM_GET_INFO       denied\n"
        "KVMI_VCPU_GET_INFO     unknown\n"
        "\n"
        "EVENT                 VERDICT\n"
        "KVMI_VM_EVENT_UNHOOK  denied\n"
    )


def test_report_when_one_json_document_then_indented(capsys: pytest.CaptureFixture[str]) -> None:
    probe._reporter(as_json=True, one_document=True)(RESULT)
    out = capsys.readouterr().out

    assert json.loads(out) == RESULT.to_json()
    assert out.startswith('{\n  "name": "db\\u001b1",\n')


def test_report_when_many_json_documents_then_one_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = probe._reporter(as_json=True, one_document=False)
    report(RESULT)
    report(RESULT)
    lines = capsys.readouterr().out.splitlines()

    assert [json.loads(line) for line in lines] == [RESULT.to_json()] * 2
