# SPDX-License-Identifier: Apache-2.0
"""Visits to a real QEMU on the emulated kernel: killed half way, again and again, under load.

No libvirt here. ``KVMI_SOAK=1`` (make soak) runs the long versions.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import host
import pytest
from support import wait_until

from kvmi_libvirt import introspect, session, worker
from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import SessionError
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.plan import make_plan
from kvmi_libvirt.policy.element import Domain
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource
from kvmi_libvirt.qemu import tracee as tracee_module
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.state import StateDir
from kvmi_libvirt.tool.handshake import pack_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

SOAK = bool(os.environ.get("KVMI_SOAK"))
ROUNDS = 10_000 if SOAK else 300
RANDOM_KILLS = 1_000 if SOAK else 60
KILL_STRIDE = 1 if SOAK else 4
KVMI_LIBVIRT = str(Path(sys.executable).parent / "kvmi-libvirt")


@dataclass
class Qemu:
    """A QEMU on the emulated kernel, with its monitor."""

    process: Process
    domain: Domain
    monitor: socket.socket
    lock: threading.Lock = field(default_factory=threading.Lock)
    reader: Any = None

    def qmp(self, command: str) -> Any:
        """Return the answer to one QMP command."""
        with self.lock:
            self.monitor.sendall(json.dumps({"execute": command}).encode() + b"\n")
            while True:
                answer = json.loads(self.reader.readline())
                if "return" in answer:
                    return answer["return"]
                assert "event" in answer, answer

    def growth(self) -> tuple[int, int]:
        """Return the numbers of descriptors and of mappings."""
        maps = self.process.read("maps").count(b"\n")
        return len(self.process.fd_links()), maps


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    rom = tmp_path / "marker.rom"
    rom.write_bytes(host.marker_rom())
    path = tmp_path / "qmp.sock"
    domain_uuid = str(uuid.uuid4())
    command = [
        *(KVMI_LIBVIRT, "emulate", "--", "/usr/bin/qemu-system-x86_64"),
        *("-machine", "pc,accel=kvm", "-m", "32", "-smp", "2", "-bios", str(rom)),
        *("-uuid", domain_uuid, "-nodefaults", "-display", "none", "-serial", "null"),
        *("-qmp", f"unix:{path},server=on,wait=off"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as popen:
        try:
            monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with monitor, Process(Pid(popen.pid)) as process:
                wait_until(lambda: _connected(monitor, path), what="QEMU has a monitor")
                domain = Domain(
                    name="victim",
                    uuid=domain_uuid,
                    vcpus=2,
                    memory_bytes=32 << 20,
                    machine="pc",
                    policy=None,
                    origin="a test",
                )
                found = Qemu(process=process, domain=domain, monitor=monitor)
                with monitor.makefile("rb") as found.reader:
                    found.reader.readline()
                    found.qmp("qmp_capabilities")
                    yield found
        finally:
            popen.kill()


def _connected(monitor: socket.socket, path: Path) -> bool:
    try:
        monitor.connect(str(path))
    except OSError:
        return False
    return True


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
def monitor_load(qemu: Qemu) -> Iterator[list[float]]:
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


def policy(tool: UnixSource) -> Policy:
    commands = frozenset(command.name for command in V12.commands) - ALWAYS_ALLOWED
    events = frozenset(event.name for event in V12.events)
    return Policy(
        mode=Mode.REQUIRED,
        source=tool,
        commands=Rights(allowed=commands),
        events=Rights(allowed=events),
    )


def hook(qemu: Qemu, tool: UnixSource, state: StateDir) -> None:
    introspect.hook_vm(qemu.process, qemu.domain, policy(tool), state=state)


def unhook(qemu: Qemu, state: StateDir) -> None:
    recorded = state.load(qemu.domain.uuid)
    assert recorded is not None
    introspect.unhook_vm(qemu.process, recorded, state=state)


def killed_while_hooking(
    qemu: Qemu, tool: UnixSource, state: StateDir, trace: Callable[[str], None]
) -> bool:
    """Hook with *trace* called at the worker's trace points; return whether that killed it."""
    plain_hook = session.hook

    def traced_hook(*args: Any, **kwargs: Any) -> session.Report:
        tracee_module._trace = trace  # runs in the worker, and ends with it
        return plain_hook(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "hook", traced_hook)
        try:
            hook(qemu, tool, state)
        except SessionError as error:
            if "without a result" not in str(error):
                raise
            return True
    unhook(qemu, state)
    return False


