# SPDX-License-Identifier: Apache-2.0
"""See what QEMU's main thread is doing, without touching it.

A thread that could not be used is not even stopped, and what the decision needs is
read before anything waits. May import ``abi``, ``errors``, ``newtypes``, ``linux``,
``qemu.parked`` and ``qemu.process``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmi_libvirt import linux
from kvmi_libvirt.errors import TargetBusy, TargetError, TargetGone, TargetUnsuitable
from kvmi_libvirt.newtypes import RemoteAddr
from kvmi_libvirt.qemu import parked

if TYPE_CHECKING:
    from kvmi_libvirt.qemu.process import Process


@dataclass(frozen=True, slots=True)
class Sight:
    """A wait, and the code that stands before its program counter."""

    wait: parked.Wait
    code: bytes


def look(process: Process) -> Sight:
    """Return the wait in which the main thread can be stopped.

    Raises
        TargetBusy        it is doing something else
        TargetUnsuitable  not permitted to look
        TargetGone        the process has ended
    """
    try:
        wait = parked.parse_wait(process.read("syscall"))
    except PermissionError as error:
        raise refusal(process, error) from error
    if wait is None:
        process.require_main_thread()
        raise busy(process, "it is at work")
    sight = Sight(wait, _code(process, wait))
    objection = parked.objection(sight.wait, sight.code)
    if objection is not None:
        raise busy(process, objection)
    return sight


def again(process: Process, earlier: Sight, wait: parked.Wait) -> Sight:
    """Return the sight of *wait*, where most is known from an *earlier* one."""
    is_same_place = wait.program_counter == earlier.wait.program_counter
    return Sight(wait, earlier.code if is_same_place else _code(process, wait))


def _code(process: Process, wait: parked.Wait) -> bytes:
    start = RemoteAddr(wait.program_counter - parked.CODE_LEN)
    try:
        return linux.process_vm_readv(process.pid, start, parked.CODE_LEN)
    except OSError as error:
        if process.is_ending(error):
            raise gone(process) from error
        raise busy(process, f"its code cannot be read ({error.strerror})") from error


def busy(process: Process, why: str) -> TargetBusy:
    """Return the error that says that the main thread cannot be used now."""
    return TargetBusy(
        f"the main thread of process {process.pid} is not waiting for events: {why}",
        pid=process.pid,
    )


def gone(process: Process) -> TargetGone:
    """Return the error that says that the process has ended."""
    return TargetGone(f"QEMU process {process.pid} has ended", pid=process.pid)


def refusal(process: Process, error: OSError) -> TargetError:
    """Return what it means that the kernel does not permit to trace the process."""
    if process.is_ending(error):
        return gone(process)
    tracer = process.tracer()
    reason = (
        f"process {tracer} traces it already"
        if tracer
        else "CAP_SYS_PTRACE is missing, or a security module forbids it"
    )
    return TargetUnsuitable(
        f"not permitted to trace process {process.pid}: {reason}", pid=process.pid
    )
