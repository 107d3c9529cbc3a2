# SPDX-License-Identifier: Apache-2.0
"""From ``virsh start`` to enforced rights, on a real libvirtd and a real QEMU."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import host
import pytest
from live_support import allowed, cli, element, probe, processes_with
from support import wait_for_supervisor, wait_until

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED, by_name

if TYPE_CHECKING:
    from live_support import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

COMMANDS = ("KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL", "KVMI_VM_PAUSE_VCPU")
EVENTS = ("KVMI_VM_EVENT_UNHOOK", "KVMI_VCPU_EVENT_BREAKPOINT")
STATE_DIR = Path("/run/kvmi-libvirt")


def hooked(vm: Vm, **options: str) -> str:
    return element(vm.socket, commands=COMMANDS, events=EVENTS, **options)  # type: ignore[arg-type]


def state_files(vm: Vm) -> list[Path]:
    return list(STATE_DIR.glob(f"{vm.uuid}*"))


def status(vm: Vm) -> dict[str, object]:
    result = cli("status", "--json", vm.name)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("abi", ["v12", "v11", "v7"])
def test_the_tool_gets_exactly_what_the_element_allows(vm: Vm, abi: str) -> None:
    emulator = vm.host.emulator
    if abi != "v12":  # the wrapper's name says which kernel it is
        emulator = vm.host.directory / f"kvmi-emulated-qemu-{abi}"
        emulator.unlink(missing_ok=True)
        emulator.symlink_to(vm.host.emulator)
    vm.define(hooked(vm), emulator=emulator)
    with probe(vm.socket) as tool:
        vm.must_start()
        answers = tool.result()
        pid = vm.pid()

        assert answers["abi"] == abi
        assert answers["name"] == vm.name
        assert answers["uuid"] == vm.uuid
        assert allowed(answers["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        assert allowed(answers["events"]) == set(EVENTS)
        assert {*answers["commands"].values(), *answers["events"].values()} == {
            "allowed",
            "denied",
        }

        found = status(vm)
        assert (found["state"], found["pid"], found["error"]) == ("hooked", pid, None)
        assert found["abi"] == abi
        assert set(found["commands"]) == set(COMMANDS)  # type: ignore[call-overload]
        assert set(found["events"]) == set(EVENTS)  # type: ignore[call-overload]

        assert vm.state() == "running"
        assert vm.qmp("query-status")["status"] == "running"
        written = vm.guest_output_len()
        wait_until(lambda: vm.guest_output_len() > written, what="the guest runs on")

        trace = vm.trace(pid)
        done = [line for line in trace if line["errno"] == 0 and "INTROSPECTION" in line["ioctl"]]
        assert done[0]["ioctl"] == "KVM_INTROSPECTION_HOOK"
        assert [line["ioctl"] for line in done].count("KVM_INTROSPECTION_HOOK") == 1
        granted = [line["args"] for line in done[1:]]
        assert len(granted) == len(COMMANDS) + len(EVENTS)
        assert all(args["allow"] == 1 and args["id"] >= 0 for args in granted)
        table = by_name(abi)
        assert {int(done[0]["request"], 16)} == {table.request(Ioctl.HOOK)}
        ids = [table.commands_by_name[name].id for name in COMMANDS]
        ids += [table.events_by_name[name].id for name in EVENTS]
        assert sorted(args["id"] for args in granted) == sorted(ids)


def test_destroy_leaves_nothing_behind(vm: Vm) -> None:
    vm.define(hooked(vm))
    with probe(vm.socket) as tool:
        daemon_fds = open_fd_count()
        vm.must_start()
        tool.result()
        pid = vm.pid()
        assert state_files(vm)
        assert processes_with(vm.uuid) == {pid}
        wait_for_supervisor(pid)

        assert vm.virsh("destroy", vm.name).returncode == 0

        # The supervisor, and who stands by, end by themselves when their QEMU has gone.
        wait_until(lambda: not processes_with(f"for process {pid}\0"), what="they have ended")
        assert not Path(f"/proc/{pid}").exists()
        assert not state_files(vm)
        wait_until(lambda: open_fd_count() <= daemon_fds, what="libvirtd closed its fds")
    assert not vm.socket.exists()


def open_fd_count() -> int:
    daemon = int(host.LIBVIRTD_PIDFILE.read_text())
    return len(os.listdir(f"/proc/{daemon}/fd"))


def test_a_vm_without_the_element_leaves_no_trace(vm: Vm) -> None:
    log = host.LOG_DIR / "hook.log"
    before = log.read_bytes() if log.exists() else b""
    vm.define()
    with host.marked_operations() as operations:
        vm.must_start()
        pid = vm.pid()
        assert vm.qmp("query-status")["status"] == "running"
        assert not state_files(vm)
        assert vm.trace(pid) == []
        vm.virsh("destroy", vm.name)
        # The hook did run, for each of these.
        assert operations(vm.name) == ["prepare", "start", "started", "stopped", "release"]
    assert (log.read_bytes() if log.exists() else b"") == before


def test_a_paused_start_is_hooked_before_the_guest_runs(vm: Vm) -> None:
    vm.define(hooked(vm))
    with probe(vm.socket) as tool:
        vm.must_start("--paused")
        assert allowed(tool.result()["events"]) == set(EVENTS)
        assert vm.state() == "paused"
        assert vm.guest_output_len() == 0
        assert vm.virsh("resume", vm.name).returncode == 0
        wait_until(lambda: vm.guest_output_len() > 0, what="the guest runs")


def test_save_and_restore_hook_again_and_keep_the_xml(vm: Vm) -> None:
    vm.define(hooked(vm))
    with probe(vm.socket) as tool:
        vm.must_start()
        tool.result()
        assert vm.virsh("managedsave", vm.name).returncode == 0
        assert not state_files(vm)

        vm.must_start()

        assert allowed(tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        assert status(vm)["state"] == "hooked"
        # stdout of a restore hook replaces the XML, and taints the domain.
        xml = vm.virsh("dumpxml", vm.name).stdout
        assert "urn:kvmi-libvirt:introspection:1.0" in xml
        assert "hook-script" not in vm.virsh("dominfo", vm.name).stdout


def test_when_the_tool_goes_status_says_so_and_the_vm_runs_on(vm: Vm) -> None:
    vm.define(hooked(vm))
    with probe(vm.socket, "--once") as tool:
        vm.must_start()
        tool.process.communicate(timeout=30)
    wait_until(lambda: status(vm)["state"] == "failed", what="the channel's end is seen")
    assert "closed its channel" in str(status(vm)["error"])
    assert vm.state() == "running"

    # A new tool, hooked by hand: the dead hook is taken off first.
    with probe(vm.socket) as tool:
        result = cli("hook", vm.name)
        assert result.returncode == 0, result.stderr
        assert allowed(tool.result()["commands"]) == {*COMMANDS, *ALWAYS_ALLOWED}
        assert status(vm)["state"] == "hooked"


def test_hook_and_unhook_by_hand(vm: Vm) -> None:
    vm.define()
    policy = host.write(vm.host.directory / f"{vm.name}.xml", hooked(vm))
    vm.must_start()
    with probe(vm.socket) as tool:
        result = cli("hook", vm.name, "--policy", str(policy), "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["state"] == "hooked"
        assert allowed(tool.result()["events"]) == set(EVENTS)

        again = cli("hook", vm.name, "--policy", str(policy))
        assert (again.returncode, again.stderr.count("\n")) == (1, 1)
        assert "hooked already" in again.stderr

        undone = cli("unhook", vm.name)
        assert undone.returncode == 0, undone.stderr
        assert status(vm)["state"] == "unhooked"
        assert vm.qmp("query-status")["status"] == "running"
    missing = cli("hook", "no-such-domain")
    assert (missing.returncode, missing.stderr.count("\n")) == (5, 1)


@pytest.mark.parametrize("operation", ["prepare"])
def test_a_bad_required_policy_is_refused_before_qemu_exists(vm: Vm, operation: str) -> None:
    vm.define(hooked(vm).replace("KVMI_VM_GET_INFO", "KVMI_VM_GET_INFOS"))
    with host.marked_operations() as operations:
        result = vm.start()

        assert result.returncode != 0
        assert "KVMI_VM_GET_INFOS" in result.stderr
        assert "Traceback" not in result.stderr
        assert operation in operations(vm.name)
        assert "started" not in operations(vm.name)


def test_a_bad_optional_policy_does_not_keep_the_vm_from_starting(vm: Vm) -> None:
    metadata = hooked(vm, mode="optional").replace("KVMI_VM_GET_INFO", "KVMI_VM_GET_INFOS")
    vm.define(metadata)

    vm.must_start()

    assert vm.qmp("query-status")["status"] == "running"
    log = (host.LOG_DIR / "hook.log").read_text() if not Path("/dev/log").exists() else vm.name
    assert vm.name in log


def test_required_and_no_tool(vm: Vm) -> None:
    vm.define(hooked(vm))
    refused(vm, "no tool listens on", within_s=20)


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (host.Tool.SILENT, "did not answer within"),
        (host.Tool.GARBAGE, "announces"),
        (host.Tool.CLOSES, "closed the connection"),
        (host.Tool.TRICKLES, "did not answer within"),
    ],
)
def test_required_and_a_bad_tool(vm: Vm, behaviour: host.Tool, expected: str) -> None:
    vm.define(hooked(vm, handshake_s=1))  # type: ignore[arg-type]
    with host.bad_tool(vm.socket, behaviour):
        refused(vm, expected, within_s=20)


def test_required_and_a_kernel_without_kvmi(vm: Vm) -> None:
    vm.define(hooked(vm), emulator="/usr/bin/qemu-system-x86_64")
    with probe(vm.socket):
        refused(vm, "has no KVM introspection (KVMI)", within_s=20)


def refused(vm: Vm, reason: str, *, within_s: float) -> None:
    started_at = time.monotonic()
    result = vm.start()
    elapsed_s = time.monotonic() - started_at

    assert result.returncode != 0
    assert reason in result.stderr
    lines = [line for line in result.stderr.splitlines() if "requires introspection" in line]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert elapsed_s < within_s
    assert vm.state() == "shut off"
    wait_until(lambda: not processes_with(vm.uuid), what="QEMU is gone")
    assert not state_files(vm)


@pytest.mark.parametrize("kernel", ["emulated", "without KVMI"])
def test_optional_and_no_introspection_possible(vm: Vm, kernel: str) -> None:
    plain = "/usr/bin/qemu-system-x86_64" if kernel == "without KVMI" else None
    vm.define(hooked(vm, mode="optional"), emulator=plain)

    vm.must_start()

    assert vm.qmp("query-status")["status"] == "running"
    found = status(vm)
    assert (found["state"], found["mode"]) == ("failed", "optional")
    reason = "KVM introspection (KVMI)" if plain else "no tool listens on"
    assert reason in str(found["error"])
    shown = cli("status")
    assert vm.name in shown.stdout
    assert reason in shown.stdout


def test_reconnect_verifies_and_the_vm_stays_hooked(vm: Vm) -> None:
    vm.define(hooked(vm))
    with probe(vm.socket) as tool:
        vm.must_start()
        tool.result()
        pid = vm.pid()
        with host.marked_operations() as operations:
            host.restart_libvirtd()
            wait_until(lambda: "reconnect" in operations(vm.name), what="reconnect ran")

        assert (vm.state(), vm.pid()) == ("running", pid)
        assert status(vm)["state"] == "hooked"


@pytest.mark.parametrize("breakage", list(host.Breakage))
def test_reconnect_never_fails_whatever_is_broken(vm: Vm, breakage: host.Breakage) -> None:
    vm.define(hooked(vm))
    with probe(vm.socket) as tool:
        vm.must_start()
        tool.result()
        pid = vm.pid()
        with (
            host.broken(breakage, vm.host.hook, STATE_DIR / f"{vm.uuid}.json"),
            host.marked_operations() as operations,
        ):
            host.restart_libvirtd()
            wait_until(lambda: "reconnect" in operations(vm.name), what="reconnect ran")
            # libvirtd answers about the domain once its reconnect thread has let it go.
            assert (vm.state(), vm.pid()) == ("running", pid)
            assert vm.qmp("query-status")["status"] == "running"
