# SPDX-License-Identifier: Apache-2.0
"""A real libvirtd with our hook, VMs on the emulated KVMI kernel, and tools."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import host
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VIRSH = ("virsh", "-q", "-c", "qemu:///system")
NAMESPACE = "urn:kvmi-libvirt:introspection:1.0"
BIN = Path(sys.executable).parent


@dataclass
class Host:
    """What the session's fixtures prepared."""

    emulator: Path
    rom: Path
    directory: Path
    hook: Path


@pytest.fixture(scope="session")
def prepared() -> Iterator[Host]:
    """Have a libvirtd with our hook for the whole run."""
    with (
        host.libvirtd(),
        host.directories(),
        host.public_directory() as directory,
        host.hook_installed() as hook,
    ):
        rom = directory / "marker.rom"
        rom.write_bytes(host.marker_rom())
        emulator = host.emulator(BIN / "kvmi-emulated-qemu", directory)
        yield Host(emulator=emulator, rom=rom, directory=directory, hook=hook)


def element(
    socket_path: Path,
    *,
    mode: str = "required",
    commands: tuple[str, ...] = (),
    events: tuple[str, ...] = (),
    handshake_s: int = 3,
) -> str:
    """Return an introspection element."""
    allowed_commands = "".join(f"<k:allow name='{name}'/>" for name in commands)
    allowed_events = "".join(f"<k:allow name='{name}'/>" for name in events)
    return (
        f"<k:introspection xmlns:k='{NAMESPACE}' mode='{mode}'>"
        f"<k:source type='unix' path='{socket_path}'/>"
        f"<k:handshake timeout='{handshake_s}'/>"
        f"<k:commands>{allowed_commands}</k:commands>"
        f"<k:events>{allowed_events}</k:events>"
        "</k:introspection>"
    )


@dataclass
class Vm:
    """One libvirt domain of a test."""

    host: Host
    name: str
    uuid: str
    serial: Path
    socket: Path
    rom: Path | None = None

    def virsh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run virsh, bounded in time."""
        return subprocess.run(
            [*VIRSH, *arguments], capture_output=True, text=True, timeout=60, check=False
        )

    def define(
        self,
        metadata: str = "",
        *,
        emulator: Path | str | None = None,
        devices: str = "",
        max_vcpus: int = 2,
        rom: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        """Define the domain with *metadata*, two vCPUs, more *devices* and QEMU *options*."""
        arguments = "".join(f"<q:arg value='{option}'/>" for option in options)
        commandline = (
            "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>"
            f"{arguments}</q:commandline>"
        )
        xml = f"""
<domain type='kvm'>
  <name>{self.name}</name>
  <uuid>{self.uuid}</uuid>
  <metadata>{metadata}</metadata>
  <memory unit='MiB'>32</memory>
  <vcpu current='2'>{max_vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <loader readonly='yes' type='rom'>{rom or self.host.rom}</loader>
  </os>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>{emulator or self.host.emulator}</emulator>
    <serial type='file'><source path='{self.serial}'/></serial>
    <memballoon model='none'/>{devices}
    <controller type='usb' model='none'/>
  </devices>
  {commandline if options else ""}
</domain>"""
        self.define_xml(xml)

    def define_xml(self, xml: str) -> None:
        """Define the domain as *xml* says, which must have its name and uuid."""
        result = subprocess.run(
            [*VIRSH, "define", "/dev/stdin"],
            input=xml,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr

    def start(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Start the domain; the result says how it went."""
        return self.virsh("start", self.name, *options)

    def must_start(self, *options: str) -> None:
        """Start the domain, which must succeed."""
        result = self.start(*options)
        assert result.returncode == 0, result.stderr

    def state(self) -> str:
        """Return virsh's word for the domain's state."""
        return self.virsh("domstate", self.name).stdout.strip()

    def pid(self) -> int:
        """Return QEMU's process id."""
        return int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text())

    def qmp(self, command: str) -> Any:
        """Return QEMU's answer to a QMP command."""
        result = self.virsh("qemu-monitor-command", self.name, json.dumps({"execute": command}))
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)["return"]

    def trace(self, pid: int) -> list[dict[str, Any]]:
        """Return the emulator's trace of the QEMU with *pid*."""
        path = host.LOG_DIR / f"emulator-{pid}.jsonl"
        if not path.exists():  # made with its first line
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def guest_output_len(self) -> int:
        """Return how many bytes the guest has written to its serial port."""
        return self.serial.stat().st_size if self.serial.exists() else 0


@pytest.fixture
def vm(prepared: Host, request: pytest.FixtureRequest) -> Iterator[Vm]:
    """Have a domain of its own for one test; nothing of it is left afterwards."""
    name = f"kvmi-test-{uuid.uuid4().hex[:8]}"
    machine = Vm(
        host=prepared,
        name=name,
        uuid=str(uuid.uuid4()),
        serial=prepared.directory / f"{name}.serial",
        socket=host.SOCKET_DIR / f"{name}.sock",
    )
    try:
        yield machine
    finally:
        machine.virsh("destroy", name)
        machine.virsh("managedsave-remove", name)
        machine.virsh("undefine", name)


@dataclass
class Tool:
    """A running ``kvmi-libvirt probe``."""

    process: subprocess.Popen[str]

    def result(self) -> dict[str, Any]:
        """Return what it prints, one JSON document a line; wait for it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the probe ended without a result"
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def probe(socket_path: Path, *options: str, within: Sequence[str] = ()) -> Iterator[Tool]:
    """Run a probe that listens on *socket_path* for the block.

    *within* is the command that enters another host's namespaces.
    """
    command = [
        *within,
        str(BIN / "kvmi-libvirt"),
        "probe",
        "--listen",
        f"unix:{socket_path}",
        "--json",
        *options,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == f"listening on unix:{socket_path}\n"
            yield Tool(process)
        finally:
            process.terminate()


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run kvmi-libvirt, bounded in time."""
    return subprocess.run(
        [BIN / "kvmi-libvirt", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def allowed(answers: dict[str, str]) -> set[str]:
    """Return the names the kernel side allows."""
    return {name for name, verdict in answers.items() if verdict == "allowed"}


def processes_with(text: str) -> set[int]:
    """Return the processes whose command line contains *text*."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if text.encode() in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found
