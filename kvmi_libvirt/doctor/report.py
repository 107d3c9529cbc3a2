# SPDX-License-Identifier: Apache-2.0
"""The lines the doctor prints: what was looked at, the verdict, why, and what to do.

They look as those of virt-host-validate(1). Pure.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

HOST: Final = "KVMI"
"""What a line about the host begins with; one about a VM begins with its name."""

_TITLE_WIDTH: Final = 46
_COLOURS: Final = {"PASS": "\x1b[32m", "WARN": "\x1b[33m", "FAIL": "\x1b[31m"}
_PLAIN: Final = "\x1b[0m"


class Verdict(enum.Enum):
    """PASS, WARN: it works, but; FAIL: it does not."""

    PASS = "PASS"  # noqa: S105 - no password
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One thing that was looked at.

    Parameters
        check   its name, for programs
        title   completes "Checking ..."
        reason  why the verdict is not PASS; with PASS, what was found
        todo    what to do, or to type, next
        code    what the command ends with if this is the first FAIL
        domain  the VM it is about, None for the host
    """

    check: str
    title: str
    verdict: Verdict
    reason: str | None = None
    todo: str | None = None
    code: ExitCode = ExitCode.UNSUPPORTED
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """Makes the lines of one check."""

    name: str
    title: str
    domain: str | None = None

    def passed(self, found: str | None = None) -> Line:
        """Return a PASS, with what was *found* if that is worth telling."""
        return Line(
            check=self.name,
            title=self.title,
            verdict=Verdict.PASS,
            reason=found,
            domain=self.domain,
        )

    def warn(self, reason: str, todo: str | None = None) -> Line:
        """Return a WARN."""
        return Line(
            check=self.name,
            title=self.title,
            verdict=Verdict.WARN,
            reason=reason,
            todo=todo,
            domain=self.domain,
        )

    def fail(
        self, reason: str, todo: str | None = None, *, code: ExitCode = ExitCode.UNSUPPORTED
    ) -> Line:
        """Return a FAIL."""
        return Line(
            check=self.name,
            title=self.title,
            verdict=Verdict.FAIL,
            reason=reason,
            todo=todo,
            code=code,
            domain=self.domain,
        )


def exit_code(lines: Iterable[Line]) -> ExitCode:
    """Return what the command ends with: the code of the first FAIL, OK without one."""
    for line in lines:
        if line.verdict is Verdict.FAIL:
            return line.code
    return ExitCode.OK


def as_text(line: Line, *, in_colour: bool = False) -> str:
    """Return *line* as it is printed; whatever is in it, it is one line."""
    where = HOST if line.domain is None else _one_line(line.domain)
    verdict = line.verdict.value
    if in_colour:
        verdict = f"{_COLOURS[verdict]}{verdict}{_PLAIN}"
    why = "; ".join(_one_line(text) for text in (line.reason, line.todo) if text)
    title = _one_line(line.title)
    text = f"{where:>6}: Checking {title:{_TITLE_WIDTH}} : {verdict}"
    return f"{text} ({why})" if why else text


def as_json(line: Line) -> dict[str, str | None]:
    """Return *line* for ``--json``."""
    return {
        "domain": line.domain,
        "check": line.check,
        "title": line.title,
        "verdict": line.verdict.value,
        "reason": line.reason,
        "todo": line.todo,
    }


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
