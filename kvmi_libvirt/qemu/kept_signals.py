# SPDX-License-Identifier: Apache-2.0
"""Signals that met the thread while it was held, and how it gets them back.

A signal-delivery stop is the only trace of its signal, and no signal may be delivered
while the thread makes our calls. So it is kept, queued again once the thread has its
own registers back, and caught at its delivery, where the siginfo it came with is put
back. It then interrupts the restored call exactly as it would have done without us.
May import ``abi``, ``linux`` and ``newtypes``.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux
from kvmi_libvirt.abi import ptrace as pt

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.newtypes import Tid
    from kvmi_libvirt.qemu.process import Process

logger = logging.getLogger(__name__)

_SI_CODE: Final = struct.Struct("=8xi")
_SI_TKILL: Final = -6
# How long the thread is followed into a handler that blocks a further kept signal.
_HANDLER_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class _Signal:
    number: int
    siginfo: bytes


class KeptSignals:
    """The signals kept from one thread, in the order in which they came."""

    def __init__(self, process: Process) -> None:
        """Keep for the main thread of *process*; borrowed."""
        self._process = process
        self._tid = process.main_thread
        self._kept: list[_Signal] = []

    def __bool__(self) -> bool:
        """Say whether any signal is kept."""
        return bool(self._kept)

    def keep(self, number: int) -> None:
        """Note the signal at whose delivery the thread is stopped now."""
        self._kept.append(_Signal(number, linux.ptrace_getsiginfo(self._tid)))
        logger.debug("signal %d kept for thread %d", number, self._tid)

    def hand_back(self, next_stop: Callable[[], int | None]) -> None:
        """Detach from the thread, giving it all that is kept.

        Parameters
            next_stop  waits for the thread to stop and returns the wait status, or None
                       every now and then
        Raises
            OSError  the thread is still traced; the signals are queued for it all the same
        """
        for signal in self._kept:
            linux.tgkill(self._process.pid, self._tid, signal.number)
        # The thread may be at a syscall-exit stop. To go on from there with the restored
        # registers it must first pass the signal path: an event stop makes it do so,
        # whatever becomes of the signals, where CONT alone could show it a restart code.
        linux.ptrace_interrupt(self._tid)
        linux.ptrace_cont(self._tid)
        until = None
        while True:
            status = next_stop()
            if status is None:
                if until is not None and time.monotonic() > until:
                    linux.ptrace_interrupt(self._tid)
                continue
            number = os.WSTOPSIG(status)
            if status >> 16 == pt.PTRACE_EVENT_STOP:
                pending, blocked = _pending_and_blocked(self._process, self._tid)
                waiting = {signal.number for signal in self._kept} & pending
                is_late = until is not None and time.monotonic() > until
                if not waiting or (waiting <= blocked and is_late):
                    linux.ptrace_detach(self._tid)
                    return
                if waiting <= blocked and until is None:
                    until = time.monotonic() + _HANDLER_S
                linux.ptrace_cont(self._tid)
                continue
            until = None  # as long again for the next one
            self._put_siginfo_back(number)
            if not self._kept:
                linux.ptrace_detach(self._tid, number)
                return
            linux.ptrace_interrupt(self._tid)
            linux.ptrace_cont(self._tid, number)

    def _put_siginfo_back(self, number: int) -> None:
        # A signal that came anew meanwhile has its own siginfo and keeps it.
        kept = next((signal for signal in self._kept if signal.number == number), None)
        if kept is None:
            return
        (code,) = _SI_CODE.unpack_from(linux.ptrace_getsiginfo(self._tid))
        if code == _SI_TKILL:
            linux.ptrace_setsiginfo(self._tid, kept.siginfo)
            self._kept.remove(kept)


def _pending_and_blocked(process: Process, tid: Tid) -> tuple[set[int], set[int]]:
    masks = {}
    for line in process.read(f"task/{tid}/status").splitlines():
        name, _, value = line.partition(b":")
        if name in (b"SigPnd", b"SigBlk"):
            masks[name] = int(value, 16)
    return _numbers(masks[b"SigPnd"]), _numbers(masks[b"SigBlk"])


def _numbers(mask: int) -> set[int]:
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}
