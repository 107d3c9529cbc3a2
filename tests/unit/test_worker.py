# SPDX-License-Identifier: Apache-2.0
"""The worker child: what it inherits, what it withstands, and what comes back from it."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt import worker
from kvmi_libvirt.errors import (
    ExitCode,
    RestoreFailed,
    SessionError,
    TargetBusy,
    UnsupportedByKernel,
)
from kvmi_libvirt.session import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

BLOCKED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)


def run(session: Callable[[], Report], keep_fds: Collection[int] = ()) -> Report:
    return worker.run(session, deadline=time.monotonic() + 10, keep_fds=keep_fds)


def says(*lines: object) -> Report:
    return Report(abi="v12", applied=tuple(map(str, lines)))


def failure(session: Callable[[], Report]) -> SessionError:
    with pytest.raises(SessionError) as caught:
        run(session)
    return caught.value


def test_a_report_comes_back_whole() -> None:
    report = Report(abi="v11", applied=("HOOK", "allow 5"), stall_us=123, gap_us=45)

    assert run(lambda: report) == report


def test_the_session_runs_in_a_process_and_session_of_its_own() -> None:
    pid, sid, parent = run(lambda: says(os.getpid(), os.getsid(0), os.getppid())).applied

    assert pid != str(os.getpid())
    assert sid == pid  # no terminal's signals, and not killed with the hook's group
    assert parent == str(os.getpid())


def test_nothing_is_open_in_it_but_what_it_needs() -> None:
    kept_reader, kept_writer = os.pipe()
    lost_reader, lost_writer = os.pipe()
    os.set_inheritable(lost_writer, True)

    def look() -> Report:
        found = {}
        for fd in os.listdir("/proc/self/fd"):
            try:
                found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
            except FileNotFoundError:  # the listing's own
                continue
        return says(*(f"{fd} {link}" for fd, link in sorted(found.items())))

    try:
        lines = run(look, keep_fds=(kept_writer,)).applied
        links = {int(line.split()[0]): line.split()[1] for line in lines}

        assert [links.pop(fd) for fd in (0, 1, 2)] == ["/dev/null"] * 3
        assert links.pop(kept_writer) == os.readlink(f"/proc/self/fd/{kept_writer}")
        # And the pipe of the answer. libvirt waits for every copy of a hook's stderr.
        assert len(links) == 1
        assert next(iter(links.values())).startswith("pipe:")
        assert kept_reader not in links
        assert lost_writer not in links
    finally:
        for fd in (kept_reader, kept_writer, lost_reader, lost_writer):
            os.close(fd)


def test_high_descriptors_are_closed_too() -> None:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    high = os.dup2(0, min(soft, 65536) - 1)

    def look() -> Report:
        return says(os.path.lexists(f"/proc/self/fd/{high}"))

    try:
        assert run(look).applied == ("False",)
    finally:
        os.close(high)


def test_no_signal_can_end_it_between_stopping_qemu_and_restoring_it() -> None:
    def send_all() -> Report:
        for number in BLOCKED:
            os.kill(os.getpid(), number)
        return says(*sorted(signal.sigpending()))

    assert run(send_all).applied == tuple(str(number) for number in sorted(BLOCKED))


def test_the_timer_interrupts_a_wait() -> None:
    ticks: list[int] = []

    def wait() -> Report:
        signal.signal(signal.SIGALRM, lambda number, _frame: ticks.append(number))
        while len(ticks) < 3:
            signal.pause()
        return says(len(ticks))

    assert run(wait).applied == ("3",)


def test_the_parents_signals_are_as_before() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handler = signal.getsignal(signal.SIGALRM)

    run(lambda: says())

    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert signal.getsignal(signal.SIGALRM) is handler


def test_what_the_session_raised_is_told() -> None:
    def refuse() -> Report:
        raise UnsupportedByKernel("the running kernel has no KVMI")

    error = failure(refuse)

    assert str(error) == "the running kernel has no KVMI"
    assert error.kind == "UnsupportedByKernel"
    assert error.exit_code is ExitCode.UNSUPPORTED
    assert (error.applied, error.left) == ((), ())


def test_what_is_applied_and_what_is_left_is_told() -> None:
    original = SessionError(
        "HOOK failed",
        applied=("KVM_INTROSPECTION_HOOK",),
        left=("the hook (EIO)", "descriptor 12 (EIO)"),
        kind="RemoteSyscallError",
        exit_code=ExitCode.HARM,
    )

    def fail() -> Report:
        raise original

    error = failure(fail)

    for name in ("applied", "left", "kind", "exit_code"):
        assert getattr(error, name) == getattr(original, name)
    assert str(error) == str(original)


@pytest.mark.parametrize(
    ("raised", "kind", "code"),
    [
        (TargetBusy("not parked", pid=5), "TargetBusy", ExitCode.FAILED),
        (RestoreFailed(5, "x", call="PTRACE_SETREGS", tid=1), "RestoreFailed", ExitCode.HARM),
        (OSError(12, "Cannot allocate memory"), "OSError", ExitCode.FAILED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_exit_code_is_that_of_what_went_wrong(
    raised: Exception, kind: str, code: ExitCode
) -> None:
    def fail() -> Report:
        raise raised

    error = failure(fail)

    assert (error.kind, error.exit_code) == (kind, code)
    assert str(error) == str(raised)


def _kill_itself() -> Report:
    os.kill(os.getpid(), signal.SIGKILL)
    return says()


def _raise_a_defect() -> Report:
    raise ZeroDivisionError("a defect of ours")


def _exit() -> Report:
    raise SystemExit(0)


@pytest.mark.parametrize("end", [_kill_itself, _exit])
def test_a_child_that_ends_without_an_answer_is_an_error(end: Callable[[], Report]) -> None:
    error = failure(end)

    assert "without a result" in str(error)
    assert error.is_unfinished


def test_a_defect_of_ours_is_an_error_that_leaves_everything_open() -> None:
    error = failure(_raise_a_defect)

    assert str(error) == "ZeroDivisionError: a defect of ours"
    assert error.is_unfinished


def test_registers_that_could_not_be_restored_leave_everything_open() -> None:
    def fail() -> Report:
        raise RestoreFailed(3, "could not restore", call="PTRACE_SETREGS", tid=1)

    error = failure(fail)

    assert (error.kind, error.exit_code) == ("RestoreFailed", ExitCode.HARM)
    assert error.is_unfinished


def test_no_frame_of_the_parent_runs_in_the_child() -> None:
    here = os.getpid()
    unwound = []
    try:
        with pytest.raises(SessionError):
            run(_raise_a_defect)
    finally:
        unwound.append(os.getpid())

    assert unwound == [here]


def test_text_of_any_kind_survives_the_way_back() -> None:
    odd = "\u2028 \udc80 \x00 \x1b[31m \U0001f980"

    assert run(lambda: says(odd)).applied == (odd,)


@pytest.mark.parametrize("length", [60_000, 1_000_000])
def test_a_long_answer_comes_back_whole(length: int) -> None:
    line = "x" * length

    assert run(lambda: says(line)).applied == (line,)


def test_a_child_that_does_not_come_back_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # As when QEMU's thread cannot be stopped yet: it must live on, to restore it later.
    monkeypatch.setattr(worker, "_GRACE_S", 0.05)
    gate_reader, gate_writer = os.pipe()

    def wait_for_ever() -> Report:
        os.read(gate_reader, 1)
        return says("nobody reads this any more")

    try:
        with pytest.raises(SessionError) as caught:
            worker.run(wait_for_ever, deadline=time.monotonic(), keep_fds=(gate_reader,))
        match = re.search(r"process (\d+) waits to restore it", str(caught.value))
        assert match is not None
        pid = int(match[1])
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
        assert state.rpartition(")")[2].split()[0] in ("S", "R")
        assert caught.value.kind == "RemoteCallTimeout"

        pidfd = os.pidfd_open(pid)
        os.write(gate_writer, b"g")
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(10_000) == [(pidfd, select.POLLIN)]
        os.close(pidfd)
        # That nobody reads its answer any more is no failure.
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(gate_reader)
        os.close(gate_writer)
