# SPDX-License-Identifier: Apache-2.0
"""Visits to a real QEMU on the emulated kernel: killed half way, again and again, under load.

No libvirt here. ``KVMI_SOAK=1`` (make soak) runs the long versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import os
import random
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import host
import pytest
import rig
from support import stop_process, wait_for_supervisor, wait_until
from usage import cpu_s

from kvmi_libvirt import introspect, session, worker
from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.abi.x86_64 import NR_IOCTL
from kvmi_libvirt.errors import SessionError
from kvmi_libvirt.policy.model import Rights, UnixSource
from kvmi_libvirt.qemu import tracee as tracee_module
from kvmi_libvirt.state import StateDir
from kvmi_libvirt.tool.handshake import pack_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rig import Rig
    from support import Tell

SOAK = bool(os.environ.get("KVMI_SOAK"))
TIMEOUT_S = 4 * 3600 if SOAK else 900  # on a machine that does much else

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.seccomp,
    pytest.mark.ptrace,
    pytest.mark.timeout(TIMEOUT_S),
]

ROUNDS = 10_000 if SOAK else 150
TELL_ROUNDS = 250
RANDOM_KILLS = 1_000 if SOAK else 60
KILL_STRIDE = 1 if SOAK else 4


@pytest.fixture
def qemu() -> Iterator[Rig]:
    with rig.qemu(host.marker_rom(), vcpus=2) as found:
        yield found


@pytest.fixture
def tool(tmp_path: Path) -> Iterator[UnixSource]:
    """Have a tool that shakes hands with everyone and keeps every channel."""
    path = tmp_path / "tool.sock"
    kept: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    channel, _ = listener.accept()
                except OSError:  # shut down: the test is over
                    return
                kept.append(channel)
                with contextlib.suppress(OSError, struct.error):
                    (size,) = struct.unpack("<I", channel.recv(4, socket.MSG_WAITALL))
                    channel.recv(size - 4, socket.MSG_WAITALL)
                    channel.sendall(pack_answer())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield UnixSource(path=str(path))
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for channel in kept:
                channel.close()


@contextlib.contextmanager
def monitor_load(qemu: Rig) -> Iterator[list[float]]:
    """Keep QEMU's main loop busy with QMP; yield the latencies in seconds."""
    latencies: list[float] = []
    end = threading.Event()

    def load() -> None:
        while not end.is_set():
            sent = time.monotonic()
            assert qemu.qmp("query-status")["status"] == "running"
            latencies.append(time.monotonic() - sent)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        yield latencies
    finally:
        end.set()
        thread.join()


def hook(qemu: Rig, tool: UnixSource, state: StateDir) -> None:
    policy = rig.full_policy(tool)
    introspect.hook_vm(qemu.process, qemu.domain("victim"), policy, state=state)


def unhook(qemu: Rig, state: StateDir) -> None:
    recorded = state.load(qemu.uuid)
    assert recorded is not None
    introspect.unhook_vm(qemu.process, recorded, state=state)


def narrow(qemu: Rig, tool: UnixSource, state: StateDir) -> None:
    policy = dataclasses.replace(rig.full_policy(tool), commands=Rights(), events=Rights())
    introspect.change_vm(qemu.process, qemu.uuid, policy, state=state)


def killed_while(
    visit: str, qemu: Rig, tool: UnixSource, state: StateDir, trace: Callable[[str], None]
) -> bool:
    """Make a visit with *trace* called at the worker's trace points; say whether that killed it.

    However it ended, a visit that is not killed follows, and the VM is unhooked.

    Parameters
        visit  "hook", "change" for one that takes all rights away, or "unhook"
    """
    plain = getattr(session, visit)

    def traced(*args: Any, **kwargs: Any) -> session.Report:
        tracee_module._trace = trace  # runs in the worker, and ends with it
        report: session.Report = plain(*args, **kwargs)
        return report

    if visit != "hook":
        hook(qemu, tool, state)
    was_killed = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, visit, traced)
        try:
            if visit == "unhook":
                unhook(qemu, state)
            else:
                (hook if visit == "hook" else narrow)(qemu, tool, state)
        except SessionError as error:
            if "without a result" not in str(error):
                raise
            was_killed = True
    if was_killed and visit == "hook":
        hook(qemu, tool, state)  # cleans up what the other has left, and hooks
    unhook(qemu, state)
    return was_killed


def dying_at(number: int) -> Callable[[str], None]:
    """Return a trace function that kills its process at the *number*-th point it passes."""
    passed = itertools.count(1)

    def trace(_point: str) -> None:
        if next(passed) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return trace


def kill_later(delay_s: float) -> None:
    """Have a child of this process end it some time later; by then it may have ended."""
    pidfd = os.pidfd_open(os.getpid())
    if os.fork() == 0:
        end = time.monotonic() + delay_s
        while time.monotonic() < end:
            pass
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os._exit(0)
    os.close(pidfd)