def dying_at(number: int) -> Callable[[str], None]:
    """Return a trace function that kills its process at the *number*-th point it passes."""
    passed = itertools.count(1)

    def trace(_point: str) -> None:
        if next(passed) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return trace


def count_trace_points(qemu: Qemu, tool: UnixSource, state: StateDir) -> int:
    """Return how many trace points a hooking worker passes."""
    shared = mmap.mmap(-1, 8)

    def trace(_point: str) -> None:
        (passed,) = struct.unpack("=Q", shared[:8])
        shared[:8] = struct.pack("=Q", passed + 1)

    with shared:
        assert not killed_while_hooking(qemu, tool, state, trace)
        return int(struct.unpack("=Q", shared[:8])[0])


def test_killed_at_its_trace_points_leaves_qemu_well_and_nothing_behind(
    qemu: Qemu, tool: UnixSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = StateDir(tmp_path / "state")
    points = count_trace_points(qemu, tool, state)
    before = qemu.growth()
    killed = 0
    with monitor_load(qemu):
        for at in range(1, points + 1, KILL_STRIDE):
            killed += killed_while_hooking(qemu, tool, state, dying_at(at))
            hook(qemu, tool, state)  # the next session cleans up and hooks
            unhook(qemu, state)
    after = qemu.growth()

    assert killed == len(range(1, points + 1, KILL_STRIDE))
    assert qemu.qmp("query-status")["status"] == "running"
    assert after == before
    with capsys.disabled():
        print(f" {killed} kills at {points} points: fds, mappings {before} -> {after}")


def test_killed_at_random_instants_leaves_qemu_well_and_nothing_behind(
    qemu: Qemu, tool: UnixSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = StateDir(tmp_path / "state")
    hook(qemu, tool, state)
    unhook(qemu, state)
    before = qemu.growth()
    chance = random.Random(12)
    killed = 0
    with monitor_load(qemu):
        for _ in range(RANDOM_KILLS):
            delay_s = chance.uniform(0, 0.004)

            def trace(point: str, delay_s: float = delay_s) -> None:
                if point == "seized" and os.fork() == 0:
                    # A child of the worker: it ends its parent some time later.
                    end = time.monotonic() + delay_s
                    while time.monotonic() < end:
                        pass
                    os.kill(os.getppid(), signal.SIGKILL)
                    os._exit(0)

            killed += killed_while_hooking(qemu, tool, state, trace)
            hook(qemu, tool, state)
            unhook(qemu, state)
    after = qemu.growth()

    assert killed > RANDOM_KILLS // 10
    assert qemu.qmp("query-status")["status"] == "running"
    assert after == before
    with capsys.disabled():
        print(f" {killed} kills of {RANDOM_KILLS}: fds, mappings {before} -> {after}")


def test_round_after_round_nothing_fails_and_nothing_grows(
    qemu: Qemu, tool: UnixSource, capsys: pytest.CaptureFixture[str]
) -> None:
    fds = qemu.process.vm_fds()
    plan = make_plan(policy(tool), V12, None)
    raw_uuid = uuid.UUID(qemu.domain.uuid).bytes
    failures = 0

    def visit() -> None:
        near, far = socket.socketpair()
        with near, far:
            deadline = time.monotonic() + 5
            worker.run(
                lambda: session.hook(qemu.process, fds.vm, plan, near, raw_uuid, deadline=deadline),
                deadline=deadline,
                keep_fds=(*qemu.process.owned_fds, near.fileno()),
            )
            worker.run(
                lambda: session.unhook(qemu.process, fds.vm, V12, deadline=deadline),
                deadline=deadline,
                keep_fds=qemu.process.owned_fds,
            )

    visit()
    before = qemu.growth()
    with monitor_load(qemu) as latencies:
        for _ in range(ROUNDS):
            try:
                visit()
            except SessionError:
                failures += 1
    after = qemu.growth()

    assert failures == 0
    assert after == before
    assert qemu.qmp("query-status")["status"] == "running"
    with capsys.disabled():
        print(
            f" {ROUNDS} rounds, {failures} failures, {len(latencies)} QMP replies, "
            f"slowest {max(latencies) * 1000:.1f} ms: fds, mappings {before} -> {after}"
        )
