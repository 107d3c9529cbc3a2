# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt check FILE...``: everything wrong with a policy, one line each.

Findings are data and go to stdout, as a compiler's would; what was found in a file
without findings goes to stderr.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.errors import ExitCode, PolicyError
from kvmi_libvirt.policy.document import read_file
from kvmi_libvirt.policy.findings import Finding, Severity
from kvmi_libvirt.policy.host import HOST_POLICY_PATH, HostPolicy, load_host_policy
from kvmi_libvirt.policy.lint import Report, lint
from kvmi_libvirt.quoting import counted, printable

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.policy.model import Rights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="domain XML, an introspection element by itself, a host policy or a profile; "
        "- for standard input",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Check every file, whatever is wrong with the others."""
    found: list[tuple[str, Finding]] = []
    unreadable = False
    host = HostPolicy()
    try:
        host = load_host_policy()
    except PolicyError as error:
        found.append((error.source or str(HOST_POLICY_PATH), Finding.of(error)))
    for file in args.files:
        try:
            xml = read_file(file)
        except OSError as error:
            unreadable = True
            _note(f"kvmi-libvirt: {printable(file)}: {error.strerror or error}")
            continue
        report = lint(xml, source=file, host=host)
        found += [(file, finding) for finding in report.findings]
        if not report.findings:
            _note(f"{printable(file)}: {_summary(report)}")
    if args.json:
        print_json([_as_json(file, finding) for file, finding in found])
    else:
        for file, finding in found:
            print(_as_line(file, finding))
    if any(finding.severity is Severity.ERROR for _, finding in found):
        return ExitCode.POLICY
    return ExitCode.FAILED if unreadable else ExitCode.OK


def _as_json(file: str, finding: Finding) -> dict[str, str | int | None]:
    return {
        "file": printable(file),
        "line": finding.line,
        "severity": finding.severity.value,
        "message": finding.message,
    }


def _as_line(file: str, finding: Finding) -> str:
    line = "" if finding.line is None else f":{finding.line}"
    kind = "warning: " if finding.severity is Severity.WARNING else ""
    return f"{printable(file)}{line}: {kind}{finding.message}"


def _summary(report: Report) -> str:
    policy = report.policy
    if report.kind != "policy":
        return f"ok, {'a profile' if report.kind == 'profile' else 'a host policy'}"
    if policy is None:
        return "no introspection element"
    commands = _count(policy.commands, "command")
    events = _count(policy.events, "event")
    return f"ok, {policy.mode.value}, {policy.source.describe()}, {commands}, {events}"


def _count(rights: Rights, noun: str) -> str:
    if rights.everything:
        return f"all {noun}s"
    return counted(len(rights.allowed), noun)


def _note(text: str) -> None:
    print(text, file=sys.stderr)
