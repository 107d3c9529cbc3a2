# SPDX-License-Identifier: Apache-2.0
"""Injection into real processes. The victim reports what its own calls returned."""

from __future__ import annotations

import mmap
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from tracee_harness import (
    EINTR,
    NR_GETPID,
    NR_GETPPID,
    NR_READ,
    inject,
    running,
    thread_flags,
    traced_threads,
)

from kvmi_libvirt import worker
from kvmi_libvirt.abi.ptrace import PF_USER_WORKER
from kvmi_libvirt.abi.x86_64 import NR_CLOSE
from kvmi_libvirt.errors import SessionError, TargetGone
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.qemu import tracee as tracee_module
from kvmi_libvirt.qemu.looking import look
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.qemu.remote import Remote
from kvmi_libvirt.qemu.tracee import Tracee, attach_parked
from kvmi_libvirt.session import Report

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ptrace

PARKED = ("ppoll", "poll", "epoll_wait")
TRACE_POINTS = (
    "seized",
    "stopped",
    "call-prepared",
    "call-entered",
    "call-returned",
    "before-restore",
    "restored",
)


@pytest.mark.parametrize("call", PARKED)
def test_injected_calls_return_their_results_and_the_victims_own_call_goes_on(
    parked: Path, call: str
) -> None:
    with running(parked, call, -1) as victim:
        victim.sleep_until_parked()

        results = inject(victim, (NR_GETPID,), (NR_GETPPID,), (NR_GETPID,))
        victim.write(b"q")
        report = victim.report()

        assert results == [victim.pid, os.getpid(), victim.pid]
        assert (report["result"], report["errno"]) == (1, 0)


@pytest.mark.parametrize("call", PARKED)
def test_one_wait_can_be_visited_again_and_again(parked: Path, call: str) -> None:
    with running(parked, call, -1) as victim:
        victim.sleep_until_parked()

        for _ in range(3):
            assert inject(victim, (NR_GETPID,)) == [victim.pid]
        victim.write(b"q")

        assert victim.report()["result"] == 1


@pytest.mark.parametrize("call", ["read", "nanosleep", "clock_nanosleep", "futex"])
def test_a_thread_in_another_call_is_not_even_stopped(parked: Path, call: str) -> None:
    with running(parked, call, 60_000) as victim, mmap.mmap(-1, 1) as was_seized:
        victim.sleep_until_parked()

        def note() -> None:
            was_seized[:] = b"y"

        with pytest.raises(SessionError, match=r"not waiting for events: .*system call") as caught:
            inject(victim, (NR_GETPID,), timeout_s=0.1, at={"seized": note})

        assert caught.value.kind == "TargetBusy"
        assert was_seized[:] == bytes(1)


def test_a_thread_in_user_mode_is_busy(parked: Path) -> None:
    with running(parked, "spin", 0) as victim:
        assert victim.line() == "ready"

        with pytest.raises(SessionError) as caught:
            inject(victim, (NR_GETPID,), timeout_s=0.1)

        assert caught.value.kind == "TargetBusy"
        assert victim.state() == "R"


def test_a_call_that_blocks_is_abandoned_at_the_deadline(parked: Path) -> None:
    with running(parked, "ppoll", -1) as victim:
        victim.sleep_until_parked()
        with Process(Pid(victim.pid)) as process:

            def session() -> Report:
                with attach_parked(process, deadline=time.monotonic() + 10) as tracee:
                    tracee._deadline = time.monotonic() + 1.0
                    remote = Remote(process, tracee)
                    # Nothing comes on stdin: an injected read of it blocks.
                    remote.call("read", NR_READ, 0, remote.scratch, 1)
                return Report(abi="")

            with pytest.raises(SessionError, match="blocked beyond the deadline") as caught:
                worker.run(session, deadline=time.monotonic() + 20, keep_fds=process.owned_fds)

        victim.write(b"q")
        report = victim.report()

        assert caught.value.kind == "RemoteCallTimeout"
        assert (report["result"], report["errno"]) == (1, 0)


def test_no_call_is_made_after_the_deadline(parked: Path) -> None:
    # Whoever waited for the result has given up by then.
    with running(parked, "ppoll", -1) as victim:
        victim.sleep_until_parked()
        with Process(Pid(victim.pid)) as process:

            def session() -> Report:
                with attach_parked(process, deadline=time.monotonic() + 10) as tracee:
                    tracee._deadline = time.monotonic() - 0.001
                    remote = Remote(process, tracee)
                    remote.call("close", NR_CLOSE, 0)
                return Report(abi="")

            with pytest.raises(SessionError, match="not made, the deadline has passed"):
                worker.run(session, deadline=time.monotonic() + 20, keep_fds=process.owned_fds)

        victim.write(b"q")  # its stdin is still open
        assert victim.report()["result"] == 1


