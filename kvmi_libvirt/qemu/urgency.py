# SPDX-License-Identifier: Apache-2.0
"""How this process is scheduled while QEMU's main thread waits for it.

A visit is some hundred hand-overs between two processes. Each is quick when both
are on the same CPU and the tracer is run as soon as it is woken, and costs a wake-up
of another CPU, or a wait behind whatever else the host does, when not. Only our own
process is changed, for as long as QEMU is held. Imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import gc
import os
from dataclasses import dataclass
from typing import Final

# The lowest real-time priority: above all ordinary work, below any other of its kind.
_PRIORITY: Final = 1
_ORDINARY: Final = frozenset({os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE})


@dataclass(frozen=True, slots=True)
class _Scheduling:
    policy: int
    param: os.sched_param
    cpus: frozenset[int]
    is_collecting: bool


class Urgency:
    """What the process was like before it got urgent. One object for one visit."""

    def __init__(self) -> None:
        """Change nothing yet."""
        self._before: _Scheduling | None = None

    def begin(self) -> None:
        """Run before all ordinary work from now on, where that is permitted."""
        if self._before is not None:
            return
        self._before = _Scheduling(
            policy=os.sched_getscheduler(0),
            param=os.sched_getparam(0),
            cpus=frozenset(os.sched_getaffinity(0)),
            is_collecting=gc.isenabled(),
        )
        gc.disable()
        if self._before.policy & ~os.SCHED_RESET_ON_FORK not in _ORDINARY:
            return  # whoever made this process a real-time one knows better
        with contextlib.suppress(OSError):  # no CAP_SYS_NICE, no real-time in this cgroup
            policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, policy, os.sched_param(_PRIORITY))

    def move_to(self, cpu: int) -> None:
        """Run on *cpu* only, where this process may use it at all."""
        if self._before is not None and cpu in self._before.cpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {cpu})

    def end(self) -> None:
        """Be scheduled as before. Doing it twice is fine."""
        before, self._before = self._before, None
        if before is None:
            return
        # In this order: an ordinary process bound to one busy CPU can wait there for long.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before.cpus)
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, before.policy, before.param)
        if before.is_collecting:
            gc.enable()
