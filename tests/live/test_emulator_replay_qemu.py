# SPDX-License-Identifier: Apache-2.0
"""What a real KVMI kernel answered a real QEMU, against a real QEMU on the emulated kernel.

The recording (tests/data/emulator-kernel-replay-qemu.jsonl) was made by injecting the ioctls
into QEMU's main thread from outside; so they are here. The socket reaches QEMU through its monitor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import pytest
from emulator_replay import as_revision, excused_records, masks_of
from support import wait_until

from kvmi_libvirt import linux
from kvmi_libvirt.abi.kvmi import (
    Ioctl,
    KvmiAbi,
    kvm_introspection_feature,
    kvm_introspection_hook,
)
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import RemoteSyscallError
from kvmi_libvirt.newtypes import LocalFd, Pid, RemoteFd
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.qemu.remote import Remote
from kvmi_libvirt.qemu.tracee import attach_parked

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Iterator, Sequence

    from emulator_replay import Step
    from support import Tell

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

Record: TypeAlias = "dict[str, Any]"

DATA: Final = Path(__file__).parents[1] / "data" / "emulator-kernel-replay-qemu.jsonl"
COMMAND_LINE: Final = Path(sys.executable).with_name("kvmi-libvirt")
TIMEOUT_S: Final = 20.0
CODE_AT: Final = 0x7C00
CODE: Final = bytes.fromhex("f4ebfd00")  # hlt; jmp to it: what the recorded guest ran
FIRMWARE: Final = (  # jmp far 0:0x7c00, at the reset vector
    (b"\xf4" * 0xFFF0 + bytes.fromhex("ea007c0000")).ljust(0x10000, b"\xf4")
)


class Qemu:
    """A QEMU on the emulated kernel, and the tool's ends of the sockets it was given."""

    def __init__(self, abi: KvmiAbi, process: Process, monitor: socket.socket) -> None:
        self.abi = abi
        self.process = process
        self.tools: list[socket.socket] = []
        self._monitor = monitor
        self._answers = monitor.makefile("rb")
        self._answers.readline()
        self.qmp("qmp_capabilities")
        self.vm_fd = process.vm_fds().vm
        self._channel = RemoteFd(-1)

    def close(self) -> None:
        self._answers.close()
        for tool in self.tools:
            tool.close()

    def qmp(self, command: str, fds: Sequence[int] = (), **arguments: object) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._monitor, [request], list(fds))
        while True:
            answer = json.loads(self._answers.readline())
            if "event" not in answer:
                return answer["return"]

    def ioctl(self, ioctl: Ioctl, argument: ctypes.Structure | None = None) -> int | str:
        """Let QEMU's main thread make an ioctl on its VM; its result, or the errno's name."""
        with attach_parked(self.process, deadline=time.monotonic() + TIMEOUT_S) as tracee:
            remote = Remote(self.process, tracee)
            address = 0 if argument is None else remote.write_struct(0, argument)
            try:
                return remote.ioctl(ioctl.value, self.vm_fd, self.abi.request(ioctl), address)
            except RemoteSyscallError as error:
                return errno.errorcode[error.errno or 0]

    def give_socket(self) -> None:
        """Pass QEMU a new socket; keep the tool's end."""
        tool, theirs = socket.socketpair()
        tool.settimeout(TIMEOUT_S)
        self.tools.append(tool)
        with theirs:
            link = f"socket:[{os.fstat(theirs.fileno()).st_ino}]"
            self.qmp("getfd", [theirs.fileno()], fdname=f"tool{len(self.tools)}")
        (self._channel,) = [fd for fd, to in self.process.fd_links().items() if to == link]

    def hook(self) -> int | str:
        return self.ioctl(Ioctl.HOOK, kvm_introspection_hook(self._channel, 0))

    def exchange(self, sent: bytes, length: int) -> bytes:
        tool = self.tools[-1]
        tool.sendall(sent)
        received = b""
        while len(received) < length:
            piece = tool.recv(length - len(received))
            if not piece:
                break
            received += piece
        return received


@contextlib.contextmanager
def running_qemu(abi: KvmiAbi, directory: Path) -> Iterator[Qemu]:
    """Have a QEMU with one vCPU, which halts at once."""
    monitor_path = directory / "qmp"
    (directory / "firmware").write_bytes(FIRMWARE)
    (directory / "code").write_bytes(CODE)
    command = [
        *(str(COMMAND_LINE), "emulate", "--abi", abi.name, "--", "qemu-system-x86_64"),
        *("-machine", "pc,accel=kvm", "-smp", "1", "-m", "32", "-nodefaults", "-display", "none"),
        *("-bios", str(directory / "firmware"), "-sandbox", "on"),
        *("-device", f"loader,file={directory}/code,addr={CODE_AT:#x},force-raw=on"),
        *("-qmp", f"unix:{monitor_path},server=on,wait=off"),
    ]
    with (
        subprocess.Popen(command, stdin=subprocess.DEVNULL) as popen,
        socket.socket(socket.AF_UNIX) as monitor,
    ):
        try:
            monitor.settimeout(TIMEOUT_S)
            wait_until(lambda: connects(monitor, monitor_path), what="QEMU has a monitor")
            with Process(Pid(popen.pid)) as process, contextlib.ExitStack() as stack:
                qemu = Qemu(abi, process, monitor)
                stack.callback(qemu.close)
                yield qemu
        finally:
            popen.kill()