@pytest.mark.parametrize("point", TRACE_POINTS)
def test_the_victim_survives_the_tracers_death(parked: Path, point: str) -> None:
    with running(parked, "ppoll", -1) as victim:
        victim.sleep_until_parked()

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(SessionError, match="without a result"):
            inject(victim, (NR_GETPID,), at={point: die})

        # At worst the wait returned early; the victim goes on and works as before.
        victim.write(b"x")
        victim.report()
        victim.sleep_until_parked()
        assert inject(victim, (NR_GETPID,)) == [victim.pid]
        victim.write(b"q")
        assert victim.report()["result"] == 1
        assert victim.popen.wait(timeout=10) == 0


@pytest.mark.parametrize("point", TRACE_POINTS)
def test_a_victim_that_dies_meanwhile_is_gone(parked: Path, point: str) -> None:
    # How long the death takes to show differs each time.
    for _ in range(5):
        with running(parked, "ppoll", -1) as victim:
            victim.sleep_until_parked()

            def kill(pid: int = victim.pid) -> None:
                os.kill(pid, signal.SIGKILL)

            try:
                inject(victim, (NR_GETPID,), at={point: kill})
            except SessionError as error:
                assert error.kind == "TargetGone"  # noqa: PT017 - or it had done all it was to do
                assert point not in ("before-restore", "restored")
            assert victim.popen.wait(timeout=10) == -signal.SIGKILL


def test_a_thread_that_never_waits_is_given_up_after_many_tries(parked: Path) -> None:
    with running(parked, "spin", 0) as victim:
        assert victim.line() == "ready"

        with pytest.raises(SessionError, match=r"it is at work; tried \d+ times") as caught:
            inject(victim, (NR_GETPID,), timeout_s=60)  # not waited for: three seconds are

        assert caught.value.kind == "TargetBusy"
        assert not traced_threads(victim.pid)


def test_a_signal_that_comes_just_before_the_stop_is_delivered(parked: Path) -> None:
    with running(parked, "ppoll", -1) as victim:
        for _ in range(20):  # which of the two stops comes first differs
            victim.sleep_until_parked()

            inject(victim, (NR_GETPID,), at={"seized": lambda: os.kill(victim.pid, signal.SIGUSR1)})

            assert victim.signal()["code"] == 0
            report = victim.report()
            assert (report["result"], report["errno"]) == (-1, EINTR)
            victim.write(b"x")


def test_only_the_main_thread_is_traced_and_other_threads_come_and_go(parked: Path) -> None:
    with running(parked, "ppoll", -1, "churn") as victim:
        victim.sleep_until_parked()

        def check() -> None:
            assert traced_threads(victim.pid) == {victim.pid}

        for _ in range(50):
            assert inject(victim, (NR_GETPID,), at={"call-entered": check}) == [victim.pid]
        victim.write(b"q")

        assert victim.report()["result"] == 1
        assert victim.popen.wait(timeout=30) == 0


def test_a_worker_of_the_kernel_in_the_process_is_left_alone(parked: Path) -> None:
    with running(parked, "ppoll", -1, "worker") as victim:
        if victim.popen.poll() is not None:
            pytest.skip("io_uring is switched off here")
        victim.sleep_until_parked()
        workers = {tid for tid, flags in thread_flags(victim.pid).items() if flags & PF_USER_WORKER}
        assert len(workers) == 1

        def check() -> None:
            assert traced_threads(victim.pid) == {victim.pid}

        assert inject(victim, (NR_GETPID,), at={"call-entered": check}) == [victim.pid]
        victim.write(b"q")

        assert victim.report()["result"] == 1


def test_a_process_that_took_over_the_number_is_not_touched(
    parked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(parked, "ppoll", -1) as victim, running(parked, "ppoll", -1) as stranger:
        victim.sleep_until_parked()
        stranger.sleep_until_parked()
        with Process(Pid(victim.pid)) as process:
            sight = look(process)
            points: list[str] = []
            victim.popen.kill()
            victim.popen.wait()
            process.pid = Pid(stranger.pid)  # as the kernel may number a process next
            monkeypatch.setattr(tracee_module, "look", lambda _process: sight)
            monkeypatch.setattr(tracee_module, "_trace", points.append)

            with pytest.raises(TargetGone):
                Tracee(process, deadline=time.monotonic() + 10).attach()

        assert "stopped" not in points  # nor looked at any closer
        assert not traced_threads(stranger.pid)
        stranger.write(b"q")
        assert stranger.report()["result"] == 1
