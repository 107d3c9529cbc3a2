# SPDX-License-Identifier: Apache-2.0
"""A process below the launcher, told what to do, for the emulator's tests."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import stop_process, wait_for_supervisor, wait_until

from kvmi_libvirt import linux
from kvmi_libvirt.abi.kvmi import KVM_CHECK_EXTENSION, Ioctl, KvmiAbi
from kvmi_libvirt.newtypes import LocalFd, RemoteFd

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VICTIM = Path(__file__).parent / "victims" / "emulator_victim.py"
COMMAND_LINE = Path(sys.executable).with_name("kvmi-libvirt")
WRAPPER = Path(sys.executable).with_name("kvmi-emulated-qemu")
TIMEOUT_S = 20.0

GET_VERSION = struct.pack("<HHI", 2, 0, 1)
GET_INFO = struct.pack("<HHI", 8, 0, 1)

EMULATOR_ENDED = "the KVMI emulator of this VM has ended: restart the VM"


def feature(allow: int, feature_id: int) -> str:
    """Return the argument of COMMAND and EVENT, in hex."""
    return struct.pack("=Ii", allow, feature_id).hex()


def hook_argument(fd: int, *, padding: int = 0, uuid: bytes = bytes(16)) -> str:
    """Return the argument of HOOK, in hex."""
    return struct.pack("=iI16s", fd, padding, uuid).hex()


def wait_until_notified(tid: int) -> None:
    """Wait until thread *tid* waits for the supervisor's answer."""
    wchan = Path(f"/proc/{tid}/wchan")
    wait_until(lambda: "seccomp" in wchan.read_text(encoding="ascii"), what="the call is notified")


def wait_for_end(pidfd: int, *, what: str) -> None:
    """Wait until the process behind *pidfd* has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(TIMEOUT_S * 1000), f"still there: {what}"


def end_supervisor(supervisor: int) -> None:
    """Kill a supervisor and wait until it is gone."""
    pidfd = os.pidfd_open(supervisor)
    try:
        os.kill(supervisor, signal.SIGKILL)
        wait_for_end(pidfd, what="the supervisor")
    finally:
        os.close(pidfd)


@contextmanager
def channels_kept_open(supervisor: int) -> Iterator[None]:
    """Keep the tools' sockets open for the block, so that no channel closes meanwhile."""
    directory = f"/proc/{supervisor}/fd"
    pidfd = LocalFd(os.pidfd_open(supervisor))
    copies = [
        linux.pidfd_getfd(pidfd, RemoteFd(int(fd)))
        for fd in os.listdir(directory)
        if os.readlink(f"{directory}/{fd}").startswith("socket:")
    ]
    try:
        yield
    finally:
        for fd in (pidfd, *copies):
            os.close(fd)


def tool_pair() -> tuple[socket.socket, socket.socket]:
    """Return the tool's end, with a timeout, and the end to hook."""
    tool, kernel_end = socket.socketpair()
    tool.settimeout(TIMEOUT_S)
    return tool, kernel_end


