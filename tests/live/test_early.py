# SPDX-License-Identifier: Apache-2.0
"""early="yes" and ``kvmi-libvirt start``: hooked before the guest's first instruction.

The guest's first instructions write a byte to its serial port. QEMU says when, by its own
trace; the emulated kernel says when the VM was hooked and given its rights: one clock.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import host
import pytest
from agent_rig import RunningAgent
from live_support import VIRSH, cli, element
from patient_tool import PatientTool
from support import wait_until

from kvmi_libvirt.policy.host import HOST_POLICY_PATH
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR
from kvmi_libvirt.state import STATE_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from live_support import Host, Vm

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

STARTS = 100 if os.environ.get("KVMI_SOAK") else 8
COMMANDS = ("KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL")
SLOW_S = 5.0


@pytest.fixture(params=["agent", "no-agent"])
def hooker(prepared: Host, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Have an agent, or none: then the hook leaves a watcher behind."""
    assert prepared
    if request.param == "no-agent":
        yield
        return
    with RunningAgent(
        tmp_path,
        domains="qemu:///system",
        run_dir=LIBVIRT_QEMU_RUN_DIR,
        state_dir=STATE_DIR,
        host_policy=HOST_POLICY_PATH,
    ):
        yield


@pytest.fixture
def traced(vm: Vm) -> Vm:
    """Have a VM whose QEMU writes down when the guest writes its one byte."""
    vm.rom = vm.host.directory / f"{vm.name}.rom"
    vm.rom.write_bytes(host.marker_rom(once=True))
    trace(vm).touch()
    trace(vm).chmod(0o666)  # QEMU's user cannot make files there
    return vm


def define(vm: Vm, *, early: bool, mode: str = "required", handshake_s: int = 3) -> None:
    text = element(vm.socket, mode=mode, commands=COMMANDS, handshake_s=handshake_s)
    if early:
        text = text.replace(" mode=", " early='yes' mode=")
    vm.define(text, rom=vm.rom, options=("-trace", f"enable=serial_write,file={trace(vm)}"))


def trace(vm: Vm) -> Path:
    return vm.host.directory / f"{vm.name}.trace"


def first_byte_s(vm: Vm) -> float:
    """Return when the guest's first instructions wrote their byte, in seconds of the epoch."""

    def lines() -> list[str]:
        return [line for line in trace(vm).read_text().splitlines() if "serial_write" in line]

    wait_until(lambda: bool(lines()), what="the guest writes its byte")
    return float(lines()[0].partition(":")[0].rpartition("@")[2])


def last_grant_s(vm: Vm, pid: int) -> float:
    prefix = "KVM_INTROSPECTION_"  # and not the probe's
    lines = [
        line for line in vm.trace(pid) if line["errno"] == 0 and line["ioctl"].startswith(prefix)
    ]
    names = [line["ioctl"].removeprefix(prefix) for line in lines]
    assert names == ["HOOK", "COMMAND", "COMMAND"]
    return float(lines[-1]["t"])


def started_late_s(vm: Vm) -> float:
    """Start and destroy *vm*; return by how much the first byte came before the last grant."""
    trace(vm).write_text("", encoding="utf-8")
    vm.must_start()
    late = last_grant_s(vm, vm.pid()) - first_byte_s(vm)
    destroyed = vm.virsh("destroy", vm.name)
    assert destroyed.returncode == 0, destroyed.stderr
    return late


@pytest.mark.usefixtures("hooker")
@pytest.mark.timeout(900)
def test_early_is_in_force_before_the_first_instruction_and_without_it_is_not(
    traced: Vm, capsys: pytest.CaptureFixture[str]
) -> None:
    with PatientTool(traced.socket):
        define(traced, early=True)
        early = [started_late_s(traced) for _ in range(STARTS)]
        define(traced, early=False)
        late = [started_late_s(traced) for _ in range(3)]
    with capsys.disabled():
        print(
            f"\n{len(early)} early starts, the last grant {min(-s for s in early) * 1e3:.0f} to "
            f"{max(-s for s in early) * 1e3:.0f} ms before the first byte; without, "
            f"{statistics.median(late) * 1e3:.0f} ms after"
        )
    assert all(seconds < 0 for seconds in early)
    assert any(seconds > 0 for seconds in late)
    assert not (STATE_DIR / f"{traced.uuid}.early").exists()