def connects(monitor: socket.socket, path: Path) -> bool:
    try:
        monitor.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def recorded_ioctl(record: Record) -> int | str:
    return record["errno"] or int(record["ret"])


def from_outside(qemu: Qemu, record: Record) -> tuple[object, object]:
    copy = linux.pidfd_getfd(LocalFd(qemu.process.pidfd), qemu.vm_fd)
    answer: int | str = 0
    try:
        fcntl.ioctl(copy, qemu.abi.request(Ioctl.COMMAND), bytes(8))
    except OSError as error:
        answer = errno.errorcode[error.errno or 0]
    finally:
        os.close(copy)
    return recorded_ioctl(record), answer


def injected(qemu: Qemu, record: Record) -> tuple[object, object]:
    ioctl = Ioctl[record["op"].split()[0]]
    if ioctl is Ioctl.HOOK:
        if record["errno"] is None:
            qemu.give_socket()
        return recorded_ioctl(record), qemu.hook()
    argument = kvm_introspection_feature(*record["args"]) if record["args"] else None
    return recorded_ioctl(record), qemu.ioctl(ioctl, argument)


def message(qemu: Qemu, record: Record) -> tuple[object, object]:
    # The reply's own header tells how long it is: a shorter one is an answer, too.
    header = qemu.exchange(bytes.fromhex(record["sent"]), 8)
    answer = header + qemu.exchange(b"", struct.unpack_from("<H", header, 2)[0])
    return record["got"], answer.hex()


def masks(qemu: Qemu, record: Record) -> tuple[object, object]:
    return record["commands"], masks_of(qemu.exchange, 4, record["commands"])


def alive(qemu: Qemu, record: Record) -> tuple[object, object]:
    return record["value"], qemu.qmp("query-status")["running"]


def first_channel(qemu: Qemu, record: Record) -> tuple[object, object]:
    return record["state"], state_of(qemu.tools[0])


def terminated(qemu: Qemu, record: Record) -> tuple[object, object]:
    # The recording process still had a copy of the VM fd.
    copy = linux.pidfd_getfd(LocalFd(qemu.process.pidfd), qemu.vm_fd)
    qemu.qmp("quit")
    select.select([qemu.process.pidfd], [], [], TIMEOUT_S)
    try:
        return record["state"], state_of(qemu.tools[1])
    finally:
        os.close(copy)


def state_of(tool: socket.socket) -> str:
    return "eof" if tool.recv(1) == b"" else "data"


PLAYERS: Final[dict[str, Callable[[Qemu, Record], tuple[object, object]]]] = {
    "COMMAND through pidfd_getfd()": from_outside,
    "COMMAND injected": injected,
    "EVENT injected": injected,
    "HOOK injected": injected,
    "UNHOOK injected": injected,
    "MSG": message,
    "MASKS": masks,
    "QEMU alive": alive,
    "first channel": first_channel,
    "QEMU terminated": terminated,
}


@pytest.mark.parametrize("abi", [V11, V12], ids=lambda abi: abi.name)
def test_recorded_kernel_when_replayed_through_qemu_then_every_answer_is_equal_or_excused(
    abi: KvmiAbi, tmp_path: Path, tell: Tell
) -> None:
    differing: dict[int, tuple[object, object]] = {}
    lines = DATA.read_text(encoding="ascii").splitlines()
    with running_qemu(abi, tmp_path) as qemu:
        assert memory_becomes(qemu, CODE_AT, CODE)
        for line in lines:
            step: Step = json.loads(line)
            record = cast("Record", as_revision(step, abi))
            (player,) = [p for begin, p in PLAYERS.items() if record["op"].startswith(begin)]
            recorded, answered = player(qemu, record)
            if recorded != answered:
                differing[record["record"]] = (recorded, answered)

    replayed = {json.loads(line)["record"] for line in lines}
    expected = replayed & excused_records("qemu").keys()
    assert differing.keys() == expected, differing
    tell(f"{len(lines)} steps through a real QEMU compared, KVMI {abi.name}")


def memory_becomes(qemu: Qemu, gpa: int, data: bytes) -> bool:
    """Wait until the guest has *data* at *gpa*, as the monitor sees it."""
    wanted = " ".join(f"0x{byte:02x}" for byte in data)

    def has_it() -> bool:
        shown = {"command-line": f"xp /{len(data)}xb {gpa:#x}"}
        return wanted in str(qemu.qmp("human-monitor-command", (), **shown))

    wait_until(has_it, what="the guest's code is in its memory")
    return True
