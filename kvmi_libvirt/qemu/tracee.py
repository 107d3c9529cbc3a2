# SPDX-License-Identifier: Apache-2.0
"""One thread of QEMU, held stopped for some microseconds, that can be called through.

The thread is only taken while it is parked in a blocking call whose early return
every event loop expects, so that even the death of this process in the middle
amounts to "a poll returned early". No text is patched, no PTRACE_O_EXITKILL is
set, every signal that arrives meanwhile is handed back.

All calls must come from the OS thread that attached. May import ``abi``,
``errors``, ``newtypes``, ``linux`` and ``qemu.process``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from kvmi_libvirt import linux
from kvmi_libvirt.abi import ptrace as pt
from kvmi_libvirt.abi import x86_64 as x86
from kvmi_libvirt.errors import (
    KvmiLibvirtError,
    RemoteCallTimeout,
    RestoreFailed,
    TargetBusy,
    TargetGone,
    TargetUnsuitable,
    TraceError,
)
from kvmi_libvirt.newtypes import RemoteAddr, Tid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmi_libvirt.qemu.process import Process

logger = logging.getLogger(__name__)

_TICK_S: Final = 0.02
_GRACE_S: Final = 0.5
_MAX_INTERRUPTED: Final = 16
_WORD: Final = 0xFFFF_FFFF_FFFF_FFFF


def _trace_nothing(_point: str) -> None:
    # Tests replace _trace to die, or to interfere, at a named point.
    return


_trace: Callable[[str], None] = _trace_nothing


@dataclass(frozen=True, slots=True)
class _Signal:
    number: int
    siginfo: bytes


def start_deadline_timer() -> None:
    """Make :func:`linux.wait_stop` return every now and then, so that deadlines work.

    Takes SIGALRM of the whole process: call it in a worker process only.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, _TICK_S, _TICK_S)


def stop_deadline_timer() -> None:
    """End what :func:`start_deadline_timer` began: an idle process must not wake up."""
    signal.setitimer(signal.ITIMER_REAL, 0, 0)


