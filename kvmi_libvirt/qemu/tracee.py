# SPDX-License-Identifier: Apache-2.0
"""One thread of QEMU, held stopped for a moment, that can be called through.

The thread is only taken while it is parked in a blocking call whose early return
every event loop expects, so that even the death of this process in the middle
amounts to "a poll returned early". No text is patched, no PTRACE_O_EXITKILL is
set, every signal that arrives meanwhile is handed back.

All calls must come from the OS thread that attached. May import ``abi``, ``errors``,
``newtypes``, ``linux`` and the rest of ``qemu`` but ``remote``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

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
from kvmi_libvirt.newtypes import RemoteAddr
from kvmi_libvirt.qemu import parked
from kvmi_libvirt.qemu.kept_signals import KeptSignals
from kvmi_libvirt.qemu.looking import Sight, again, busy, gone, look, refusal
from kvmi_libvirt.qemu.urgency import Urgency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmi_libvirt.newtypes import Tid
    from kvmi_libvirt.qemu.process import Process

logger = logging.getLogger(__name__)

_TICK_S: Final = 0.02
_GRACE_S: Final = 0.5
_BUSY_S: Final = 3.0
_MIN_TRIES: Final = 10
_MAX_INTERRUPTED: Final = 16
_WORD: Final = 0xFFFF_FFFF_FFFF_FFFF
_SYSCALL_STOP: Final = signal.SIGTRAP | pt.SYSCALL_STOP_BIT


def _trace_nothing(_point: str) -> None:
    # Tests replace _trace to die, or to interfere, at a named point.
    return


_trace: Callable[[str], None] = _trace_nothing


class PtraceKernel(Protocol):
    """What a Tracee asks of the kernel: :mod:`kvmi_libvirt.linux` is one."""

    def ptrace_seize(self, tid: Tid, options: int) -> None:
        """Attach."""

    def ptrace_interrupt(self, tid: Tid) -> None:
        """Ask for a stop."""

    def ptrace_getregs(self, tid: Tid) -> x86.user_regs_struct:
        """Return a copy of the registers."""

    def ptrace_setregs(self, tid: Tid, regs: x86.user_regs_struct) -> None:
        """Replace the registers."""

    def ptrace_syscall(self, tid: Tid, signal: int = 0) -> None:
        """Go on to the next entry or exit of a system call."""

    def ptrace_cont(self, tid: Tid, signal: int = 0) -> None:
        """Go on."""

    def ptrace_detach(self, tid: Tid, signal: int = 0) -> None:
        """Let go."""

    def ptrace_syscall_info(self, tid: Tid) -> pt.ptrace_syscall_info:
        """Return what kind of stop this is."""

    def wait_stop(self, tid: Tid) -> int | None:
        """Return the wait status of the next stop; None at a tick of a timer."""


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
        kernel    another than the one that runs, for a rehearsal
    """

    def __init__(
        self, process: Process, *, deadline: float, kernel: PtraceKernel | None = None
    ) -> None:
        """Note what to do; nothing is attached yet."""
        self._kernel: PtraceKernel = linux if kernel is None else kernel
        self._trace = _trace if kernel is None else _trace_nothing
        self._process = process
        self._tid = process.main_thread
        self._deadline = deadline
        self._saved = x86.user_regs_struct()
        self._regs = x86.user_regs_struct()  # for our calls
        self._stopped = False
        self._dirty = False  # registers differ from the saved ones
        self._is_parked = False
        self._signals = KeptSignals(process)
        self._urgency = Urgency()
        self.stopped_at_s = 0.0
        self.stall_s = 0.0

    # -- attaching -------------------------------------------------------------------

    def attach(self) -> None:
        """Attach to the thread and stop it, if it is parked.

        Raises
            TargetBusy        not parked; it runs on, nothing was touched
            TargetUnsuitable  not permitted, or 32-bit
            TargetGone        the process has ended
        """
        self.take(look(self._process))

    def take(self, looked: Sight) -> None:
        """Attach to the thread that was seen in a wait; else as :meth:`attach`."""
        self._seize()
        try:
            # The pid could have been re-used between identification and SEIZE.
            self._process.require_alive()
            self.hurry()
            self._request("PTRACE_INTERRUPT", self._kernel.ptrace_interrupt)
            self._wait_event_stop()
            self.stopped_at_s = time.monotonic()
            self._trace("stopped")
            self._saved = self._kernel.ptrace_getregs(self._tid)
            self._require_parked(looked)
            self._regs = parked.call_registers(self._saved)
        except BaseException:
            self.release()
            raise

    def _seize(self) -> None:
        try:
            self._kernel.ptrace_seize(self._tid, pt.PTRACE_O_TRACESYSGOOD)
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise gone(self._process) from error
            if error.errno == errno.EPERM:
                raise refusal(self._process, error) from error
            raise TraceError(
                error.errno or 0, "could not attach", call="PTRACE_SEIZE", tid=self._tid
            ) from error
        self._trace("seized")

    def _wait_event_stop(self) -> None:
        # A signal-delivery stop may come before ours. Nothing is injected yet, so
        # the signal is simply delivered and the interrupt stays pending. There is no
        # way back but through the stop: only a stopped thread can be let go.
        while True:
            status = self._next_stop()
            if status is None:
                continue
            event, number = status >> 16, os.WSTOPSIG(status)
            if event == pt.PTRACE_EVENT_STOP:
                if time.monotonic() > self._deadline:
                    raise busy(self._process, "it did not stop in time")
                return
            self._stopped = False
            self._kernel.ptrace_cont(self._tid, 0 if number == _SYSCALL_STOP else number)

    def _require_parked(self, looked: Sight) -> None:
        regs = self._saved
        if regs.cs != x86.USER_CS:
            raise TargetUnsuitable(
                f"the main thread of process {self._process.pid} runs 32-bit code",
                pid=self._process.pid,
            )
        # It may have gone on since it was looked at, as a rule to where it was before.
        sight = again(self._process, looked, parked.wait_of(regs))
        if not parked.is_interrupted(regs):
            raise busy(self._process, "it has just been given something to do")
        if objection := parked.objection(sight.wait, sight.code):
            raise busy(self._process, objection)
        self._is_parked = True

    def hurry(self) -> None:
        """Be scheduled at once, and where the thread is, while it waits for us."""
        self._urgency.begin()
        self._urgency.move_to(self._process.cpu())

    def rest(self) -> None:
        """Be scheduled as any process, for a pause between calls."""
        self._urgency.end()

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
        regs = self._regs
        regs.rax = number
        regs.orig_rax = _WORD  # else the kernel may step rip back once more
        regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9 = (*args, 0, 0, 0, 0, 0, 0)[:6]
        self._dirty = True
        try:
            self._kernel.ptrace_setregs(self._tid, regs)
        except OSError as error:
            self._fail("PTRACE_SETREGS", error)
        self._trace("call-prepared")
        try:
            self._resume_to_syscall_stop()
            self._trace("call-entered")
            self._resume_to_syscall_stop()
        except RemoteCallTimeout:
            self._skip_entered_call()
            raise
        # Entry and exit alternate: were the first stop not the entry, this is no exit.
        info = self._kernel.ptrace_syscall_info(self._tid)
        if info.op != pt.PTRACE_SYSCALL_INFO_EXIT or info.instruction_pointer != self._saved.rip:
            self._unexpected_stop(f"op {info.op} instead of the exit of call {number}")
        self._trace("call-returned")
        return int(info.exit.rval)

    def _skip_entered_call(self) -> None:
        # Abandoned between two stops: if the call was entered but has not run yet,
        # make it no call at all, so that the next one starts from an exit stop.
        if self._kernel.ptrace_syscall_info(self._tid).op != pt.PTRACE_SYSCALL_INFO_ENTRY:
            return
        self.extend_deadline(time.monotonic() + _GRACE_S)
        regs = self._kernel.ptrace_getregs(self._tid)
        regs.orig_rax = _WORD
        self._kernel.ptrace_setregs(self._tid, regs)
        self._resume_to_syscall_stop()

    def extend_deadline(self, deadline: float) -> None:
        """Allow calls until *deadline* (CLOCK_MONOTONIC seconds), for undoing what was done."""
        self._deadline = max(self._deadline, deadline)

    def _resume_to_syscall_stop(self) -> None:
        while True:
            self._stopped = False
            try:
                self._kernel.ptrace_syscall(self._tid)
            except OSError as error:
                self._fail("PTRACE_SYSCALL", error)
            status = self._wait()
            if status >> 16 == 0 and os.WSTOPSIG(status) == _SYSCALL_STOP:
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
            status = self._next_stop()
            if status is None:
                if time.monotonic() > self._deadline and not interrupted:
                    interrupted = True
                    self._request("PTRACE_INTERRUPT", self._kernel.ptrace_interrupt)
                continue
            if interrupted:
                self._keep_signal_of(status)
                raise RemoteCallTimeout(
                    errno.ETIMEDOUT, "a call", "blocked beyond the deadline and was abandoned"
                )
            return status

    def _next_stop(self) -> int | None:
        # None at a tick of the timer.
        status = self._kernel.wait_stop(self._tid)
        if status is None:
            if not self._process.has_main_thread():
                self._stopped = self._dirty = False
                raise gone(self._process)
        elif os.WIFSTOPPED(status):
            self._stopped = True
        else:
            self._stopped = self._dirty = False
            raise gone(self._process)
        return status

    def _request(self, name: str, request: Callable[..., None], *args: object) -> None:
        try:
            request(self._tid, *args)
        except OSError as error:
            self._fail(name, error)

    def _fail(self, name: str, error: OSError) -> NoReturn:
        if error.errno == errno.ESRCH and self._process.is_ending(error):
            self._stopped = self._dirty = False
            raise gone(self._process) from error
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
            self._trace("before-restore")
            self._restore()
            self._trace("restored")
            self._detach()
        except (TargetGone, ProcessLookupError):
            return
        except OSError as error:
            registers = {name: hex(getattr(self._saved, name)) for name in x86.REGISTERS}
            logger.critical(
                "thread %d of QEMU could not be given its registers back: %s", self._tid, registers
            )
            with contextlib.suppress(OSError):  # stopped for ever would be no better
                self._kernel.ptrace_detach(self._tid)
            raise RestoreFailed(
                error.errno or 0,
                f"could not restore QEMU's main thread; its registers were {registers}",
                call="PTRACE_SETREGS",
                tid=self._tid,
            ) from error
        finally:
            self._stopped = False
            if self.stopped_at_s and not self.stall_s:
                self.stall_s = time.monotonic() - self.stopped_at_s
            self._urgency.end()

    def _restore(self) -> None:
        # With a signal to come the call ends with EINTR in any case.
        make_again = (
            self._is_parked
            and not self._signals
            and not parked.is_restarted_by_the_kernel(self._saved)
        )
        if make_again:
            self._kernel.ptrace_setregs(self._tid, parked.made_again(self._saved))
        elif self._dirty:
            self._kernel.ptrace_setregs(self._tid, self._saved)
        self._dirty = False

    def _stop_if_running(self) -> None:
        # Only after a failed wait or resume; ordinarily the thread is stopped here.
        if self._stopped:
            return
        self._kernel.ptrace_interrupt(self._tid)
        while (status := self._next_stop()) is None:
            pass
        self._keep_signal_of(status)

    def _keep_signal_of(self, status: int) -> None:
        number = os.WSTOPSIG(status)
        if status >> 16 == 0 and number != _SYSCALL_STOP:
            self._signals.keep(number)

    def _detach(self) -> None:
        # The restart of the interrupted call is decided on the way out of DETACH,
        # which always passes the signal path; plain CONT from here would not.
        if self._signals:
            self._signals.hand_back(self._next_stop)
        else:
            self._kernel.ptrace_detach(self._tid)


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
        tracee.rest()
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
        TargetBusy  not found parked for three seconds, or until the deadline; nothing
                    was touched
        TargetGone  the process ended, whatever was being done; nothing is left to undo
    """
    held = _held.get(process.pid)
    try:
        if held is not None:
            held.extend_deadline(deadline)
            held.hurry()
            try:
                yield held
            finally:
                held.rest()
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
            raise gone(process) from error
        raise


def _entered(process: Process, deadline: float) -> Tracee:
    # Between two tries on a busy host seconds can pass: count them as well.
    give_up = min(deadline, time.monotonic() + _BUSY_S)
    delay = 0.0005
    tries = 0
    while True:
        tracee = Tracee(process, deadline=deadline)
        try:
            tracee.attach()
            return tracee
        except TargetBusy as error:
            tries += 1
            next_try = time.monotonic() + delay
            if next_try > deadline or (next_try > give_up and tries >= _MIN_TRIES):
                raise TargetBusy(f"{error}; tried {tries} times", pid=process.pid) from error
        time.sleep(delay)
        delay = min(delay * 2, 0.02)
