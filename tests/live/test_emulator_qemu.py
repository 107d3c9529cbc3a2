# SPDX-License-Identifier: Apache-2.0
"""A real QEMU without libvirt on each emulated revision: its rights, and its memory.

The tool is tests/live/protocol_client.py, which knows only docs/protocol.md; what it reads
and writes is compared with what QEMU's own monitor shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import host
import pytest
from support import wait_for_supervisor, wait_until

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.revisions import by_name
from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.introspect import hook_vm
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.qemu.remote import Remote
from kvmi_libvirt.qemu.tracee import attach_parked
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

BIN = Path(sys.executable).parent
CLIENT = Path(__file__).with_name("protocol_client.py")
UUID = "0f3a8a3e-5c0c-4b5d-8f57-111122223333"
NAMESPACE = "urn:kvmi-libvirt:introspection:1.0"
REVISIONS = ["v12", "v11", "v7"]
COMMANDS = ("KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL")
EVENTS = ("KVMI_VM_EVENT_UNHOOK", "KVMI_VCPU_EVENT_BREAKPOINT")
RAM_LEN = 64 << 20
TIMEOUT_S = 20.0
GPA = 0x200000
EPERM, ENOENT, EINVAL, EOPNOTSUPP, ENOSYS = 1, 2, 22, 95, 1000


class Qmp:
    """QEMU's monitor."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(TIMEOUT_S)
        wait_until(lambda: self._connects(path), what="QEMU's monitor")
        self._file = self._sock.makefile("r")
        self._file.readline()
        self.ask("qmp_capabilities")

    def _connects(self, path: Path) -> bool:
        try:
            self._sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):  # bound, but not listening yet
            return False
        return True

    def ask(self, execute: str, **arguments: Any) -> Any:
        """Return the answer to one command."""
        request = {"execute": execute, "arguments": arguments}
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self._file.readline())
            if "event" not in answer:
                return answer["return"]

    def monitor(self, line: str) -> str:
        """Return what the human monitor says."""
        return str(self.ask("human-monitor-command", **{"command-line": line}))

    def memory(self, gpa: int, length: int) -> bytes:
        """Return guest physical memory as ``xp`` shows it."""
        shown = self.monitor(f"xp /{length}xb {gpa:#x}")
        return bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})\b", shown))

    def close(self) -> None:
        """Let go of the monitor."""
        self._file.close()
        self._sock.close()


