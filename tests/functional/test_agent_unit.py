# SPDX-License-Identifier: Apache-2.0
"""The system calls that the agent makes, against what its unit's SystemCallFilter allows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from agent_harness import CONTROL, INFO, READ, UNHOOK, WAIT_S, programs, site
from agent_rig import PROGRAM, write_policy
from patient_tool import PatientTool
from support import require_tool

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["programs"]

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

UNIT: Final = (
    Path(__file__).resolve().parents[2] / "packaging" / "systemd" / "kvmi-libvirt-agent.service"
)


def allowed_calls() -> set[str]:
    """Return the system calls that the unit allows, by name."""
    text = UNIT.read_text(encoding="utf-8")
    found: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.*)$", text, flags=re.M):
        names = _expanded(line.removeprefix("~").split())
        found = found - names if line.startswith("~") else found | names
    return found


def _expanded(words: Iterable[str]) -> set[str]:
    found = set()
    for word in words:
        if not word.startswith("@"):
            found.add(word)
            continue
        listed = subprocess.run(
            ["systemd-analyze", "syscall-filter", "--no-pager", word],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[1:]
        inner = [line.strip() for line in listed]
        found |= _expanded(name for name in inner if name and not name.startswith("#"))
    return found


def test_the_unit_allows_every_call_that_the_agent_and_its_workers_make(
    tmp_path: Path, programs: Path
) -> None:
    require_tool("strace", "strace")
    require_tool("systemd-analyze", "systemd")
    trace = tmp_path / "strace"
    program = ("strace", "-f", "-qq", "-o", str(trace), str(PROGRAM), "agent")
    rights = (INFO, CONTROL)
    with (
        site(tmp_path, programs, program=program) as host,
        PatientTool(host.tool_path) as tool,
    ):
        host.assign(commands=(INFO, READ, CONTROL), events=(UNHOOK,), unhook_s=1)
        host.agent.start()
        pid = host.agent.ping()["pid"]
        first, second = host.boot("first", "second")
        host.wait_rights(first, second, rights=(INFO, READ, CONTROL, UNHOOK))
        host.assign(reload=False, commands=rights, events=(UNHOOK,), unhook_s=1)
        os.kill(pid, signal.SIGHUP)
        host.wait_rights(first, second, rights=(*rights, UNHOOK))
        tool.drop(first.uuid)
        host.agent.wait(lambda: len(tool.connected()) == 2, what="it is called again")
        assert "kvmi_libvirt_vms" in host.agent.metrics()
        tool.subscribe(second.uuid, lets_go=False)
        write_policy(tmp_path)
        os.kill(pid, signal.SIGHUP)
        host.wait_state(second, "unhooked")
        host.shut(first)
        host.agent.wait(lambda: host.agent.ping()["vms"] == 1, what="it is forgotten")
        os.kill(pid, signal.SIGTERM)
        assert host.agent.process is not None
        assert host.agent.process.wait(WAIT_S) == 0
    made = set(
        re.findall(
            r"^\d+ +(?:<\.\.\. )?(\w+)[( ]",
            trace.read_text(encoding="utf-8", errors="replace"),
            flags=re.M,
        )
    )
    assert {"ptrace", "pidfd_getfd", "sched_setscheduler"} <= made
    assert made - allowed_calls() == set()
