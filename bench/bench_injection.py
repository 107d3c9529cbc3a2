# SPDX-License-Identifier: Apache-2.0
"""What a visit of the VM fd helper costs a running QEMU, as ratios of one run."""

from __future__ import annotations

import contextlib
import os
import select
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import host
import rig
from figures import Figure

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.v12 import V12

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS: Final = 40
GDB_ROUNDS: Final = 3
VCPU_WINDOWS: Final = 7
VCPU_WINDOW_S: Final = 1.0
QMP_WINDOW_S: Final = 4.0
ATTACHES_A_SECOND: Final = 100


def measure() -> Iterator[Figure]:
    """Measure the stall and the gap, what a vCPU sees of it, and what the monitor does."""
    yield from _stall()
    yield from _vcpu_gap()
    yield from _qmp_latency()


def _stall() -> Iterator[Figure]:
    plan = rig.full_plan()
    with rig.qemu(host.marker_rom()) as machine:
        machine.visit(plan)
        reports = [machine.visit(plan) for _ in range(ROUNDS)]
        gdb_us = statistics.median(_gdb_stall_us(machine) for _ in range(GDB_ROUNDS))
    stall_us = statistics.median(report.stall_us for report in reports)
    gap_us = statistics.median(report.gap_us for report in reports)
    native_us, native_gap_us = _native()
    yield Figure(
        key="stall_us",
        value=stall_us,
        unit="us",
        what="main thread held for HOOK and all single grants of v12, emulated kernel",
    )
    yield Figure(
        key="stall_vs_native",
        value=stall_us / native_us,
        unit="x",
        what="against a process that makes the same ioctls itself",
        limit=15,
    )
    yield Figure(
        key="stall_vs_gdb",
        value=stall_us / gdb_us,
        unit="x",
        what="against gdb -batch calling the same ioctls",
        limit=1 / 200,
    )
    yield Figure(
        key="gap_us", value=gap_us, unit="us", what="from HOOK to the last grant, emulated kernel"
    )
    yield Figure(
        key="gap_vs_native",
        value=gap_us / native_gap_us,
        unit="x",
        what="against a process that makes the same ioctls itself",
    )


def _native() -> tuple[float, float]:
    steps = [
        f"{step.request:x}:{step.id}"
        for step in rig.full_plan().steps
        if step.ioctl is not Ioctl.HOOK
    ]
    with tempfile.TemporaryDirectory() as directory:
        program = str(Path(directory) / "native")
        source = str(Path(__file__).parent / "native.c")
        subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
        output = subprocess.run(
            [str(rig.BIN / "kvmi-libvirt"), "emulate", "--", program, str(ROUNDS + 5), *steps],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    rounds = [tuple(map(float, line.split())) for line in output.splitlines()][5:]
    return (
        statistics.median(whole for whole, _ in rounds),
        statistics.median(gap for _, gap in rounds),
    )


def _gdb_stall_us(machine: rig.Rig) -> float:
    # The same ioctls by 'gdb -p PID -batch'. It stops every thread for as long as it
    # is attached, which the monitor's slowest answer shows.
    call = "((int(*)(int,unsigned long,void*))ioctl)"
    script = [
        "set $p = ((char*(*)(unsigned long))malloc)(64)",
        "call ((int(*)(int,int,int,void*))socketpair)(1, 1, 0, $p)",
        "set $fd = *(int*)$p",
        "set *(long*)($p+8) = 0",
        "set *(long*)($p+16) = 0",
        "set *(long*)$p = $fd",
    ]
    for step in rig.full_plan().steps:
        if step.ioctl is not Ioctl.HOOK:
            script += [f"set *(int*)$p = {step.allow}", f"set *(int*)($p+4) = {step.id}"]
        script.append(f"call {call}({machine.vm_fd}, {step.request}, $p)")
    script.append(f"call {call}({machine.vm_fd}, {V12.request(Ioctl.UNHOOK)}, 0)")
    arguments = [part for line in script for part in ("-ex", line)]
    command = ["gdb", "-nx", "-q", "-p", str(machine.process.pid), "-batch", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as gdb:
        reader = threading.Thread(target=gdb.communicate)
        reader.start()
        slowest_s = 0.0
        while reader.is_alive():
            sent = time.monotonic()
            machine.qmp("query-status")
            slowest_s = max(slowest_s, time.monotonic() - sent)
        reader.join()
    return slowest_s * 1e6


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


def _vcpu_gap() -> Iterator[Figure]:
    gaps: dict[bool, list[int]] = {False: [], True: []}
    plan = rig.full_plan()
    with rig.qemu(tsc_rom()) as machine:
        for window in range(2 * VCPU_WINDOWS):
            is_visited = bool(window % 2)
            machine.qmp("system_reset")
            end = time.monotonic() + VCPU_WINDOW_S
            while time.monotonic() < end:
                if is_visited:
                    machine.visit(plan)
                time.sleep(0.05)
            gaps[is_visited].append(_longest_gap(machine))
    yield Figure(
        key="vcpu_gap_vs_idle",
        value=statistics.median(gaps[True]) / statistics.median(gaps[False]),
        unit="x",
        what="longest pause a spinning vCPU sees while the helper visits, against none",
    )


def _longest_gap(machine: rig.Rig) -> int:
    answer = machine.qmp("human-monitor-command", **{"command-line": "xp /1wx 0x500"})
    return int(answer.split(":")[1].split()[0], 16)


def _qmp_latency() -> Iterator[Figure]:
    with rig.qemu(host.marker_rom()) as machine:
        idle = _latencies(machine)
        with _visits(machine):
            busy = _latencies(machine)
    yield Figure(
        key="qmp_p99_vs_idle",
        value=_p99(busy) / _p99(idle),
        unit="x",
        what="the monitor's 99th percentile with 100 attaches a second, against none",
    )


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


@contextlib.contextmanager
def _visits(machine: rig.Rig) -> Iterator[None]:
    # From a process of its own: it must not share the timing process's interpreter.
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.set_blocking(reader, False)
        due = time.monotonic()
        while True:
            machine.probe()
            due += 1 / ATTACHES_A_SECOND
            if select.select([reader], [], [], max(0.0, due - time.monotonic()))[0]:
                os._exit(0)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("the visiting process failed")


def _latencies(machine: rig.Rig) -> list[float]:
    found = []
    end = time.monotonic() + QMP_WINDOW_S
    while (sent := time.monotonic()) < end:
        machine.qmp("query-status")
        found.append(time.monotonic() - sent)
    return found
