# SPDX-License-Identifier: Apache-2.0
"""What is worth telling about a document: errors and warnings with their line.

Pure; imports errors only.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmi_libvirt.errors import PolicyError, PolicySchemaError

if TYPE_CHECKING:
    from collections.abc import Iterable


class Severity(enum.Enum):
    """An error makes the policy unusable, a warning does not."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found.

    Parameters
        message  what, why, and what to write instead, in one line
        line     1-based, or None when it is not known
        error    the class to raise where a finding ends the work
    """

    message: str
    line: int | None = None
    severity: Severity = Severity.ERROR
    error: type[PolicyError] = PolicySchemaError

    @classmethod
    def of(cls, error: PolicyError) -> Finding:
        """Return the finding that says what *error* says."""
        return cls(message=error.message, line=error.line, error=type(error))


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Return *findings* by line; those without one come last, otherwise as they were."""
    return sorted(findings, key=lambda f: (f.line is None, f.line or 0))


def raise_first(findings: Iterable[Finding], *, source: str) -> None:
    """Raise the first error among *findings*, if there is one.

    Raises
        PolicyError  of the finding's own class, with *source* and its line.
    """
    for finding in in_order(findings):
        if finding.severity is Severity.ERROR:
            raise finding.error(finding.message, source=source, line=finding.line)
