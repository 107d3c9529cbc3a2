# SPDX-License-Identifier: Apache-2.0
"""What a visit of the VM fd helper costs a running QEMU, as ratios of one run.

What is compared is measured in turns, so that whatever else the machine does at the
time concerns all alike.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import tempfile
import threading
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import host
import rig
from figures import Figure

from kvmi_libvirt import session
from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.qemu.tracee import start_deadline_timer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BATCHES: Final = 6
ROUNDS: Final = 8
WARM_UP: Final = 3
VCPU_WINDOWS: Final = 30
VCPU_WINDOW_S: Final = 0.4
VISITS_A_WINDOW: Final = 3
QMP_WINDOWS: Final = 6
QMP_WINDOW_S: Final = 1.0
ATTACHES_A_SECOND: Final = 100


class At(Enum):
    """Whom the helper visits during a window: nobody, another VM, or the one measured."""

    NOBODY = 0
    ANOTHER = 1
    IT = 2


def measure() -> Iterator[Figure]:
    """Measure the stall and the gap, what a vCPU sees of it, and what the monitor does."""
    yield from _stall()
    yield from _vcpu_gap_alone()
    yield from _vcpu_gap_shared()
    yield from _qmp_latency()


# -- the stall -----------------------------------------------------------------------------


def _stall() -> Iterator[Figure]:
    plan = rig.full_plan()
    reports, gdb_us, native = [], [], []
    with tempfile.TemporaryDirectory() as name, rig.qemu(host.marker_rom()) as machine:
        program = _native_program(Path(name))
        machine.visit(plan)
        for _ in range(BATCHES):
            reports += [machine.visit(plan) for _ in range(ROUNDS)]
            native += _native(program)
            gdb_us.append(_gdb_stall_us(machine))
            machine.unhook()
    stall_us = statistics.median(report.stall_us for report in reports)
    gap_us = statistics.median(report.gap_us for report in reports)
    yield Figure(
        key="stall_us",
        value=stall_us,
        unit="us",
        what="main thread held for HOOK and all single grants of v12, emulated kernel",
    )
    yield Figure(
        key="stall_vs_native",
        value=stall_us / statistics.median(whole for whole, _ in native),
        unit="x",
        what="against a process that makes the same ioctls itself",
        limit=15,
    )
    yield Figure(
        key="gdb_stall_us",
        value=statistics.median(gdb_us),
        unit="us",
        what="all threads held by gdb -batch, which calls the same ioctls",
    )
    yield Figure(
        key="stall_vs_gdb",
        value=stall_us / statistics.median(gdb_us),
        unit="x",
        what="the first against that",
        limit=1 / 200,
    )
    yield Figure(
        key="gap_us", value=gap_us, unit="us", what="from HOOK to the last grant, emulated kernel"
    )
    yield Figure(
        key="gap_vs_native",
        value=gap_us / statistics.median(gap for _, gap in native),
        unit="x",
        what="against a process that makes the same ioctls itself",
    )


def _native_program(directory: Path) -> Path:
    program = directory / "native"
    source = Path(__file__).parent / "native.c"
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    return program


def _native(program: Path) -> list[tuple[float, float]]:
    # (whole, from HOOK to the last grant), in microseconds
    steps = [
        f"{step.request:x}:{step.id}"
        for step in rig.full_plan().steps
        if step.ioctl is not Ioctl.HOOK
    ]
    command = [str(rig.BIN / "kvmi-libvirt"), "emulate", "--", str(program)]
    output = subprocess.run(
        [*command, str(WARM_UP + ROUNDS), *steps], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    rounds = [line.split() for line in output.splitlines()][WARM_UP:]
    return [(float(whole), float(gap)) for whole, gap in rounds]


def _gdb_stall_us(machine: rig.Rig) -> float:
    # The same by 'gdb -p PID -batch', which holds every thread for as long as it is
    # attached. The monitor's slowest answer shows for how long, but for an ordinary one.
    call = "((int(*)(int,unsigned long,void*))ioctl)"
    script = [
        "set $p = ((char*(*)(unsigned long))malloc)(64)",
        "call ((int(*)(int,int,int,void*))socketpair)(1, 1, 0, $p)",
        "set $near = *(int*)$p",
        "set $far = *(int*)($p+4)",
        "set *(long*)($p+8) = 0",
        "set *(long*)($p+16) = 0",
        "set *(long*)$p = $near",
    ]
    for step in rig.full_plan().steps:
        if step.ioctl is not Ioctl.HOOK:
            script += [f"set *(int*)$p = {step.allow}", f"set *(int*)($p+4) = {step.id}"]
        script.append(f"call {call}({machine.vm_fd}, {step.request}, $p)")
    script += ["call ((int(*)(int))close)($near)", "call ((int(*)(int))close)($far)"]
    arguments = [part for line in script for part in ("-ex", line)]
    command = ["gdb", "-nx", "-q", "-p", str(machine.process.pid), "-batch", *arguments]
    latencies = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as gdb:
        outputs: list[str] = []
        reader = threading.Thread(target=lambda: outputs.append(gdb.communicate()[0]))
        reader.start()
        while reader.is_alive():
            sent = time.monotonic()
            machine.qmp("query-status")
            latencies.append(time.monotonic() - sent)
        reader.join()
    done = len(re.findall(r"^\$\d+ = 0$", outputs[0], re.MULTILINE))
    if done != len(rig.full_plan().steps) + 3:
        raise RuntimeError(f"gdb could not make all calls: {outputs[0][-500:]}")
    return (max(latencies) - statistics.median(latencies)) * 1e6


# -- what a vCPU sees ----------------------------------------------------------------------


def tsc_rom() -> bytes:
    """Return a firmware that keeps the longest pause between two rdtsc at 0x500."""
    code = bytes.fromhex(
        "6631db"  # xor ebx, ebx
        "66891e0005"  # mov [0x500], ebx
        "0f31"  # rdtsc
        "6689c1"  # mov ecx, eax
        "0f31"  # again: rdtsc
        "6689c6"  # mov esi, eax
        "6629c8"  # sub eax, ecx
        "6689f1"  # mov ecx, esi
        "6639d8"  # cmp eax, ebx
        "76f0"  # jbe again
        "6689c3"  # mov ebx, eax
        "66891e0005"  # mov [0x500], ebx
        "ebe6"  # jmp again
    )
    reset = bytes.fromhex("e90d00")  # jmp near to the start of the segment
    return code.ljust(0x10000 - 16, b"\xf4") + reset.ljust(16, b"\xf4")


def _vcpu_gap_alone() -> Iterator[Figure]:
    # The vCPU has a CPU that nothing else runs on, as vcpupin and emulatorpin would give
    # it one: what it sees of a visit is what the visit does to it, not that two processes
    # want one CPU.
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        raise OSError("a vCPU with a CPU of its own needs two CPUs")
    reserved = max(cpus)
    os.sched_setaffinity(0, cpus - {reserved})
    try:
        with rig.qemu(tsc_rom()) as machine:
            (vcpu,) = machine.qmp("query-cpus-fast")
            os.sched_setaffinity(vcpu["thread-id"], {reserved})
            os.sched_setscheduler(vcpu["thread-id"], os.SCHED_FIFO, os.sched_param(2))
            gaps = _gaps(machine, machine, (At.IT, At.NOBODY))
    finally:
        os.sched_setaffinity(0, cpus)
    yield Figure(
        key="vcpu_gap_vs_idle",
        value=_quartile(gaps[At.IT]) / _quartile(gaps[At.NOBODY]),
        unit="x",
        what="longest pause of a vCPU with a CPU of its own, helper at work, against none",
        limit=1.2,
    )


def _vcpu_gap_shared() -> Iterator[Figure]:
    # All on whatever CPU there is, as a busy host has it. The same work done on another
    # VM takes the same time from the vCPU, so the rest is what a visit does to its own VM.
    with rig.qemu(tsc_rom()) as machine, rig.qemu(host.marker_rom()) as other:
        other.qmp("stop")
        gaps = _gaps(machine, other, (At.ANOTHER, At.IT))
    yield Figure(
        key="vcpu_gap_shared_vs_elsewhere",
        value=_quartile(gaps[At.IT]) / _quartile(gaps[At.ANOTHER]),
        unit="x",
        what="the same on shared CPUs, against a helper at work on another VM",
    )


def _quartile(gaps: Sequence[int]) -> float:
    # Not the median: the kernel keeps a real-time thread off its CPU for 50 ms of each
    # second, and so in nearly half of the windows, visits or none. What a visit does to a
    # vCPU would be seen in all windows with visits.
    return statistics.quantiles(gaps, n=4)[0]


def _gaps(machine: rig.Rig, other: rig.Rig, kinds: Sequence[At]) -> dict[At, list[int]]:
    # Each kind's window lasts as long as the one with visits did: a longer one sees more.
    gaps: dict[At, list[int]] = {kind: [] for kind in kinds}
    visited = {At.NOBODY: None, At.ANOTHER: other, At.IT: machine}
    for _ in range(VCPU_WINDOWS):
        duration_s = VCPU_WINDOW_S
        for kind in kinds:
            machine.qmp("system_reset")
            began = time.monotonic()
            _visit_for(visited[kind], duration_s)
            gaps[kind].append(_longest_gap(machine))
            duration_s = max(duration_s, time.monotonic() - began)
    return gaps


def _visit_for(machine: rig.Rig | None, duration_s: float) -> None:
    end = time.monotonic() + duration_s
    if machine is not None:
        for _ in range(VISITS_A_WINDOW):
            time.sleep(duration_s / (VISITS_A_WINDOW + 1))
            machine.probe()
    time.sleep(max(0.0, end - time.monotonic()))


def _longest_gap(machine: rig.Rig) -> int:
    answer = machine.qmp("human-monitor-command", **{"command-line": "xp /1wx 0x500"})
    return int(answer.split(":")[1].split()[0], 16)


# -- what the monitor does -----------------------------------------------------------------


def _qmp_latency() -> Iterator[Figure]:
    found: dict[At, list[float]] = {at: [] for at in At}
    with rig.qemu(host.marker_rom()) as machine, rig.qemu(host.marker_rom()) as other:
        other.qmp("stop")
        for _ in range(QMP_WINDOWS):
            found[At.NOBODY] += _latencies(machine)
            for at, visited in ((At.ANOTHER, other), (At.IT, machine)):
                with _visits(visited):
                    found[at] += _latencies(machine)
    p99 = {at: statistics.quantiles(values, n=100)[98] for at, values in found.items()}
    yield Figure(
        key="qmp_p99_vs_idle",
        value=p99[At.IT] / p99[At.NOBODY],
        unit="x",
        what="the monitor's 99th percentile with 100 attaches a second, against none",
    )
    yield Figure(
        key="qmp_p99_vs_elsewhere",
        value=p99[At.IT] / p99[At.ANOTHER],
        unit="x",
        what="the same, against as many attaches to another VM",
    )


@contextlib.contextmanager
def _visits(machine: rig.Rig) -> Iterator[None]:
    # From a process of its own, and always the same one, as an agent's worker is.
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(writer)
            os.set_blocking(reader, False)
            _visit_until_closed(machine, reader)
            code = 0
        finally:
            os._exit(code)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("the visiting process failed")


def _visit_until_closed(machine: rig.Rig, reader: int) -> None:
    start_deadline_timer()
    due = time.monotonic()
    while not _is_closed(reader):
        session.probe(machine.process, machine.vm_fd, deadline=time.monotonic() + 5)
        due += 1 / ATTACHES_A_SECOND
        time.sleep(max(0.0, due - time.monotonic()))


def _is_closed(reader: int) -> bool:
    try:
        return not os.read(reader, 1)
    except BlockingIOError:
        return False


def _latencies(machine: rig.Rig) -> list[float]:
    found = []
    end = time.monotonic() + QMP_WINDOW_S
    while (sent := time.monotonic()) < end:
        machine.qmp("query-status")
        found.append(time.monotonic() - sent)
    return found
