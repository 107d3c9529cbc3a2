# SPDX-License-Identifier: Apache-2.0
"""A QEMU on the emulated kernel, with its monitor: what tests and benchmarks visit.

No libvirt here.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt import session, worker
from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.plan import Plan, make_plan
from kvmi_libvirt.policy.element import Domain
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource
from kvmi_libvirt.qemu.process import Process

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN: Final = Path(sys.executable).parent
QEMU: Final = "/usr/bin/qemu-system-x86_64"
_TIMEOUT_S: Final = 20.0
_MEMORY_MIB: Final = 32


def full_policy(source: UnixSource) -> Policy:
    """Return the policy that allows each command and event of v12 by its name."""
    return Policy(
        mode=Mode.REQUIRED,
        source=source,
        commands=Rights(
            allowed=frozenset(command.name for command in V12.commands) - ALWAYS_ALLOWED
        ),
        events=Rights(allowed=frozenset(event.name for event in V12.events)),
    )


def full_plan() -> Plan:
    """Return HOOK and a single grant of each command and event of v12."""
    return make_plan(full_policy(UnixSource(path="/run/kvmi/nobody.sock")), V12, None)


class Rig:
    """A running QEMU: its process, its monitor."""

    def __init__(self, process: Process, monitor: socket.socket, domain_uuid: str) -> None:
        """Take what ``qemu()`` made; borrowed."""
        self.process = process
        self.uuid = domain_uuid
        self._lock = threading.Lock()
        self._monitor = monitor
        self._reader = monitor.makefile("rb")
        self._reader.readline()
        self.qmp("qmp_capabilities")
        # An answer comes from the main loop: by then the VM exists.
        self.vm_fd = process.vm_fds().vm

    def close(self) -> None:
        """Close the monitor's reader."""
        self._reader.close()

    def domain(self, name: str) -> Domain:
        """Return what libvirt would say of it under that name."""
        return Domain(
            name=name,
            uuid=self.uuid,
            vcpus=len(self.qmp("query-cpus-fast")),
            memory_bytes=_MEMORY_MIB << 20,
            machine="pc",
            policy=None,
            origin="the rig",
        )

    def qmp(self, command: str, **arguments: object) -> Any:
        """Return the answer to a QMP command; several threads may ask."""
        message = {"execute": command, "arguments": arguments}
        with self._lock:
            self._monitor.sendall(json.dumps(message).encode() + b"\n")
            while True:
                answer = json.loads(self._reader.readline())
                if "return" in answer:
                    return answer["return"]
                assert "event" in answer, answer

    def size(self) -> tuple[int, int]:
        """Return how many descriptors and how many mappings the process has."""
        return len(self.process.fd_links()), self.process.read("maps").count(b"\n")

    def visit(self, plan: Plan) -> session.Report:
        """Hook with *plan* and a socket of nobody's; unhook; return the hooking's report."""
        near, far = socket.socketpair()
        with near, far:
            deadline = time.monotonic() + 5
            report = worker.run(
                lambda: session.hook(
                    self.process, self.vm_fd, plan, near, bytes(16), deadline=deadline
                ),
                deadline=deadline,
                keep_fds=(*self.process.owned_fds, near.fileno()),
            )
            self.unhook()
        return report

    def unhook(self) -> None:
        """Take the hook off."""
        deadline = time.monotonic() + 5
        worker.run(
            lambda: session.unhook(self.process, self.vm_fd, V12, deadline=deadline),
            deadline=deadline,
            keep_fds=self.process.owned_fds,
        )

    def probe(self) -> None:
        """Attach, ask for the revision, detach."""
        deadline = time.monotonic() + 5
        worker.run(
            lambda: session.probe(self.process, self.vm_fd, deadline=deadline),
            deadline=deadline,
            keep_fds=self.process.owned_fds,
        )


@contextlib.contextmanager
def qemu(rom: bytes, *, vcpus: int = 1) -> Iterator[Rig]:
    """Run a QEMU whose guest executes *rom*, on the emulated kernel, for the block."""
    with tempfile.TemporaryDirectory(prefix="kvmi-rig-") as name:
        directory = Path(name)
        (directory / "rom").write_bytes(rom)
        path = directory / "qmp.sock"
        domain_uuid = str(uuid.uuid4())
        command = [
            *(str(BIN / "kvmi-libvirt"), "emulate", "--", QEMU),
            *("-machine", "pc,accel=kvm", "-m", str(_MEMORY_MIB), "-smp", str(vcpus)),
            *("-bios", str(directory / "rom"), "-uuid", domain_uuid),
            *("-nodefaults", "-display", "none", "-serial", "null"),
            *("-qmp", f"unix:{path},server=on,wait=off"),
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as popen:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as monitor:
                    connect(monitor, path)
                    with Process(Pid(popen.pid)) as process:
                        rig = Rig(process, monitor, domain_uuid)
                        try:
                            yield rig
                        finally:
                            rig.close()
            finally:
                popen.kill()


def connect(sock: socket.socket, path: Path) -> None:
    """Connect to *path* as soon as somebody listens there."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            sock.connect(str(path))
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
