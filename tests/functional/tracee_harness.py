# SPDX-License-Identifier: Apache-2.0
"""Victims that report what their own system calls returned, and visits to them."""

from __future__ import annotations

import contextlib
import ctypes
import re
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support import wait_until

from kvmi_libvirt import worker
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.qemu import tracee as tracee_module
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.qemu.tracee import attach_parked
from kvmi_libvirt.session import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmi_libvirt.qemu.looking import Sight

VICTIMS = Path(__file__).parent / "victims"
NR_READ, NR_GETPID, NR_GETPPID = 0, 39, 110
EINTR = 4

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Victim:
    """A running victim; see victims/parked.c."""

    popen: subprocess.Popen[bytes]
    call: str

    @property
    def pid(self) -> int:
        return self.popen.pid

    def line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().decode().strip()

    def has_line(self, timeout_s: float) -> bool:
        assert self.popen.stdout is not None
        return bool(select.select([self.popen.stdout], [], [], timeout_s)[0])

    def write(self, data: bytes) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(data)
        self.popen.stdin.flush()

    def numbers(self, kind: str) -> dict[str, int]:
        """Return the next line's figures; it must begin with *kind*."""
        line = self.line()
        assert line.startswith(kind), f"no {kind!r} but {line!r}"
        return {name: int(value) for name, value in re.findall(r"(\w+)=(-?\d+)", line)}

    def signal(self) -> dict[str, int]:
        """Return what a handler of its was given."""
        return self.numbers("signal")

    def report(self) -> dict[str, int]:
        """Return what its call returned."""
        return self.numbers("result")

    def state(self) -> str:
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat[stat.rindex(")") + 2]

    def sleep_until_parked(self) -> None:
        assert self.line() == "ready"
        wait_until(lambda: self.state() == "S", what=f"the victim blocks in {self.call}")


@contextlib.contextmanager
def running(program: Path, call: str, timeout_ms: int, *options: str) -> Iterator[Victim]:
    """Have a victim for the block."""
    command = [str(program), call, str(timeout_ms), *options]
    # Unbuffered: has_line() must not miss a line that was read ahead.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as popen:
        try:
            yield Victim(popen, call)
        finally:
            popen.kill()


def inject(
    victim: Victim,
    *calls: tuple[int, ...],
    timeout_s: float = 10.0,
    at: dict[str, Callable[[], Any]] | None = None,
    look: Callable[[Process], Sight] | None = None,
) -> list[int]:
    """Inject *calls* in a worker and return their results.

    Parameters
        at    functions the worker runs at a trace point, once each
        look  what the worker takes for the look at the thread before it is stopped
    """
    actions = dict(at or {})

    def trace(point: str) -> None:
        if action := actions.pop(point, None):
            action()

    with Process(Pid(victim.pid)) as process:
        deadline = time.monotonic() + timeout_s

        def session() -> Report:
            tracee_module._trace = trace
            if look is not None:
                setattr(tracee_module, "look", look)  # noqa: B010
            with attach_parked(process, deadline=deadline) as tracee:
                results = [tracee.syscall(number, *args) for number, *args in calls]
            return Report(abi="", applied=tuple(map(str, results)))

        report = worker.run(session, deadline=deadline, keep_fds=process.owned_fds)
        return [int(result) for result in report.applied]


def sigqueue(pid: int, number: int, value: int) -> None:
    """Send a signal that carries a value. Source: sigqueue(3)."""
    if _libc.sigqueue(pid, number, ctypes.c_void_p(value)):
        raise OSError(ctypes.get_errno(), "sigqueue")


def thread_flags(pid: int) -> dict[int, int]:
    """Return the kernel's task flags of each thread of a process."""
    flags = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            stat = (task / "stat").read_text()
            flags[int(task.name)] = int(stat[stat.rindex(")") + 2 :].split()[6])
    return flags


def traced_threads(pid: int) -> set[int]:
    """Return the threads of a process that have a tracer."""
    traced = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = (task / "status").read_text()
            if not re.search(r"^TracerPid:\t0$", status, re.MULTILINE):
                traced.add(int(task.name))
    return traced


def wait_for_exit(victim: Victim) -> int:
    """Return the victim's exit code once it has ended."""
    return victim.popen.wait(timeout=30)