class Client:
    """The independent tool, as a process."""

    def __init__(self, path: Path) -> None:
        # An interpreter without the package: -I -S finds nothing but the standard library.
        self.process = subprocess.Popen(
            [sys.executable, "-IS", str(CLIENT), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == {"listening": str(path)}

    def answer(self) -> dict[str, Any]:
        """Return its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the client ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Let it do *op*."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer()


@dataclass
class Emulated:
    """A QEMU on an emulated kernel, with its monitor."""

    abi: str
    process: subprocess.Popen[bytes]
    qmp: Qmp
    directory: Path

    def xml(self, tool: Path, commands: tuple[str, ...], events: tuple[str, ...]) -> bytes:
        """Return domain XML that asks for these rights."""
        rules = "".join(f"<k:allow name='{name}'/>" for name in commands)
        event_rules = "".join(f"<k:allow name='{name}'/>" for name in events)
        return (
            f"<domain type='kvm'><name>bare</name><uuid>{UUID}</uuid>"
            f"<memory unit='bytes'>{RAM_LEN}</memory><vcpu>2</vcpu><metadata>"
            f"<k:introspection xmlns:k='{NAMESPACE}' mode='required'>"
            f"<k:source type='unix' path='{tool}'/><k:handshake timeout='10'/>"
            f"<k:commands>{rules}</k:commands><k:events>{event_rules}</k:events>"
            "</k:introspection></metadata></domain>"
        ).encode()

    def hook(self, tool: Path, commands: tuple[str, ...], events: tuple[str, ...]) -> Any:
        """Hook the VM as libvirt's hook would; return the recorded state."""
        domain = parse_domain(self.xml(tool, commands, events), source="test")
        assert domain.policy is not None
        with Process(Pid(self.process.pid)) as process:
            state = StateDir(self.directory / "state")
            return hook_vm(process, domain, domain.policy, state=state)

    def ioctl(self, ioctl: Ioctl) -> int:
        """Let QEMU make an ioctl that takes no argument; return its result."""
        deadline = time.monotonic() + TIMEOUT_S
        with Process(Pid(self.process.pid)) as process:
            vm_fd = process.vm_fds().vm
            with attach_parked(process, deadline=deadline) as tracee:
                request = by_name(self.abi).request(ioctl)
                return Remote(process, tracee).ioctl(ioctl.value, vm_fd, request, 0)


@contextlib.contextmanager
def emulated_qemu(
    abi: str, directory: Path, *, qemu_options: tuple[str, ...] = (), program: str = "emulate"
) -> Iterator[Emulated]:
    """Run a QEMU with its guest paused at the start, below "emulate" or the "wrapper"."""
    monitor = directory / "qmp"
    trace = directory / "trace.jsonl"
    command = [str(BIN / "kvmi-libvirt"), "emulate", "--abi", abi, "--trace", str(trace)]
    command += ["--", "qemu-system-x86_64"]
    if program == "wrapper":
        command = [str(BIN / f"kvmi-emulated-qemu-{abi}".removesuffix("-v12"))]
    command += ["-S", "-name", "bare", "-uuid", UUID]
    command += ["-machine", "q35,accel=kvm", "-smp", "2", "-m", str(RAM_LEN >> 20)]
    command += ["-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off", "-sandbox", "on", *qemu_options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        qmp = Qmp(monitor)
        try:
            yield Emulated(abi, process, qmp, directory)
        finally:
            qmp.close()
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


@pytest.mark.parametrize("abi", REVISIONS)
def test_memory_when_written_by_the_tool_then_the_monitor_shows_it_and_the_reverse(
    abi: str, tmp_path: Path
) -> None:
    tool = tmp_path / "tool.sock"
    pattern = os.urandom(3 * 4096 + 64)  # from the middle of a page on, so of five
    with emulated_qemu(abi, tmp_path) as vm:
        client = Client(tool)
        try:
            vm.hook(tool, COMMANDS, EVENTS)
            hello = client.answer()
            assert hello["name"] == "bare"
            assert hello["uuid"] == UUID
            assert hello["hello_size"] == by_name(abi).handshake_size
            assert client.ask("identify")["data"] == abi

            assert client.ask("write", gpa=GPA, data=pattern.hex()) == {"error": 0, "data": None}
            assert vm.qmp.memory(GPA, len(pattern)) == pattern
            assert client.ask("read", gpa=GPA, size=len(pattern))["data"] == pattern.hex()

            # The other way: firmware that ran, seen by the monitor and by the tool.
            vm.qmp.ask("cont")
            wait_until(lambda: any(vm.qmp.memory(0x400, 64)), what="the firmware has run")
            vm.qmp.ask("stop")
            shown = vm.qmp.memory(0x400, 256)
            assert any(shown)
            assert client.ask("read", gpa=0x400, size=256) == {"error": 0, "data": shown.hex()}
            pages = [vm.qmp.memory(page << 12, 16).hex() for page in range(40)]
            gpas = [page << 12 for page in range(40)]
            assert client.ask("read-many", gpas=gpas, size=16)["data"] == pages

            assert client.ask("read", gpa=RAM_LEN, size=1) == {"error": ENOENT, "data": None}
            assert client.ask("info")["data"] == 2
        finally:
            client.process.communicate()


@pytest.mark.parametrize("abi", REVISIONS)
def test_protocol_when_spoken_by_the_independent_client_then_it_is_as_the_page_says(
    abi: str, tmp_path: Path
) -> None:
    tool = tmp_path / "tool.sock"
    commands = [*COMMANDS, "KVMI_VM_CONTROL_EVENTS", "KVMI_VM_PAUSE_VCPU", "KVMI_VCPU_GET_INFO"]
    if abi != "v7":
        commands.append("KVMI_VM_CONTROL_CLEANUP")
    table = by_name(abi)
    with emulated_qemu(abi, tmp_path) as vm:
        client = Client(tool)
        try:
            vm.hook(tool, tuple(commands), ("KVMI_VM_EVENT_UNHOOK", "KVMI_VCPU_EVENT_PAUSE"))
            client.answer()
            assert client.ask("identify")["data"] == abi
            assert client.ask("version")["data"] == [1, None if abi == "v7" else 8184]

            unknown = "EPERM" if abi == "v7" else "ENOENT"
            assert client.ask("check", id=12 if abi == "v7" else 1)["data"] == unknown
            assert client.ask("check", id=5000)["data"] == ("EINVAL" if abi == "v7" else "ENOENT")
            assert client.ask("check-event", id=0)["data"] == "allowed"
            breakpoint_id = table.events_by_name["KVMI_VCPU_EVENT_BREAKPOINT"].id
            assert client.ask("check-event", id=breakpoint_id)["data"] == "EPERM"
            assert client.ask("raw", id=62 if abi == "v7" else 28)["error"] == ENOSYS

            # One message stays inside a page, and is never of nothing.
            for gpa, size in ((0, 0), (0, 4097), (4095, 2)):
                assert client.ask("read-once", gpa=gpa, size=size)["error"] == EINVAL
            assert client.ask("pause", vcpu=9)["error"] == EINVAL
            assert client.ask("pause", vcpu=1)["error"] == EOPNOTSUPP
            get_info = table.commands_by_name["KVMI_VCPU_GET_INFO"].id
            assert client.ask("raw", id=get_info, data="0100")["error"] == EOPNOTSUPP
            assert client.ask("raw", id=get_info, data="0200")["error"] == EINVAL
            if abi != "v7":
                assert client.ask("cleanup", enable=0)["error"] == 0
                assert client.ask("cleanup", enable=2)["error"] == EINVAL

            for _ in range(2):
                assert client.ask("subscribe") == {"error": 0, "data": None}
            assert vm.ioctl(Ioctl.PREUNHOOK) == 0
            assert client.ask("info") == {"error": 0, "data": 2}  # the event lies before it
            event = client.ask("event")["data"]
            assert (event["seq"], event["event_id"]) == (1, 0)
            assert vm.ioctl(Ioctl.UNHOOK) == 0
            assert client.ask("info") == {"error": "eof", "data": None}
        finally:
            client.process.communicate()


@pytest.mark.parametrize("abi", REVISIONS)
def test_hook_when_made_on_a_revision_then_the_rights_are_exactly_as_asked(
    abi: str, tmp_path: Path
) -> None:
    tool = tmp_path / "tool.sock"
    commands = tuple(name for name in (*COMMANDS, "KVMI_VCPU_GET_REGISTERS"))
    command = [str(BIN / "kvmi-libvirt"), "probe", "--listen", f"unix:{tool}", "--json", "--once"]
    with (
        emulated_qemu(abi, tmp_path) as vm,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as probe,
    ):
        try:
            assert probe.stderr is not None
            assert b"listening" in probe.stderr.readline()
            recorded = vm.hook(tool, commands, EVENTS)
            assert probe.stdout is not None
            answer = json.loads(probe.stdout.read())
        finally:
            probe.terminate()

    always = {command.name for command in by_name(abi).commands if command.always_allowed}
    assert recorded.abi == abi
    assert answer["abi"] == abi
    assert {n for n, v in answer["commands"].items() if v == "allowed"} == {*commands, *always}
    assert {n for n, v in answer["events"].items() if v == "allowed"} == set(EVENTS)
    made = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    granted = [line["args"]["id"] for line in made if line["args"].get("allow") == 1]
    table = by_name(abi)
    assert sorted(granted) == sorted(
        [
            *(table.commands_by_name[name].id for name in commands),
            *(table.events_by_name[name].id for name in EVENTS),
        ]
    )


def test_max_gfn_when_asked_on_v11_then_the_guest_s(tmp_path: Path) -> None:
    tool = tmp_path / "tool.sock"
    with emulated_qemu("v11", tmp_path) as vm:
        client = Client(tool)
        try:
            vm.hook(tool, ("KVMI_VM_GET_MAX_GFN",), ())
            client.answer()
            assert client.ask("identify")["data"] == "v11"

            # The firmware's flash ends at 4 GiB.
            assert client.ask("max-gfn") == {"error": 0, "data": 1 << 20}
        finally:
            client.process.communicate()


@pytest.mark.parametrize("abi", ["v12", "v7"])
def test_denied_when_asked_by_the_independent_client_then_eperm(abi: str, tmp_path: Path) -> None:
    tool = tmp_path / "tool.sock"
    with emulated_qemu(abi, tmp_path) as vm:
        client = Client(tool)
        try:
            vm.hook(tool, ("KVMI_VM_GET_INFO",), ())
            client.answer()
            read_id = by_name(abi).commands_by_name["KVMI_VM_READ_PHYSICAL"].id

            assert client.ask("read", gpa=0, size=4) == {"error": EPERM, "data": None}
            assert client.ask("check", id=read_id) == {"error": 0, "data": "EPERM"}
            assert client.ask("subscribe") == {"error": EPERM, "data": None}
        finally:
            client.process.communicate()


@pytest.mark.parametrize("program", ["emulate", "wrapper"])
def test_guest_when_the_supervisor_was_killed_then_it_boots_and_is_reset_all_the_same(
    program: str, tmp_path: Path
) -> None:
    # Firmware changes the memory map all the time; QEMU ends itself where it cannot.
    with emulated_qemu("v12", tmp_path, qemu_options=("-device", "VGA"), program=program) as vm:
        supervisor = wait_for_supervisor(vm.process.pid)
        wait_until(lambda: is_python(supervisor), what="the supervisor is Python")
        pidfd = os.pidfd_open(supervisor)
        os.kill(supervisor, signal.SIGKILL)
        assert select.select([pidfd], [], [], TIMEOUT_S)[0]
        os.close(pidfd)

        for _ in range(2):
            vm.qmp.ask("system_reset")
            vm.qmp.ask("cont")
            # Where SeaBIOS puts the option ROM that it has read from the device.
            wait_until(
                lambda: vm.qmp.memory(0xC0000, 2) == b"\x55\xaa", what="it boots", timeout_s=60
            )
            assert vm.qmp.ask("query-status")["running"] is True
        with pytest.raises(KvmiLibvirtError, match="emulator of this VM has ended"):
            vm.hook(tmp_path / "tool.sock", COMMANDS, EVENTS)
        assert vm.process.poll() is None


def is_python(pid: int) -> bool:
    """Say whether the first stage is over."""
    return "python" in os.readlink(f"/proc/{pid}/exe")


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_guest_when_the_supervisor_does_nothing_then_it_runs_on_and_qemu_answers(
    how: signal.Signals, tmp_path: Path
) -> None:
    # Every exit of the guest's is a KVM_RUN; were one notified, the guest would stand still.
    (tmp_path / "rom").write_bytes(host.marker_rom())
    serial = tmp_path / "serial"
    machine = ("-bios", str(tmp_path / "rom"), "-serial", f"file:{serial}")
    with emulated_qemu("v12", tmp_path, qemu_options=machine) as vm:
        supervisor = wait_for_supervisor(vm.process.pid)
        os.kill(supervisor, how)
        try:
            vm.qmp.ask("cont")
            wait_until(lambda: serial.stat().st_size > 5, what="the guest writes", timeout_s=30)

            assert vm.qmp.ask("query-status")["running"] is True
        finally:
            if how is signal.SIGSTOP:
                os.kill(supervisor, signal.SIGCONT)
