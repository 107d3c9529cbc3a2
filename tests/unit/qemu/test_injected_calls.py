# SPDX-License-Identifier: Apache-2.0
"""Which system calls can ever be injected into QEMU.

Its sandbox ends the process for some (execve, fork, setuid), and others would open a way out
of its confinement. So a call that is new here is a decision, not a detail.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

QEMU: Final = Path(__file__).resolve().parents[3] / "kvmi_libvirt" / "qemu"

INJECTED: Final = {"NR_IOCTL", "NR_SOCKETPAIR", "NR_RECVMSG", "NR_CLOSE"}


def test_only_these_calls_are_made_by_name() -> None:
    tree = ast.parse((QEMU / "remote.py").read_text(encoding="utf-8"))
    calls = [
        node.args[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "call"
    ]
    numbers = {node.attr for node in calls if isinstance(node, ast.Attribute)}

    assert len(calls) == len(INJECTED)
    assert numbers == INJECTED


def test_calls_are_injected_by_that_module_alone() -> None:
    package = QEMU.parent
    callers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if ".syscall(" in path.read_text(encoding="utf-8")
    }

    assert callers == {"qemu/remote.py"}