def count_trace_points(visit: str, qemu: Rig, tool: UnixSource, state: StateDir) -> int:
    """Return how many trace points the worker of a visit passes."""
    shared = mmap.mmap(-1, 8)

    def trace(_point: str) -> None:
        (passed,) = struct.unpack("=Q", shared[:8])
        shared[:8] = struct.pack("=Q", passed + 1)

    with shared:
        assert not killed_while(visit, qemu, tool, state, trace)
        return int(struct.unpack("=Q", shared[:8])[0])


def assert_well(qemu: Rig, before: tuple[int, int]) -> None:
    """Check that QEMU answers, that its guest executes, and that nothing was left in it."""
    assert qemu.qmp("query-status")["status"] == "running"
    assert qemu.size() == before
    since = vcpu_time_s(qemu)
    wait_until(lambda: vcpu_time_s(qemu) > since + 0.05, what="the guest executes", timeout_s=60)


def vcpu_time_s(qemu: Rig) -> float:
    """Return how long the first vCPU has run; the firmware keeps it busy."""
    thread = qemu.qmp("query-cpus-fast")[0]["thread-id"]
    return cpu_s(qemu.process.pid, thread)


@pytest.mark.parametrize("visit", ["hook", "change", "unhook"])
def test_killed_at_its_trace_points_leaves_qemu_well_and_nothing_behind(
    qemu: Rig, tool: UnixSource, tmp_path: Path, tell: Tell, visit: str
) -> None:
    state = StateDir(tmp_path / "state")
    points = count_trace_points(visit, qemu, tool, state)
    instants = range(1, points + 1, KILL_STRIDE if points > 40 else 1)
    before = qemu.size()
    killed = 0
    with monitor_load(qemu):
        for at in instants:
            killed += killed_while(visit, qemu, tool, state, dying_at(at))

    assert killed == len(instants)
    assert_well(qemu, before)
    tell(f"{visit}: {killed} kills at {points} points: fds, mappings {before} -> {qemu.size()}")


def test_killed_at_random_instants_leaves_qemu_well_and_nothing_behind(
    qemu: Rig, tool: UnixSource, tmp_path: Path, tell: Tell
) -> None:
    state = StateDir(tmp_path / "state")
    hook(qemu, tool, state)
    unhook(qemu, state)
    before = qemu.size()
    chance = random.Random(12)
    killed = tries = 0
    with monitor_load(qemu):
        while killed < RANDOM_KILLS and tries < 10 * RANDOM_KILLS:
            delay_s = chance.uniform(0, 0.004)

            def trace(point: str, delay_s: float = delay_s) -> None:
                if point == "seized":
                    kill_later(delay_s)

            tries += 1
            killed += killed_while("hook", qemu, tool, state, trace)
            if killed % TELL_ROUNDS == 0:
                tell(f"{killed} kills in {tries} visits, {qemu.size()}")

    assert killed == RANDOM_KILLS
    assert_well(qemu, before)
    tell(f"{killed} kills in {tries} visits: fds, mappings {before} -> {qemu.size()}")


def test_round_after_round_nothing_fails_and_nothing_grows(qemu: Rig, tell: Tell) -> None:
    plan = rig.full_plan()
    failures = 0

    qemu.visit(plan)
    before = qemu.size()
    started = time.monotonic()
    with monitor_load(qemu) as latencies:
        for number in range(1, ROUNDS + 1):
            try:
                qemu.visit(plan)
            except SessionError as error:
                failures += 1
                tell(f"round {number}: {error}")
            if number % TELL_ROUNDS == 0:
                took_s = time.monotonic() - started
                tell(f"{number} rounds in {took_s:.0f} s, {failures} failures, {qemu.size()}")

    assert failures == 0
    assert_well(qemu, before)
    tell(
        f"{ROUNDS} rounds, {failures} failures, {len(latencies)} QMP replies, "
        f"slowest {max(latencies) * 1000:.1f} ms: fds, mappings {before} -> {qemu.size()}"
    )


def test_killed_in_the_middle_of_a_call_nothing_of_qemu_is_left(qemu: Rig) -> None:
    pid = qemu.process.pid
    supervisor = wait_for_supervisor(pid)
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor(1) as other:
        deadline = time.monotonic() + 30
        worker.run(
            lambda: session.hook(
                *(qemu.process, qemu.vm_fd, rig.full_plan(), near, bytes(16)), deadline=deadline
            ),
            deadline=deadline,
            keep_fds=(*qemu.process.owned_fds, near.fileno()),
        )
        near.close()
        stop_process(supervisor)
        unhooking = other.submit(qemu.unhook)
        in_call = f"{NR_IOCTL} {qemu.vm_fd:#x} {V12.request(Ioctl.UNHOOK):#x} "
        syscall = Path(f"/proc/{pid}/syscall")
        wait_until(lambda: syscall.read_text().startswith(in_call), what="it is in the call")
        os.kill(pid, signal.SIGKILL)
        os.kill(supervisor, signal.SIGCONT)

        with pytest.raises(SessionError) as raised:
            unhooking.result()
        assert raised.value.kind == "TargetGone"
        assert far.recv(1) == b""
        wait_until(lambda: not Path(f"/proc/{supervisor}").exists(), what="the supervisor ends")