class Tracee:
    """The parked main thread of *process*, from :meth:`attach` to :meth:`release`.

    Use it through :func:`attach_parked`, which releases on every path.

    Parameters
        process   identified before; borrowed
        deadline  CLOCK_MONOTONIC seconds; a call blocked beyond it is abandoned
    """

    def __init__(self, process: Process, *, deadline: float) -> None:
        """Note what to do; nothing is attached yet."""
        self._process = process
        self._tid = process.main_thread
        self._deadline = deadline
        self._saved = x86.user_regs_struct()
        self._stopped = False
        self._dirty = False  # registers differ from the saved ones
        self._is_parked = False
        self._signals: list[_Signal] = []
        self.stopped_at_s = 0.0
        self.stall_s = 0.0

    # -- attaching -------------------------------------------------------------------

    def attach(self) -> None:
        """Attach, stop the thread and check that it is parked.

        Raises
            TargetBusy        not parked; it runs on, nothing was touched
            TargetUnsuitable  not permitted, or 32-bit
            TargetGone        the process has ended
        """
        self._seize()
        try:
            # The pid could have been re-used between identification and SEIZE.
            self._process.require_alive()
            self._trace_call("PTRACE_INTERRUPT", linux.ptrace_interrupt)
            self._wait_event_stop()
            _trace("stopped")
            self._saved = linux.ptrace_getregs(self._tid)
            self._require_parked()
            self.stopped_at_s = time.monotonic()
        except BaseException:
            self.release()
            raise

    def _seize(self) -> None:
        try:
            linux.ptrace_seize(self._tid, pt.PTRACE_O_TRACESYSGOOD)
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise TargetGone(
                    f"QEMU process {self._process.pid} has ended", pid=self._process.pid
                ) from error
            if error.errno == errno.EPERM and self._process.is_ending(error):
                raise TargetGone(
                    f"QEMU process {self._process.pid} has ended", pid=self._process.pid
                ) from error
            if error.errno == errno.EPERM:
                tracer = self._process.tracer()
                reason = (
                    f"process {tracer} traces it already"
                    if tracer
                    else "CAP_SYS_PTRACE is missing, or a security module forbids it"
                )
                raise TargetUnsuitable(
                    f"not permitted to trace process {self._process.pid}: {reason}",
                    pid=self._process.pid,
                ) from error
            raise TraceError(
                error.errno or 0, "could not attach", call="PTRACE_SEIZE", tid=self._tid
            ) from error
        _trace("seized")

    def _wait_event_stop(self) -> None:
        # A signal-delivery stop may come before ours. Nothing is injected yet, so
        # the signal is simply delivered and the interrupt stays pending.
        while True:
            status = self._wait()
            event, number = status >> 16, os.WSTOPSIG(status)
            if event == pt.PTRACE_EVENT_STOP:
                return
            self._stopped = False
            linux.ptrace_cont(self._tid, 0 if number == signal.SIGTRAP | 0x80 else number)

    def _require_parked(self) -> None:
        regs = self._saved
        if regs.cs != x86.USER_CS:
            raise TargetUnsuitable(
                f"the main thread of process {self._process.pid} runs 32-bit code",
                pid=self._process.pid,
            )
        result = _signed(regs.rax)
        interrupted = result in x86.RESTART_CODES or (
            # epoll_wait(2) is never restarted: being interrupted already made it EINTR.
            result == -errno.EINTR and regs.orig_rax in x86.EPOLL_CALLS
        )
        parked = interrupted and self._called_by_code(regs)
        if not parked:
            raise TargetBusy(
                f"the main thread of process {self._process.pid} is not waiting for events "
                f"(system call {_signed(regs.orig_rax)}, result {result})",
                pid=self._process.pid,
            )
        self._is_parked = True

    def _called_by_code(self, regs: x86.user_regs_struct) -> bool:
        # The thread must stand behind a syscall instruction, which we use again. A
        # poll(2) interrupted for the second time is in restart_syscall(2), like a
        # sleep would be: the code that made the call tells which it is.
        expected = x86.SYSCALL_INSTRUCTION
        if regs.orig_rax == x86.NR_RESTART_SYSCALL:
            expected = x86.MOV_POLL_TO_EAX + expected
        elif regs.orig_rax not in x86.PARKED_CALLS:
            return False
        address = RemoteAddr(regs.rip - len(expected))
        return linux.process_vm_readv(self._process.pid, address, len(expected)) == expected

    # -- calling ---------------------------------------------------------------------

    @property
    def stack_pointer(self) -> RemoteAddr:
        """Return the thread's stack pointer as it was when it was stopped."""
        return RemoteAddr(self._saved.rsp)

    def syscall(self, number: int, *args: int) -> int:
        """Let the thread make one system call; return its result, -4095..-1 for an errno.

        Must return at once: a call that blocks until the deadline is abandoned.
        Never pass a call that leaves a restart block (timed poll, nanosleep, futex)
        or one that QEMU's sandbox kills for (fork, execve, setuid).

        Raises
            RemoteCallTimeout  blocked beyond the deadline; the call was abandoned
            TargetGone         the process ended; nothing is left to undo
        """
        for _ in range(_MAX_INTERRUPTED):
            # We may have been starved: nobody waits for the result any more.
            if time.monotonic() > self._deadline:
                raise RemoteCallTimeout(
                    errno.ETIMEDOUT, "a call", "not made, the deadline has passed"
                )
            result = self._syscall_once(number, args)
            if result not in x86.RESTART_CODES:
                return result
            # A signal interrupted the call before it did anything. The signal is
            # remembered at its own stop, which comes next; then call again.
        return -errno.EINTR

    def _syscall_once(self, number: int, args: tuple[int, ...]) -> int:
        regs = x86.user_regs_struct.from_buffer_copy(self._saved)
        regs.rip = self._saved.rip - len(x86.SYSCALL_INSTRUCTION)
        regs.rax = number
        regs.orig_rax = _WORD  # else the kernel may step rip back once more
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), args, strict=False):
            setattr(regs, name, value & _WORD)
        self._dirty = True
        self._trace_call("PTRACE_SETREGS", lambda tid: linux.ptrace_setregs(tid, regs))
        _trace("call-prepared")
        try:
            return self._run_prepared(number)
        except RemoteCallTimeout:
            self._skip_entered_call()
            raise

    def _run_prepared(self, number: int) -> int:
        self._resume_to_syscall_stop()
        info = linux.ptrace_syscall_info(self._tid)
        if info.op != pt.PTRACE_SYSCALL_INFO_ENTRY or info.entry.nr != number:
            self._unexpected_stop(f"op {info.op} instead of the entry of call {number}")
        _trace("call-entered")
        self._resume_to_syscall_stop()
        info = linux.ptrace_syscall_info(self._tid)
        if info.op != pt.PTRACE_SYSCALL_INFO_EXIT:
            self._unexpected_stop(f"op {info.op} instead of the exit of call {number}")
        _trace("call-returned")
        return int(info.exit.rval)

    def _skip_entered_call(self) -> None:
        # Abandoned between two stops: if the call was entered but has not run yet,
        # make it no call at all, so that the next one starts from an exit stop.
        if linux.ptrace_syscall_info(self._tid).op != pt.PTRACE_SYSCALL_INFO_ENTRY:
            return
        self.extend_deadline(time.monotonic() + _GRACE_S)
        regs = linux.ptrace_getregs(self._tid)
        regs.orig_rax = _WORD
        linux.ptrace_setregs(self._tid, regs)
        self._resume_to_syscall_stop()

    def extend_deadline(self, deadline: float) -> None:
        """Allow calls until *deadline* (CLOCK_MONOTONIC seconds), for undoing what was done."""
        self._deadline = max(self._deadline, deadline)

    def _resume_to_syscall_stop(self) -> None:
        while True:
            self._stopped = False
            self._trace_call("PTRACE_SYSCALL", linux.ptrace_syscall)
            status = self._wait()
            event, number = status >> 16, os.WSTOPSIG(status)
            if event == 0 and number == signal.SIGTRAP | pt.SYSCALL_STOP_BIT:
                return
            self._keep_signal_of(status)
            # An event stop (group-stop, or SIGCONT ended one) needs nothing.

    def _unexpected_stop(self, what: str) -> NoReturn:
        raise TraceError(0, f"unexpected stop: {what}", call="PTRACE_SYSCALL", tid=self._tid)

    def _wait(self) -> int:
        # Returns the status of a stop. At the deadline the call in progress is
        # interrupted: its exit stop follows, and the wait goes on until it does,
        # because only a stopped thread can be given its registers back.
        interrupted = False
        while True:
            status = linux.wait_stop(self._tid)
            if status is None:
                if time.monotonic() > self._deadline and not interrupted:
                    interrupted = True
                    self._trace_call("PTRACE_INTERRUPT", linux.ptrace_interrupt)
                continue
            if not os.WIFSTOPPED(status):
                self._stopped = self._dirty = False
                raise TargetGone(
                    f"QEMU process {self._process.pid} ended while it was served",
                    pid=self._process.pid,
                )
            self._stopped = True
            if interrupted:
                self._keep_signal_of(status)
                raise RemoteCallTimeout(
                    errno.ETIMEDOUT, "a call", "blocked beyond the deadline and was abandoned"
                )
            return status

    def _trace_call(self, name: str, call: Callable[[Tid], None]) -> None:
        try:
            call(self._tid)
        except OSError as error:
            if error.errno == errno.ESRCH and self._process.is_ending(error):
                self._stopped = self._dirty = False
                raise TargetGone(
                    f"QEMU process {self._process.pid} has ended", pid=self._process.pid
                ) from error
            raise TraceError(
                error.errno or 0, "could not continue", call=name, tid=self._tid
            ) from error

    # -- releasing -------------------------------------------------------------------

    def release(self) -> None:
        """Restore the registers, detach and hand signals back; the thread continues its call.

        Doing it twice is fine.

        Raises
            RestoreFailed  the registers could not be put back: the VM may be harmed
        """
        try:
            self._stop_if_running()
            if not self._stopped:
                return
            _trace("before-restore")
            if self._dirty or self._must_rewind():
                linux.ptrace_setregs(self._tid, self._as_if_undisturbed())
                self._dirty = False
            _trace("restored")
            self._detach()
        except (TargetGone, ProcessLookupError):
            return
        except OSError as error:
            registers = {name: hex(getattr(self._saved, name)) for name in x86.REGISTERS}
            logger.critical(
                "thread %d of QEMU could not be given its registers back: %s", self._tid, registers
            )
            raise RestoreFailed(
                error.errno or 0,
                f"could not restore QEMU's main thread; its registers were {registers}",
                call="PTRACE_SETREGS",
                tid=self._tid,
            ) from error
        finally:
            self._stopped = False
            if self.stopped_at_s:
                self.stall_s = time.monotonic() - self.stopped_at_s

    def _must_rewind(self) -> bool:
        # The kernel restarts poll(2) and ppoll(2) by itself, but makes EINTR of an
        # epoll_wait(2) that was merely stopped, signal(7). Where it waits for ever it
        # can be made again; with a timeout nobody knows how much of it is left.
        return (
            self._is_parked
            and not self._signals
            and self._saved.orig_rax in x86.EPOLL_CALLS
            and _signed(self._saved.rax) == -errno.EINTR
            and self._waits_for_ever()
        )

    def _waits_for_ever(self) -> bool:
        if self._saved.orig_rax == x86.NR_EPOLL_PWAIT2:
            return bool(self._saved.r10 == 0)
        return ctypes.c_int32(self._saved.r10 & 0xFFFF_FFFF).value < 0

    def _as_if_undisturbed(self) -> x86.user_regs_struct:
        if not self._must_rewind():
            return self._saved
        regs = x86.user_regs_struct.from_buffer_copy(self._saved)
        regs.rip -= len(x86.SYSCALL_INSTRUCTION)
        regs.rax = self._saved.orig_rax
        regs.orig_rax = _WORD
        return regs

    def _stop_if_running(self) -> None:
        # Only after a failed wait or resume; ordinarily the thread is stopped here.
        if self._stopped:
            return
        try:
            linux.ptrace_interrupt(self._tid)
        except ProcessLookupError:
            return
        while True:
            status = linux.wait_stop(self._tid)
            if status is None:
                continue
            if os.WIFSTOPPED(status):
                self._stopped = True
                self._keep_signal_of(status)
            return

    def _keep_signal_of(self, status: int) -> None:
        # A signal-delivery stop is the only trace of the signal: note it now.
        event, number = status >> 16, os.WSTOPSIG(status)
        if event == 0 and number != signal.SIGTRAP | pt.SYSCALL_STOP_BIT:
            self._signals.append(_Signal(number, linux.ptrace_getsiginfo(self._tid)))
            logger.debug("signal %d kept for thread %d", number, self._tid)

    def _detach(self) -> None:
        # The restart of the interrupted call is decided on the way out of DETACH,
        # which always passes the signal path; plain CONT from here would not.
        if not self._signals:
            linux.ptrace_detach(self._tid)
            return
        # A signal kept from the thread is queued again and caught at its delivery,
        # where its original siginfo can be put back. It then interrupts the
        # restored call exactly as it would have done without us.
        first, *rest = self._signals
        linux.tgkill(self._process.pid, self._tid, first.number)
        for kept in rest:
            linux.tgkill(self._process.pid, self._tid, kept.number)
        # Whatever became of that signal, an event stop comes: CONT alone could let
        # the thread see its restart code as a result.
        linux.ptrace_interrupt(self._tid)
        linux.ptrace_cont(self._tid)
        event_stops = 0
        while True:
            status = linux.wait_stop(self._tid)
            if status is None:  # the signal came to nothing: get hold of the thread again
                linux.ptrace_interrupt(self._tid)
                continue
            if not os.WIFSTOPPED(status):
                return
            event, number = status >> 16, os.WSTOPSIG(status)
            if event == pt.PTRACE_EVENT_STOP:
                event_stops += 1
                if event_stops > 1:
                    linux.ptrace_detach(self._tid)
                    return
                linux.ptrace_cont(self._tid)
                continue
            if number == first.number:
                linux.ptrace_setsiginfo(self._tid, first.siginfo)
            linux.ptrace_detach(self._tid, number)
            return


