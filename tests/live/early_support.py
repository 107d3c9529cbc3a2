# SPDX-License-Identifier: Apache-2.0
"""VMs whose QEMU and whose kernel write down what happened when, by one clock.

QEMU's trace and the emulated kernel's both have CLOCK_REALTIME. The kernel's side notes a call
when it has answered it. QEMU notes that it lets the vCPUs run (``runstate_set``) before it
does, and a byte that the guest wrote (``serial_write``) after the guest's instruction. So a
grant that was noted before ``running`` was in force before the guest's first instruction.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import host
import pytest
from agent_rig import RunningAgent
from live_support import cli, element
from support import wait_until

from kvmi_libvirt.policy.host import HOST_POLICY_PATH
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR
from kvmi_libvirt.state import STATE_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from live_support import Host, Vm

COMMANDS: Final = ("KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL")
EVENTS: Final = ("serial_write", "runstate_set")
"""What QEMU traces. Others: process_incoming_migration_co_end, handle_qmp_command."""

_MAX_SLEW: Final = 0.01
_WAIT_S: Final = 60.0


@pytest.fixture(params=["agent", "no-agent"])
def hooker(
    prepared: Host, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[RunningAgent | None]:
    """Have an agent, or none: then the hook leaves a watcher behind."""
    assert prepared
    if request.param == "no-agent":
        yield None
        return
    with running_agent(tmp_path) as agent:
        yield agent


def running_agent(directory: Path) -> RunningAgent:
    """Return an agent that serves the hook of this host, to be started."""
    return RunningAgent(
        directory,
        domains="qemu:///system",
        run_dir=LIBVIRT_QEMU_RUN_DIR,
        state_dir=STATE_DIR,
        host_policy=HOST_POLICY_PATH,
    )


@pytest.fixture
def traced(vm: Vm) -> Vm:
    """Have a VM whose QEMU writes down when the guest writes its one byte."""
    vm.rom = vm.host.directory / f"{vm.name}.rom"
    vm.rom.write_bytes(host.marker_rom(once=True))
    make_trace(trace(vm))
    return vm


def make_trace(path: Path) -> None:
    """Make a file for QEMU's trace: QEMU's user cannot make one there."""
    path.touch()
    path.chmod(0o666)


def trace(vm: Vm) -> Path:
    """Return where the VM's QEMU writes its trace; each QEMU begins it anew."""
    return vm.host.directory / f"{vm.name}.trace"


def early_element(vm: Vm, *, mode: str = "required", handshake_s: int = 3) -> str:
    """Return an element that asks for introspection before the first instruction."""
    text = element(vm.socket, mode=mode, commands=COMMANDS, handshake_s=handshake_s)
    return text.replace(" mode=", " early='yes' mode=")


def define(
    vm: Vm,
    *,
    early: bool = True,
    mode: str = "required",
    handshake_s: int = 3,
    metadata: str | None = None,
    events: Sequence[str] = EVENTS,
    devices: str = "",
    emulator: Path | None = None,
    rom: Path | None = None,
) -> None:
    """Define the VM with a trace; *metadata* replaces the element that the rest describes."""
    text = early_element(vm, mode=mode, handshake_s=handshake_s)
    if not early:
        text = text.replace(" early='yes'", "")
    options: list[str] = []
    for event in events:
        options += ["-trace", f"enable={event},file={trace(vm)}"]
    vm.define(
        text if metadata is None else metadata,
        rom=rom or vm.rom,
        options=tuple(options),
        devices=devices,
        emulator=emulator,
    )


def noted(path: Path, event: str, text: str = "") -> list[float]:
    """Return when QEMU noted *event*, with *text* in its line, in seconds of the epoch."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        when, _, what = line.partition(":")
        if what.startswith(f"{event} ") and text in what and "@" in when:
            found.append(float(when.rpartition("@")[2]))
    return found


def first(path: Path, event: str, text: str = "") -> float:
    """Return when QEMU first noted *event*; wait until it has."""
    wait_until(
        lambda: bool(noted(path, event, text)), what=f"QEMU notes {event} {text}", timeout_s=_WAIT_S
    )
    return noted(path, event, text)[0]


def first_byte_s(vm: Vm) -> float:
    """Return when the guest's first instructions had written their byte."""
    return first(trace(vm), "serial_write")


def ran_s(path: Path) -> float:
    """Return when QEMU was about to let the vCPUs run for the first time."""
    return first(path, "runstate_set", "(running)")


