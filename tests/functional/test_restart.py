# SPDX-License-Identifier: Apache-2.0
"""What a visited thread sees of it: its call, and its signals, as if nobody had been there.

Each test runs the same victim twice, left alone and visited, and compares what the two
report of themselves.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support import wait_until
from tracee_harness import (
    NR_GETPID,
    Victim,
    inject,
    running,
    sigqueue,
    wait_for_exit,
)

from kvmi_libvirt.abi.x86_64 import NR_PPOLL
from kvmi_libvirt.errors import SessionError
from kvmi_libvirt.qemu.looking import Sight
from kvmi_libvirt.qemu.parked import Wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.qemu.process import Process

pytestmark = pytest.mark.ptrace

FOR_EVER = -1
SHORT_MS = 300
LONG_MS = 60_000
MANY_VISITS = 1000


@dataclass(frozen=True)
class Case:
    """A call to be visited in, and whether it is one in which a visit does its work."""

    call: str
    is_timed: bool
    is_parked: bool

    def __str__(self) -> str:
        return f"{self.call}-{'timed' if self.is_timed else 'for-ever'}"


CASES = (
    Case("ppoll", is_timed=False, is_parked=True),
    Case("ppoll", is_timed=True, is_parked=True),
    Case("poll", is_timed=False, is_parked=True),
    Case("poll", is_timed=True, is_parked=True),
    Case("epoll_wait", is_timed=False, is_parked=True),
    Case("read", is_timed=False, is_parked=False),
    Case("futex", is_timed=True, is_parked=False),
    Case("nanosleep", is_timed=True, is_parked=False),
    Case("clock_nanosleep", is_timed=True, is_parked=False),
)


@dataclass(frozen=True)
class Outcome:
    """What a victim reported."""

    result: int
    errno: int
    is_pending: int
    handled: tuple[int, ...]  # number and code of the signal, if there was one
    is_sender_known: bool  # its handler was told who really sent it
    exit_code: int


def parked_at_first_sight(_process: Process) -> Sight:
    # As if the thread had gone on to what it does now just after it was looked at: so
    # one that is never visited is stopped all the same, and let go.
    return Sight(Wait(NR_PPOLL, (0,) * 6, 0, 0), b"")


def visit(victim: Victim, case: Case, action: Callable[[], None]) -> None:
    """Stop the victim, run *action* meanwhile, make two calls if it is parked."""
    with mmap.mmap(-1, 1) as was_stopped:

        def act() -> None:
            was_stopped[:] = b"y"
            action()

        if case.is_parked:
            results = inject(victim, (NR_GETPID,), (NR_GETPID,), at={"stopped": act})
            assert results == [victim.pid] * 2
        while was_stopped[:] != b"y":  # on a busy machine a try may be over too soon
            try:
                inject(victim, timeout_s=0.1, at={"stopped": act}, look=parked_at_first_sight)
            except SessionError as error:  # unless its call is over, and it waits for orders
                assert error.kind == "TargetBusy"  # noqa: PT017


def visit_until_it_reports(victim: Victim, case: Case) -> None:
    # A visit that made a timed call start anew would keep it from ever ending.
    for _ in range(MANY_VISITS):
        visit(victim, case, lambda: None)
        if victim.has_line(0):
            return
    pytest.fail(f"not over after {MANY_VISITS} visits")


def outcome(
    program: Path, case: Case, signal_kind: str, options: tuple[str, ...], *, is_visited: bool
) -> Outcome:
    timeout_ms = SHORT_MS if case.is_timed else FOR_EVER
    if signal_kind == "signal" and case.is_timed:
        timeout_ms = LONG_MS
    if signal_kind == "blocked":
        options = (*options, "block")
    got = {}
    with (
        mmap.mmap(-1, 8) as sender,
        running(program, case.call, timeout_ms, *options) as victim,
    ):
        victim.sleep_until_parked()

        def send() -> None:
            sender[:] = struct.pack("=Q", os.getpid())
            os.kill(victim.pid, signal.SIGUSR1)

        action = send if signal_kind != "none" else lambda: None
        if not is_visited:
            action()
        elif case.is_timed and signal_kind != "signal":
            action()
            visit_until_it_reports(victim, case)
        else:
            visit(victim, case, action)
        if signal_kind == "signal":
            got = victim.signal()
        if not case.is_timed:
            victim.write(b"q")
        report = victim.report()
        if case.is_timed:
            victim.write(b"q")
        exit_code = wait_for_exit(victim)
        (sender_pid,) = struct.unpack("=Q", sender[:])
    if case.is_timed and signal_kind != "signal":
        assert report["elapsed_ms"] >= SHORT_MS
    return Outcome(
        result=report["result"],
        errno=report["errno"],
        is_pending=report["pending"],
        handled=tuple(got[key] for key in ("number", "code") if got),
        is_sender_known=got.get("pid", sender_pid) == sender_pid,
        exit_code=exit_code,
    )


@pytest.mark.parametrize("restart", [(), ("restart",)], ids=["", "sa_restart"])
@pytest.mark.parametrize("signal_kind", ["none", "signal", "blocked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_visited_call_ends_as_one_left_alone(
    parked: Path, case: Case, signal_kind: str, restart: tuple[str, ...]
) -> None:
    left_alone = outcome(parked, case, signal_kind, restart, is_visited=False)
    visited = outcome(parked, case, signal_kind, restart, is_visited=True)

    assert visited == left_alone
    assert visited.is_sender_known
    assert bool(visited.handled) == (signal_kind == "signal")
    assert visited.is_pending == (signal_kind == "blocked")


def test_a_timed_epoll_wait_is_left_alone(parked: Path) -> None:
    # signal(7): a stop alone ends it, and how much of its timeout was left cannot be known.
    with running(parked, "epoll_wait", LONG_MS) as victim:
        victim.sleep_until_parked()

        with pytest.raises(SessionError, match="with a timeout, which a stop would cut short"):
            inject(victim, (NR_GETPID,), timeout_s=0.1)

        victim.write(b"q")
        report = victim.report()
        assert (report["result"], report["errno"]) == (1, 0)


# -- signals -------------------------------------------------------------------------------


def send_several(pid: int) -> None:
    """Send five signals of three kinds, each with a siginfo of its own."""
    sigqueue(pid, signal.SIGRTMIN, 1)
    os.kill(pid, signal.SIGUSR2)
    sigqueue(pid, signal.SIGRTMIN, 2)
    sigqueue(pid, signal.SIGUSR1, 7)
    sigqueue(pid, signal.SIGRTMIN, 3)


SEVERAL: Final = 5
SI_QUEUE: Final = -1


def handled(victim: Victim, count: int) -> list[tuple[int, int, int]]:
    got = [victim.signal() for _ in range(count)]
    # Only a queued one has a value.
    return [(one["number"], one["code"], one["value"] * (one["code"] == SI_QUEUE)) for one in got]


@pytest.mark.parametrize("point", ["call-prepared", "call-entered", "call-returned"])
@pytest.mark.parametrize("options", [(), ("mask",), ("restart",)], ids=["", "mask", "sa_restart"])
def test_several_signals_keep_their_order_and_their_siginfo(
    parked: Path, point: str, options: tuple[str, ...]
) -> None:
    with running(parked, "ppoll", FOR_EVER, *options) as victim:
        victim.sleep_until_parked()
        # All at once for one that is left alone, too.
        os.kill(victim.pid, signal.SIGSTOP)
        wait_until(lambda: victim.state() == "T", what="the victim is stopped")
        send_several(victim.pid)
        os.kill(victim.pid, signal.SIGCONT)
        expected = handled(victim, SEVERAL)
        expected_report = victim.report()

    with running(parked, "ppoll", FOR_EVER, *options) as victim:
        victim.sleep_until_parked()
        results = inject(
            victim,
            *[(NR_GETPID,)] * 3,
            at={point: lambda: send_several(victim.pid)},
        )
        found = handled(victim, SEVERAL)
        report = victim.report()

    assert results == [victim.pid] * 3
    assert found == expected
    assert (report["result"], report["errno"]) == (
        expected_report["result"],
        expected_report["errno"],
    )


def test_a_signal_that_ends_the_victim_still_ends_it(parked: Path) -> None:
    with running(parked, "ppoll", FOR_EVER) as victim:
        victim.sleep_until_parked()

        def send() -> None:
            os.kill(victim.pid, signal.SIGTERM)
            os.kill(victim.pid, signal.SIGUSR1)

        results = inject(victim, (NR_GETPID,), (NR_GETPID,), at={"call-entered": send})

        assert results == [victim.pid] * 2
        assert wait_for_exit(victim) == -signal.SIGTERM


def test_a_signal_that_stops_the_victim_still_stops_it(parked: Path) -> None:
    with running(parked, "ppoll", FOR_EVER) as victim:
        victim.sleep_until_parked()

        inject(
            victim,
            (NR_GETPID,),
            (NR_GETPID,),
            at={"call-entered": lambda: os.kill(victim.pid, signal.SIGSTOP)},
        )

        wait_until(lambda: victim.state() == "T", what="the victim is stopped")
        os.kill(victim.pid, signal.SIGCONT)
        victim.write(b"q")
        assert victim.report()["result"] == 1


def test_stopped_and_continued_meanwhile_is_running_afterwards(parked: Path) -> None:
    # Both are kept, and giving the second back takes the first away.
    with running(parked, "ppoll", FOR_EVER) as victim:
        victim.sleep_until_parked()

        inject(
            victim,
            (NR_GETPID,),
            (NR_GETPID,),
            at={
                "call-prepared": lambda: os.kill(victim.pid, signal.SIGSTOP),
                "call-entered": lambda: os.kill(victim.pid, signal.SIGCONT),
            },
        )

        victim.write(b"q")
        assert victim.report()["result"] == 1


def test_a_stopped_process_stays_stopped_and_resumes_its_call(parked: Path) -> None:
    with running(parked, "ppoll", FOR_EVER) as victim:
        victim.sleep_until_parked()
        os.kill(victim.pid, signal.SIGSTOP)
        wait_until(lambda: victim.state() == "T", what="the victim is stopped")

        results = inject(victim, (NR_GETPID,))

        assert results == [victim.pid]
        wait_until(lambda: victim.state() == "T", what="the victim is stopped again")
        os.kill(victim.pid, signal.SIGCONT)
        victim.write(b"q")
        assert victim.report()["result"] == 1