@pytest.mark.usefixtures("hooker")
@pytest.mark.timeout(900)
def test_a_slow_tool_only_makes_the_start_slow_and_nobody_else(
    traced: Vm, capsys: pytest.CaptureFixture[str]
) -> None:
    define(traced, early=True, handshake_s=30)
    listed: list[tuple[float, float]] = []
    done = threading.Event()

    def list_others() -> None:
        while not done.is_set():
            began = time.time()
            subprocess.run([*VIRSH, "list", "--all"], capture_output=True, check=True, timeout=60)
            listed.append((began, time.time()))

    with PatientTool(traced.socket, answer_after_s=SLOW_S):
        watcher = threading.Thread(target=list_others)
        watcher.start()
        try:
            traced.must_start()
        finally:
            done.set()
            watcher.join()
        granted = last_grant_s(traced, traced.pid())
    # The tool kept us waiting so long before the grants, and QEMU's main thread with us.
    meanwhile = [end - began for began, end in listed if granted - SLOW_S < began < end < granted]
    with capsys.disabled():
        print(f"\nheld for a tool of {SLOW_S:g} s: {len(meanwhile)} times virsh list meanwhile")
    assert granted < first_byte_s(traced)
    assert meanwhile


@pytest.mark.usefixtures("hooker")
@pytest.mark.parametrize("mode", ["required", "optional"])
def test_without_its_tool_an_early_start_is_refused_or_goes_on_unhooked(
    traced: Vm, mode: str
) -> None:
    define(traced, early=True, mode=mode)
    result = traced.start()
    if mode == "required":
        assert result.returncode == 1
        assert "no tool listens" in result.stderr
        assert traced.state() == "shut off"
    else:
        assert result.returncode == 0, result.stderr
        first_byte_s(traced)
        assert traced.state() == "running"
    assert not (STATE_DIR / f"{traced.uuid}.early").exists()


@pytest.mark.usefixtures("hooker")
def test_a_paused_start_is_hooked_once_and_runs_when_it_is_told(traced: Vm) -> None:
    define(traced, early=True)
    with PatientTool(traced.socket):
        started = traced.start("--paused")
        assert started.returncode == 0, started.stderr
        granted = last_grant_s(traced, traced.pid())
        assert traced.virsh("resume", traced.name).returncode == 0
        assert granted < first_byte_s(traced)


@pytest.mark.usefixtures("hooker")
def test_a_start_that_fails_for_another_reason_leaves_nothing_behind(traced: Vm) -> None:
    text = element(traced.socket, commands=COMMANDS).replace(" mode=", " early='yes' mode=")
    traced.define(text, options=("-device", "no-such-device"))
    with PatientTool(traced.socket) as tool:
        result = traced.start()
        assert result.returncode == 1
        assert "no-such-device" in result.stderr
        assert tool.connected() == []
    wait_until(
        lambda: not list(STATE_DIR.glob(f"{traced.uuid}.*")), what="nothing is left of the start"
    )
    wait_until(lambda: not watchers(), what="nobody watches")


def watchers() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"kvmi-early"):
                found.append(entry.name)
    return found


# -- kvmi-libvirt start ------------------------------------------------------------------


def test_start_hooks_and_then_lets_the_guest_run(traced: Vm) -> None:
    define(traced, early=False)
    with PatientTool(traced.socket):
        result = cli("start", traced.name)
        assert result.returncode == 0, result.stderr
        assert last_grant_s(traced, traced.pid()) < first_byte_s(traced)
        assert traced.state() == "running"
        again = cli("start", traced.name)
        assert again.returncode == 5
        assert "runs already" in again.stderr


@pytest.mark.parametrize("has_hook", [True, False])
def test_start_without_the_tool_leaves_no_required_vm_and_runs_an_optional_one(
    traced: Vm, has_hook: bool
) -> None:
    if not has_hook:
        traced.host.hook.rename(traced.host.hook.with_suffix(".off"))
        traced.host.hook.with_suffix(".off").chmod(0o644)
    try:
        define(traced, early=False)
        result = cli("start", traced.name)
        assert result.returncode != 0
        assert "no tool listens" in result.stderr
        assert traced.state() == "shut off"

        define(traced, early=False, mode="optional")
        result = cli("start", traced.name)
        assert result.returncode == 6
        assert "runs without introspection" in result.stderr
        assert traced.state() == "running"
    finally:
        if not has_hook:
            traced.host.hook.with_suffix(".off").chmod(0o755)
            traced.host.hook.with_suffix(".off").rename(traced.host.hook)


def test_start_without_the_hook_hooks_by_itself(traced: Vm) -> None:
    off = traced.host.hook.with_suffix(".off")
    traced.host.hook.rename(off)
    off.chmod(0o644)
    try:
        define(traced, early=False)
        with PatientTool(traced.socket):
            result = cli("start", traced.name)
            assert result.returncode == 0, result.stderr
            assert last_grant_s(traced, traced.pid()) < first_byte_s(traced)
    finally:
        off.chmod(0o755)
        off.rename(traced.host.hook)