def grants_s(lines: Sequence[dict[str, object]]) -> tuple[float, float]:
    """Return when HOOK and when the last grant were answered: each once, and nothing else."""
    prefix = "KVM_INTROSPECTION_"  # and not the probe's
    done = [line for line in lines if line["errno"] == 0]
    done = [line for line in done if str(line["ioctl"]).startswith(prefix)]
    names = [str(line["ioctl"]).removeprefix(prefix) for line in done]
    assert names == ["HOOK", "COMMAND", "COMMAND"]
    times = [float(str(line["t"])) for line in done]
    assert times == sorted(times)
    return times[0], times[-1]


def last_grant_s(vm: Vm, pid: int | None = None) -> float:
    """Return when the last grant of the running VM was answered."""
    return grants_s(vm.trace(vm.pid() if pid is None else pid))[1]


@dataclass(frozen=True)
class Margins:
    """Of one start: from the last grant on, negative where that came later.

    Parameters
        run_s   until QEMU let the vCPUs run
        byte_s  until it had the guest's first byte
    """

    run_s: float
    byte_s: float


@contextlib.contextmanager
def steady_clock() -> Iterator[None]:
    """Fail if the clock of both traces is set meanwhile: then they prove nothing."""

    def offset() -> float:
        return time.clock_gettime(time.CLOCK_REALTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)

    before = offset()
    yield
    assert abs(offset() - before) < _MAX_SLEW, "somebody has set the clock"


def margins(vm: Vm) -> Margins:
    """Return the margins of a VM that runs."""
    granted = last_grant_s(vm)
    ran, byte = ran_s(trace(vm)), first_byte_s(vm)
    assert ran < byte
    return Margins(ran - granted, byte - granted)


def started(vm: Vm) -> Margins:
    """Start and destroy *vm*, which must go well; return the margins."""
    trace(vm).write_text("", encoding="utf-8")
    with steady_clock():
        vm.must_start()
        found = margins(vm)
    destroyed = vm.virsh("destroy", vm.name)
    assert destroyed.returncode == 0, destroyed.stderr
    return found


def watchers() -> list[int]:
    """Return the detached watchers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if (entry / "cmdline").read_bytes().startswith(b"kvmi-early"):
                    found.append(int(entry.name))
    return found


def left_of(vm: Vm) -> list[Path]:
    """Return what is recorded of a VM."""
    return list(STATE_DIR.glob(f"{vm.uuid}.*"))


def assert_nothing_is_left(vm: Vm) -> None:
    """Wait until neither a file nor a watcher is left of a start."""
    wait_until(lambda: not left_of(vm), what="nothing is left of the start", timeout_s=_WAIT_S)
    wait_until(lambda: not watchers(), what="nobody watches", timeout_s=_WAIT_S)


def tracer(pid: int) -> int:
    """Return who holds the main thread of a process, 0 for nobody."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("TracerPid:"):
                return int(line.split()[1])
    return 0


def wait_held(vm: Vm) -> int:
    """Wait until the main thread of the VM's QEMU is held for its tool; return its process."""
    pidfile = LIBVIRT_QEMU_RUN_DIR / f"{vm.name}.pid"

    def pid() -> int:
        try:
            return int(pidfile.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    # The kernel's probe is a visit of its own; the tool is called when it has been made.
    wait_until(
        lambda: bool(pid() and tracer(pid()) and vm.trace(pid())),
        what="QEMU is held for its tool",
        timeout_s=_WAIT_S,
    )
    return pid()


def status_text(vm: Vm) -> str:
    """Return what status shows."""
    result = cli("status", vm.name)
    assert result.returncode == 0, result.stderr
    return result.stdout


class Gate:
    """An emulator that waits before it becomes QEMU for *vm*, while the gate is closed."""

    def __init__(self, vm: Vm) -> None:
        """Make it, closed."""
        self._closed = vm.host.directory / f"{vm.name}.closed"
        self.emulator = vm.host.directory / f"{vm.name}.emulator"
        self._closed.touch()
        self.emulator.write_text(
            f"""#!/bin/sh
case " $* " in *" {vm.uuid} "*) while [ -e '{self._closed}' ]; do sleep 0.01; done;; esac
exec '{vm.host.emulator}' "$@"
""",
            encoding="utf-8",
        )
        self.emulator.chmod(0o755)

    def open(self) -> None:
        """Let QEMU come. Doing it twice is fine."""
        self._closed.unlink(missing_ok=True)


def starts_from_environment(usual: int) -> int:
    """Return how many starts to make: KVMI_EARLY_STARTS, or 100 in a soak, or *usual*."""
    text = os.environ.get("KVMI_EARLY_STARTS")
    if text:
        return int(text)
    return 100 if os.environ.get("KVMI_SOAK") else usual