def wait_until_read(tool: socket.socket) -> None:
    """Wait until the other end has read all that was sent, so that what follows comes apart."""

    def is_read() -> bool:
        unread = fcntl.ioctl(tool, termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(unread, "little") == 0

    wait_until(is_read, what="what was sent is read")


def received(tool: socket.socket, length: int) -> bytes:
    """Return exactly *length* bytes, or fewer at the end of the stream."""
    data = b""
    while len(data) < length:
        piece = tool.recv(length - len(data))
        if not piece:
            break
        data += piece
    return data


def asked(tool: socket.socket, message: bytes) -> bytes:
    """Send one message and return its whole reply."""
    tool.sendall(message)
    header = received(tool, 8)
    return header + received(tool, struct.unpack_from("<H", header, 2)[0])


class Emulated:
    """A victim below ``kvmi-libvirt emulate``, or QEMU's wrapper. Use it with ``with``."""

    def __init__(
        self,
        abi: KvmiAbi,
        trace: Path | None = None,
        *,
        options: Sequence[str] = (),
        user: int | None = None,
        wrapper: bool = False,
    ) -> None:
        self.abi = abi
        self.vm = -1
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(TIMEOUT_S)
        command = [str(COMMAND_LINE), "emulate", "--abi", abi.name, *options]
        if trace is not None:
            command += ["--trace", str(trace)]
        self._second, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._second.settimeout(TIMEOUT_S)
        with theirs, second:
            fds = [theirs.fileno(), second.fileno()]
            victim = [str(VICTIM), *map(str, fds)]
            command = [*command, "--", sys.executable, *victim]
            environment = None
            if wrapper:
                assert not options
                name = f"{WRAPPER.name}-{abi.name}".removesuffix("-v12")
                command = [str(WRAPPER.with_name(name)), *victim]
                environment = {**os.environ, "KVMI_QEMU": sys.executable, "PERL5OPT": "-w -Mstrict"}
            self.process = subprocess.Popen(
                command, pass_fds=fds, user=user, stderr=subprocess.PIPE, env=environment
            )
        self.pid = self.process.pid
        try:
            self.do("status")  # it runs: so does its supervisor
            self.supervisor = wait_for_supervisor(self.pid)
            self.supervisor_pidfd = os.pidfd_open(self.supervisor)
        except BaseException:
            self.process.kill()
            self.process.communicate()
            self._control.close()
            self._second.close()
            raise

    def __enter__(self) -> Emulated:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._second.close()
        try:
            signal.pidfd_send_signal(self.supervisor_pidfd, signal.SIGCONT)
        except ProcessLookupError:  # ended already, as some tests want
            pass
        try:
            errors = self.process.communicate(timeout=TIMEOUT_S)[1]
            assert errors == b"" or self.process.returncode < 0, errors
            wait_for_end(self.supervisor_pidfd, what="the supervisor")
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.communicate()
            os.close(self.supervisor_pidfd)

    def ask(self, op: str, *, fds: Sequence[int] = (), **arguments: Any) -> None:
        """Send a request without waiting for the answer."""
        request = json.dumps({"op": op, **arguments}).encode()
        socket.send_fds(self._control, [request], list(fds))

    def answer(self) -> Any:
        """Return the answer to the oldest request."""
        data = self._control.recv(1 << 17)
        if not data:
            pytest.fail(f"the victim ended: {self.process.communicate()[1]!r}")
        return json.loads(data)["result"]

    def do(self, op: str, *, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """Let the victim do *op* and return what it says."""
        self.ask(op, fds=fds, **arguments)
        return self.answer()

    def make_vm(self) -> int:
        """Return the VM fd, in the victim, of a new VM."""
        self.vm = int(self.do("create_vm", kvm=self.do("open_kvm")))
        return self.vm

    def has_answer(self, *, within_s: float) -> bool:
        """Say whether an answer came within so many seconds."""
        return _is_readable(self._control, within_s)

    @contextmanager
    def second(self, vm: int) -> Iterator[SecondThread]:
        """Go on in a second thread of the victim, while its main thread is in a call."""
        # Made before by every victim: it reads from a pair of its own.
        yield SecondThread(self, self._second, vm)

    def give(self, sock: socket.socket) -> int:
        """Pass a socket to the victim; return its fd there."""
        return int(self.do("received", fds=[sock.fileno()])[0])

    def call(self, ioctl: Ioctl, fd: int, argument: str = "") -> dict[str, Any]:
        """Return the request for one ioctl, for in_thread and in_fork."""
        request = self.abi.request(ioctl)
        if argument:
            return {"op": "ioctls", "fd": fd, "request": request, "arguments": [argument]}
        return {"op": "ioctl", "fd": fd, "request": request, "argument": 0}

    def ioctl(self, ioctl: Ioctl, fd: int, argument: str = "") -> int | str:
        """Make one introspection ioctl; return its result or the name of its errno."""
        answer = self.do(**self.call(ioctl, fd, argument))
        result: int | str = answer[0] if argument else answer
        return result

    def check_extension(self, fd: int, extension: int | None = None) -> int | str:
        """Ask *fd* for an extension, the introspection capability by default."""
        wanted = self.abi.capability if extension is None else extension
        result: int | str = self.do("ioctl", fd=fd, request=KVM_CHECK_EXTENSION, argument=wanted)
        return result

    def hook(self, vm: int) -> socket.socket:
        """Hook *vm*; return the tool's end."""
        tool, kernel_end = tool_pair()
        with kernel_end:
            fd = self.give(kernel_end)
        assert self.ioctl(Ioctl.HOOK, vm, hook_argument(fd)) == 0
        self.do("close", fd=fd)
        return tool

    def stop_supervisor(self) -> None:
        """Stop the supervisor, and wait until it is."""
        stop_process(self.supervisor)

    def wait_until_blocked(self, pid: int | None = None) -> None:
        """Wait until the victim's main thread, or *pid*, waits for the supervisor's answer."""
        wait_until_notified(pid or self.pid)


class SecondThread:
    """A second thread of the victim, for calls on one VM."""

    def __init__(self, victim: Emulated, control: socket.socket, vm: int) -> None:
        self._victim = victim
        self._control = control
        self._vm = vm

    def ask_many(self, calls: Sequence[tuple[Ioctl, str]]) -> int:
        """Send the calls without waiting; return how many answers will come."""
        for ioctl, argument in calls:
            call = self._victim.call(ioctl, self._vm, argument)
            self._control.send(json.dumps(call).encode())
        return len(calls)

    def has_answer(self, *, within_s: float) -> bool:
        """Say whether an answer came within so many seconds."""
        return _is_readable(self._control, within_s)

    def answers(self, count: int) -> list[Any]:
        """Return the next answers."""
        results = [json.loads(self._control.recv(1 << 17))["result"] for _ in range(count)]
        return [each[0] if isinstance(each, list) else each for each in results]


def _is_readable(sock: socket.socket, within_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


def trace_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a trace."""
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def subscribed(
    victim: Emulated, vm: int, *, send_timeout_us: int = 0
) -> tuple[socket.socket, socket.socket]:
    """Hook *vm* with a tool that takes the unhook event; return its end, and the kernel's."""
    tool, kernel_end = socket.socketpair()
    tool.settimeout(20)
    timeval = struct.pack("@ll", 0, send_timeout_us)
    kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    fd = victim.give(kernel_end)
    control = victim.abi.commands_by_name["KVMI_VM_CONTROL_EVENTS"].id
    assert victim.ioctl(Ioctl.HOOK, vm, hook_argument(fd)) == 0
    victim.do("close", fd=fd)
    assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, control)) == 0
    assert victim.ioctl(Ioctl.EVENT, vm, feature(1, 0)) == 0
    assert asked(tool, struct.pack("<HHIHBBI", control, 8, 5, 0, 1, 0, 0))[8:12] == bytes(4)
    return tool, kernel_end


def fill(victim: Emulated, vm: int) -> int:
    """Make PREUNHOOK until one stays open; return how many did not."""
    for done in range(1000):
        victim.ask(**victim.call(Ioctl.PREUNHOOK, vm))
        if not victim.has_answer(within_s=0.3):
            victim.wait_until_blocked()
            return done
        assert victim.answer() == 0
    pytest.fail("a socket without end")


def copied_wrapper(directory: Path, *, python: str, perl: str = "/usr/bin/perl") -> Path:
    """Return a copy of the wrapper that finds other interpreters."""
    copy = directory / "kvmi-emulated-qemu"
    copy.write_text(WRAPPER.read_text().replace("=/usr/bin/perl\n", f"={perl}\n"))
    copy.chmod(0o755)
    found = directory / "python3"
    found.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    found.chmod(0o755)
    return copy


def run_as_qemu(directory: Path, script: str, *, python: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script as the wrapper's QEMU, with this for the wrapper's Python."""
    program = directory / "qemu"
    program.write_text(f"#!{sys.executable} -IS\n{script}\n")
    program.chmod(0o755)
    return subprocess.run(
        [str(copied_wrapper(directory, python=python))],
        env={**os.environ, "KVMI_QEMU": str(program)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
