# SPDX-License-Identifier: Apache-2.0
"""How many requests a visit makes of the kernel: each is a part of QEMU's stall.

Counted in a rehearsal, whose thread is this very process.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import pytest
import rig

from kvmi_libvirt import linux, session
from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.qemu import rehearsal

OTHER_CALLS = 5  # socketpair, recvmsg, and three of close


def requests_of_a_hook(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    found: Counter[str] = Counter()

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any) -> Any:
            found[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, counting)

    for name in dir(rehearsal._OwnThread):
        if name.startswith(("ptrace_", "wait_")):
            counted(rehearsal._OwnThread, name)
    counted(linux, "process_vm_writev")
    near, far = socket.socketpair()
    with near, far:
        handover = session._Handover(near, bytes(16))
        rehearsal.rehearse(lambda remote: session._rehearse_hook(remote, rig.full_plan(), handover))
    return found


def test_a_visit_writes_once_and_makes_six_requests_for_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = rig.full_plan()
    ioctls = sum(step.ioctl in (Ioctl.HOOK, Ioctl.COMMAND, Ioctl.EVENT) for step in plan.steps)
    calls = ioctls + OTHER_CALLS

    found = requests_of_a_hook(monkeypatch)

    assert ioctls == len(plan.steps) == 33
    assert found == {
        "ptrace_seize": 1,
        "ptrace_interrupt": 1,
        "ptrace_getregs": 1,
        "process_vm_writev": 1,
        "ptrace_setregs": calls + 1,  # and they are given back
        "ptrace_syscall": 2 * calls,
        "wait_stop": 2 * calls + 1,
        "ptrace_syscall_info": calls,
        "ptrace_detach": 1,
    }
