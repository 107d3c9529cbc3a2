# SPDX-License-Identifier: Apache-2.0
"""``doctor`` on this very machine, whatever is on it, as root and as nobody."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmi_libvirt.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
MAIN = "from kvmi_libvirt.cli import main; exit(main())"


def doctor(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", MAIN, "doctor", "--timeout", "5", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd="/",
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    "domain", [(), ("no-such-domain",), ("",), ("../../etc/passwd",), ("\x1b[31m",)]
)
def test_it_says_something_and_never_breaks(domain: tuple[str, ...]) -> None:
    done = doctor(*domain)

    assert done.stderr == ""
    assert done.returncode in set(ExitCode) - {ExitCode.HARM, ExitCode.USAGE}
    lines = done.stdout.splitlines()
    assert len(lines) > 10
    assert all(line.isprintable() and ": Checking " in line for line in lines)


def test_as_data_it_says_the_same() -> None:
    text, data = doctor(), doctor("--json")

    checks = json.loads(data.stdout)["checks"]
    assert data.returncode == text.returncode
    shown = re.findall(r" : (PASS|WARN|FAIL)", text.stdout)
    assert [check["verdict"] for check in checks] == shown


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody takes root")
def test_nobody_is_told_what_nobody_can_see() -> None:
    nobody = ("setpriv", "--reuid=nobody", "--clear-groups", "--regid=nogroup")
    can_read = subprocess.run(
        [
            *nobody,
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1]); import kvmi_libvirt.cli",
            str(ROOT),
        ],
        capture_output=True,
        check=False,
        cwd="/",
    )
    if can_read.returncode:
        pytest.skip(f"nobody cannot read {ROOT}; use a checkout that everybody can")

    done = doctor(prefix=nobody)

    assert done.stderr == ""
    root = [line for line in done.stdout.splitlines() if "that this is run by root" in line]
    assert "sudo kvmi-libvirt doctor" in root[0]
