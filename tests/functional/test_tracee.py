# SPDX-License-Identifier: Apache-2.0
"""Injection into real processes. The victim reports what its own calls returned."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import wait_until

from kvmi_libvirt import worker
from kvmi_libvirt.errors import SessionError, TargetNotFound, TargetUnsuitable
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.qemu import tracee as tracee_module
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.qemu.remote import Remote
from kvmi_libvirt.qemu.tracee import attach_parked
from kvmi_libvirt.session import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.ptrace

VICTIMS = Path(__file__).parent / "victims"
NR_READ, NR_GETPID, NR_GETPPID = 0, 39, 110
EINTR = 4
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


@dataclass
class Victim:
    popen: subprocess.Popen[bytes]
    call: str

    @property
    def pid(self) -> int:
        return self.popen.pid

    def line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().decode().strip()

    def write(self, data: bytes) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(data)
        self.popen.stdin.flush()

    def report(self) -> dict[str, int]:
        line = self.line()
        found = re.findall(r"(\w+)=(-?\d+)", line)
        assert found, f"no report but {line!r}"
        return {name: int(value) for name, value in found}

    def state(self) -> str:
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat[stat.rindex(")") + 2]

    def sleep_until_parked(self) -> None:
        assert self.line() == "ready"
        wait_until(lambda: self.state() == "S", what=f"the victim blocks in {self.call}")


@contextlib.contextmanager
def running(program: Path, call: str, timeout_ms: int, *extra: str) -> Iterator[Victim]:
    command = [str(program), call, str(timeout_ms), *extra]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as popen:
        try:
            yield Victim(popen, call)
        finally:
            popen.kill()


@pytest.fixture(scope="session")
def parked(compile_victim: Callable[[Path], Path]) -> Path:
    return compile_victim(VICTIMS / "parked.c")


def inject(
    victim: Victim,
    *calls: tuple[int, ...],
    timeout_s: float = 2.0,
    at: dict[str, Callable[[], None]] | None = None,
) -> list[int]:
    """Inject *calls* in a worker, running *at*'s functions at their trace points there."""
    actions = dict(at or {})

    def trace(point: str) -> None:
        if action := actions.pop(point, None):
            action()

    with Process(Pid(victim.pid)) as process:
        deadline = time.monotonic() + timeout_s

        def session() -> Report:
            tracee_module._trace = trace
            with attach_parked(process, deadline=deadline) as tracee:
                results = [tracee.syscall(number, *args) for number, *args in calls]
            return Report(abi="", applied=tuple(map(str, results)))

        report = worker.run(session, deadline=deadline, keep_fds=process.owned_fds)
        return [int(result) for result in report.applied]


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
        assert report["signals"] == 0


@pytest.mark.parametrize("call", PARKED)
def test_one_wait_can_be_visited_again_and_again(parked: Path, call: str) -> None:
    with running(parked, call, -1) as victim:
        victim.sleep_until_parked()

        for _ in range(3):
            assert inject(victim, (NR_GETPID,)) == [victim.pid]
        victim.write(b"q")

        assert victim.report()["result"] == 1


@pytest.mark.parametrize("call", ["ppoll", "poll"])
def test_a_timed_wait_keeps_its_remaining_time(parked: Path, call: str) -> None:
    with running(parked, call, 400) as victim:
        victim.sleep_until_parked()
        inject(victim, (NR_GETPID,))

        report = victim.report()

        assert (report["result"], report["errno"]) == (0, 0)
        assert 400 <= report["elapsed_ms"] < 2000


@pytest.mark.parametrize("call", ["read", "nanosleep", "clock_nanosleep", "futex"])
def test_other_calls_are_left_alone_and_not_disturbed(parked: Path, call: str) -> None:
    with running(parked, call, 600) as victim:
        victim.sleep_until_parked()

        # Tried many times over: the sleeps are in restart_syscall(2) from the second on.
        with pytest.raises(SessionError) as caught:
            inject(victim, (NR_GETPID,), timeout_s=0.1)
        if call == "read":
            victim.write(b"q")
        report = victim.report()

        assert caught.value.kind == "TargetBusy"
        if call == "futex":
            assert (report["result"], report["errno"]) == (-1, 110)  # ETIMEDOUT, as ever
        else:
            assert (report["result"], report["errno"]) == (1 if call == "read" else 0, 0)


def test_a_timed_epoll_wait_sees_what_any_stop_does_to_it(parked: Path) -> None:
    # signal(7): epoll_wait(2) is never restarted after a stop, and how much of its
    # timeout is left cannot be known. Every caller must expect EINTR.
    with running(parked, "epoll_wait", 60_000) as victim:
        victim.sleep_until_parked()

        inject(victim, (NR_GETPID,))

        report = victim.report()
        assert (report["result"], report["errno"], report["signals"]) == (-1, EINTR, 0)


def test_a_thread_in_user_mode_is_busy(parked: Path) -> None:
    with running(parked, "spin", 0) as victim:
        assert victim.line() == "ready"

        with pytest.raises(SessionError) as caught:
            inject(victim, (NR_GETPID,), timeout_s=0.1)

        assert caught.value.kind == "TargetBusy"
        assert victim.state() == "R"