def _signed(value: int) -> int:
    return ctypes.c_int64(value).value


_held: dict[int, Tracee] = {}


@contextlib.contextmanager
def hold(process: Process, *, deadline: float) -> Iterator[Tracee]:
    """Keep the main thread stopped for the whole block, and for every visit in it.

    QEMU's main loop stands still meanwhile: only for moments in which nobody may be
    served anyhow, as before a guest's first instruction. All visits must come from
    this thread.

    Parameters
        deadline  CLOCK_MONOTONIC seconds, for getting hold of it; each visit has its own
    """
    with attach_parked(process, deadline=deadline) as tracee:
        _held[process.pid] = tracee
        try:
            yield tracee
        finally:
            del _held[process.pid]


@contextlib.contextmanager
def attach_parked(process: Process, *, deadline: float) -> Iterator[Tracee]:
    """Hold the main thread for the block, retrying while it is busy.

    Backs off from 0.5 ms to 20 ms between tries: a busy main loop is caught
    between two events.

    Raises
        TargetBusy  not found parked until the deadline; nothing was touched
        TargetGone  the process ended, whatever was being done; nothing is left to undo
    """
    held = _held.get(process.pid)
    try:
        if held is not None:
            held.extend_deadline(deadline)
            yield held
            return
        tracee = _entered(process, deadline)
        try:
            yield tracee
        finally:
            tracee.release()
    except TargetGone:
        raise
    except (KvmiLibvirtError, OSError) as error:
        # Any request to a dying process can be the one that says so.
        if process.is_ending(error):
            raise TargetGone(f"QEMU process {process.pid} has ended", pid=process.pid) from error
        raise


def _entered(process: Process, deadline: float) -> Tracee:
    delay = 0.0005
    tries = 0
    while True:
        tracee = Tracee(process, deadline=deadline)
        try:
            tracee.attach()
            return tracee
        except TargetBusy as busy:
            tries += 1
            if time.monotonic() + delay > deadline:
                raise TargetBusy(f"{busy}; tried {tries} times", pid=process.pid) from busy
        time.sleep(delay)
        delay = min(delay * 2, 0.02)
