# SPDX-License-Identifier: Apache-2.0
"""``doctor`` as it is typed: lines, data, colour, exit codes. What it finds is given."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.cli import doctor, main
from kvmi_libvirt.doctor.examine import Question
from kvmi_libvirt.doctor.facts import VmFacts
from kvmi_libvirt.doctor.report import Check, Line
from kvmi_libvirt.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable

Captured = pytest.CaptureFixture[str]
HOST = Check("hook", "for the libvirt hook")
VM = VmFacts(name="web1", uuid="", is_active=True)


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Question]]:
    """Return a function that makes the doctor find these lines; it returns what is asked."""

    def install(*lines: Line, vm: VmFacts | None = None) -> list[Question]:
        asked: list[Question] = []

        def examine(question: Question) -> tuple[list[Line], VmFacts | None]:
            asked.append(question)
            return list(lines), vm

        monkeypatch.setattr(doctor, "examine", examine)
        return asked

    return install


def test_a_line_for_everything_and_0_where_nothing_failed(
    finds: Callable[..., list[Question]], capsys: Captured
) -> None:
    asked = finds(HOST.passed(), HOST.warn("odd"))

    assert main(["doctor"]) == 0

    out, err = capsys.readouterr()
    assert [line.split(" : ")[1] for line in out.splitlines()] == ["PASS", "WARN (odd)"]
    assert err == ""
    assert asked == [Question()]


def test_the_question_is_what_was_typed(finds: Callable[..., list[Question]]) -> None:
    asked = finds()

    main(["doctor", "web1", "--emulated", "--timeout", "2.5", "-c", "qemu:///session"])

    assert asked == [
        Question(domain="web1", uri="qemu:///session", is_emulated=True, timeout_s=2.5)
    ]


def test_the_first_fail_decides_the_exit_code(
    finds: Callable[..., list[Question]], capsys: Captured
) -> None:
    finds(HOST.warn("x"), HOST.fail("a", code=ExitCode.HANDSHAKE), HOST.fail("b"))

    assert main(["doctor"]) == ExitCode.HANDSHAKE
    assert main(["doctor", "--json"]) == ExitCode.HANDSHAKE


def test_the_log_of_a_vm_comes_last(finds: Callable[..., list[Question]], capsys: Captured) -> None:
    finds(HOST.passed(), vm=replace(VM, log=("a\x1bb", "c"), log_place="/var/log/x"))

    assert main(["doctor", "web1"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "",
        "last lines about it in /var/log/x:",
        "  a\\x1bb",
        "  c",
    ]
    assert main(["doctor", "web1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["log"] == {"place": "/var/log/x", "lines": ["a\x1bb", "c"]}
    assert [check["check"] for check in found["checks"]] == ["hook"]


def test_without_a_vm_there_is_no_log(
    finds: Callable[..., list[Question]], capsys: Captured
) -> None:
    finds(HOST.passed())

    main(["doctor", "--json"])

    assert json.loads(capsys.readouterr().out)["log"] is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("no_colour", "term", "coloured"),
    [
        (None, "xterm", True),
        ("", "xterm", True),
        ("1", "xterm", False),
        ("0", "xterm", False),
        (None, "dumb", False),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    finds: Callable[..., list[Question]],
    monkeypatch: pytest.MonkeyPatch,
    no_colour: str | None,
    term: str,
    coloured: bool,
) -> None:
    finds(HOST.fail("x"))
    shown = Terminal()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setenv("TERM", term)
    if no_colour is None:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", no_colour)

    main(["doctor"])

    assert ("\x1b[31mFAIL\x1b[0m" in shown.getvalue()) is coloured
    assert "FAIL" in shown.getvalue()


def test_without_a_terminal_there_is_no_colour(
    finds: Callable[..., list[Question]], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    finds(HOST.fail("x"))

    main(["doctor"])

    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--timeout", "0"],
        ["--timeout", "-1"],
        ["--timeout", "nan"],
        ["--timeout", "inf"],
        ["--timeout", "x"],
        ["-c", "qemu+ssh://other/system"],
        ["-c", "test:///default"],
        ["web1", "web2"],
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(
    finds: Callable[..., list[Question]], capsys: Captured, arguments: list[str]
) -> None:
    asked = finds()

    assert main(["doctor", *arguments]) == ExitCode.USAGE

    assert asked == []
    assert len(capsys.readouterr().err.splitlines()) == 1