@pytest.mark.parametrize("point", ["call-prepared", "call-entered", "call-returned"])
@pytest.mark.parametrize("restart", [(), ("restart",)])
def test_a_signal_in_the_window_is_delivered_with_its_own_siginfo(
    parked: Path, point: str, restart: tuple[str, ...]
) -> None:
    with running(parked, "ppoll", -1, *restart) as victim:
        victim.sleep_until_parked()

        def send() -> None:
            os.kill(victim.pid, signal.SIGUSR1)

        results = inject(victim, (NR_GETPID,), (NR_GETPID,), at={point: send})
        report = victim.report()

        assert results == [victim.pid] * 2
        assert report["signals"] == 1
        assert report["code"] == 0  # SI_USER, not the SI_TKILL of a repeated signal
        assert (report["result"], report["errno"]) == (-1, EINTR)


def test_two_signals_in_the_window_are_both_delivered(parked: Path) -> None:
    with running(parked, "ppoll", -1) as victim:
        victim.sleep_until_parked()

        def send() -> None:
            os.kill(victim.pid, signal.SIGUSR1)
            os.kill(victim.pid, signal.SIGUSR2)

        inject(victim, (NR_GETPID,), (NR_GETPID,), at={"call-entered": send})
        report = victim.report()

        assert report["signals"] == 2
        assert (report["result"], report["errno"]) == (-1, EINTR)


def test_a_stopped_process_stays_stopped_and_resumes_its_call(parked: Path) -> None:
    with running(parked, "ppoll", -1) as victim:
        victim.sleep_until_parked()
        os.kill(victim.pid, signal.SIGSTOP)
        wait_until(lambda: victim.state() == "T", what="the victim is stopped")

        results = inject(victim, (NR_GETPID,))

        assert results == [victim.pid]
        wait_until(lambda: victim.state() == "T", what="the victim is stopped again")
        os.kill(victim.pid, signal.SIGCONT)
        victim.write(b"q")
        assert (victim.report()["result"]) == 1


def test_a_call_that_blocks_is_abandoned_at_the_deadline(parked: Path) -> None:
    with running(parked, "ppoll", -1) as victim:
        victim.sleep_until_parked()
        # Nothing comes on stdin: an injected read of it blocks.
        with Process(Pid(victim.pid)) as process:
            deadline = time.monotonic() + 0.3

            def session() -> Report:
                with attach_parked(process, deadline=deadline) as tracee:
                    remote = Remote(process, tracee)
                    remote.call("read", NR_READ, 0, remote.scratch, 1)
                return Report(abi="")

            with pytest.raises(SessionError) as caught:
                worker.run(session, deadline=deadline, keep_fds=process.owned_fds)

        victim.write(b"q")
        report = victim.report()

        assert caught.value.kind == "RemoteCallTimeout"
        assert (report["result"], report["errno"]) == (1, 0)


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


ALL_POINTS = [
    "seized",
    "stopped",
    "call-prepared",
    "call-entered",
    "call-returned",
    "before-restore",
    "restored",
]


@pytest.mark.parametrize("point", ALL_POINTS)
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


def test_another_tracer_is_named(parked: Path) -> None:
    with running(parked, "ppoll", -1) as victim:
        victim.sleep_until_parked()
        with (
            subprocess.Popen(
                ["strace", "-qq", "-e", "trace=none", "-p", str(victim.pid)],
                stderr=subprocess.DEVNULL,
            )
            if _has("strace")
            else _gdb(victim.pid) as other,
            Process(Pid(victim.pid)) as process,
        ):
            try:
                wait_until(lambda: process.tracer() is not None, what="the other tracer attached")
                with pytest.raises(TargetUnsuitable, match=f"traced by process {other.pid}"):
                    process.require_traceable()
            finally:
                other.terminate()


def _has(program: str) -> bool:
    import shutil

    return shutil.which(program) is not None


def _gdb(pid: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["gdb", "-nx", "-q", "-p", str(pid), "-batch", "-ex", "continue"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_32_bit_process_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    program = tmp_path / "thirty_two"
    source = VICTIMS / "thirty_two.S"
    subprocess.run(["cc", "-m32", "-nostdlib", "-static", "-o", program, source], check=True)
    with subprocess.Popen([program]) as victim:
        try:
            with (
                Process(Pid(victim.pid)) as process,
                pytest.raises(TargetUnsuitable, match="no 64-bit x86 program"),
            ):
                process.require_traceable()
        finally:
            victim.kill()


def test_a_process_without_its_main_thread_is_refused(parked: Path) -> None:
    with running(parked, "exit-leader", 0) as victim:
        assert victim.line() == "ready"
        wait_until(lambda: victim.state() == "Z", what="the main thread has exited")
        with (
            Process(Pid(victim.pid)) as process,
            pytest.raises(TargetUnsuitable, match=r"main thread .* has exited"),
        ):
            process.require_traceable()


def test_a_process_that_ended_is_not_found() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()

    with pytest.raises(TargetNotFound):
        Process(Pid(ended.pid))


def test_a_process_without_a_vm_fd_is_refused(parked: Path) -> None:
    with (
        running(parked, "ppoll", -1) as victim,
        Process(Pid(victim.pid)) as process,
        pytest.raises(TargetUnsuitable, match="no KVM VM fd"),
    ):
        process.vm_fds()
