# SPDX-License-Identifier: Apache-2.0
"""What a real kernel answered, against a real process on a real KVM VM fd and socket."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from emulator_harness import (
    TIMEOUT_S,
    Emulated,
    feature,
    hook_argument,
    received,
    tool_pair,
    wait_until_read,
)
from emulator_replay import replay, steps

from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12

if TYPE_CHECKING:
    from emulator_replay import Machine
    from support import Tell

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]


SILENCE_S = 0.05
"""How long a tool's end must stay silent to count as open."""

VMADDR_CID_LOCAL = 1

NO_VSOCK = (errno.EAFNOSUPPORT, errno.ENODEV, errno.ENETUNREACH, errno.ETIMEDOUT)
"""What a host without a vsock transport answers to connecting with itself."""


class RealMachine:
    """One VM of a victim process, and the tool's end of its socket."""

    def __init__(self, victim: Emulated) -> None:
        self._victim = victim
        self._tool: socket.socket | None = None
        self._vcpus = 0
        self._vm = victim.make_vm()

        self._kernel_end: socket.socket | None = None
        self._memory = 0

    def close(self) -> None:
        for sock in (self._tool, self._kernel_end):
            if sock is not None:
                sock.close()

    def fresh_vm(self, vcpus: int) -> None:
        self._vm = self._victim.make_vm()
        self._vcpus = 0
        # A new process would be needed to count the vCPUs of another VM alone.
        assert vcpus == 0

    def add_vcpus(self, count: int) -> None:
        while self._vcpus < count:
            self._victim.do("create_vcpu", vm=self._vm, index=self._vcpus)
            self._vcpus += 1

    def close_tool(self) -> None:
        assert self._tool is not None
        self._tool.close()

    def features(self, ioctl: Ioctl, arguments: list[tuple[int, int]]) -> list[str | None]:
        request = self._victim.abi.request(ioctl)
        packed = [feature(*argument) for argument in arguments]
        return _named(self._victim.do("ioctls", fd=self._vm, request=request, arguments=packed))

    def bad_pointer(self, ioctl: Ioctl, pointer: str) -> str | None:
        request = self._victim.abi.request(ioctl)
        if pointer == "unreadable":
            result = self._victim.do(
                "ioctl_at_end_of_memory",
                fd=self._vm,
                request=request,
                argument=feature(1, 8),
                inside=4,
            )
        else:
            address = int(pointer, 16)
            result = self._victim.do("ioctl", fd=self._vm, request=request, argument=address)
        return _named([result])[0]

    def add_memory(self, data: bytes) -> None:
        self._memory = self._victim.do("add_memory", vm=self._vm, gpa=0, data=data.hex())

    def guest_memory(self, gpa: int, length: int) -> bytes:
        return bytes.fromhex(self._victim.do("memory", address=self._memory + gpa, length=length))

    def tool_end(self, *, is_patient: bool) -> str:
        assert self._tool is not None
        self._tool.settimeout(TIMEOUT_S if is_patient else SILENCE_S)
        try:
            return "data" if self._tool.recv(65536) else "eof"
        except TimeoutError:
            return "open"
        except ConnectionError:
            return "eof"
        finally:
            self._tool.settimeout(TIMEOUT_S)

    def send_into_the_end(self, data: bytes, *, is_patient: bool) -> str:
        assert self._tool is not None
        is_stream = self._tool.type == socket.SOCK_STREAM
        try:
            if self._ends_by_itself:
                assert self._tool.recv(1) == b""
            self._tool.sendall(data)
        except BrokenPipeError:
            return "EPIPE"
        state = self.tool_end(is_patient=is_patient)
        return "silence" if state == "open" and not is_stream else state

    def hook(self, *, padding: int, uuid: bytes, is_socket: bool, kind: str) -> str | None:
        if not is_socket:
            fd, tool, kernel_end = self._no_socket(kind), None, None
        elif kind in SAME_SOCKET:
            assert self._kernel_end is not None
            tool, kernel_end = self._tool, self._kernel_end
            fd = self._victim.give(kernel_end)
        else:
            tool, kernel_end = socket_of_kind(kind)
            fd = self._victim.give(kernel_end)
        argument = hook_argument(fd, padding=padding, uuid=uuid)
        result = _named([self._victim.ioctl(Ioctl.HOOK, self._vm, argument)])[0]
        if fd >= 0 and fd not in (self._vm, *NO_DESCRIPTOR.values()):
            self._victim.do("close", fd=fd)
        if kernel_end is self._kernel_end:
            return result
        if result is None:
            self.close()
            self._tool, self._kernel_end = tool, kernel_end
            self._ends_by_itself = "SO_RCVTIMEO" in kind
        else:
            for sock in (tool, kernel_end):
                if sock is not None:
                    sock.close()
        return result

    def _no_socket(self, kind: str) -> int:
        if kind == "vm fd itself":
            return self._vm
        if kind in NO_DESCRIPTOR:
            return NO_DESCRIPTOR[kind]
        theirs = int(self._victim.do("received", fds=[made := NO_SOCKET[kind]()])[0])
        os.close(made)
        return theirs

    _ends_by_itself = False

    def simple(self, ioctl: Ioctl, argument: int) -> str | None:
        request = self._victim.abi.request(ioctl)
        answer = self._victim.do("ioctl", fd=self._vm, request=request, argument=argument)
        return _named([answer])[0]

    def exchange(self, pieces: list[bytes], length: int) -> bytes:
        assert self._tool is not None
        for piece in pieces:
            wait_until_read(self._tool)
            self._tool.sendall(piece)
        if self._tool.type != socket.SOCK_STREAM:
            return self._tool.recv(65536)
        return received(self._tool, length)


NO_DESCRIPTOR = {
    **{"minus1": -1, "-1": -1, "2nd HOOK fd -1": -1},
    **{"fd INT_MIN": -(2**31), "fd 1000000": 1_000_000, "closed": 999},
}


def pipe_end() -> int:
    """Return the end of a pipe that can be read."""
    reader, writer = os.pipe()
    os.close(writer)
    return reader


NO_SOCKET: dict[str, Callable[[], int]] = {
    "regular file": lambda: os.open(__file__, os.O_RDONLY),
    "/dev/null": lambda: os.open(os.devnull, os.O_RDWR),
    "O_PATH": lambda: os.open("/", os.O_PATH),
    "pipe": pipe_end,
    "eventfd": lambda: os.eventfd(0),
}
SAME_SOCKET = ("HOOK after UNHOOK, same (shut down) socket", "2nd HOOK same fd")


def vsock_pair() -> tuple[socket.socket, socket.socket] | None:
    """Return two connected vsock sockets; None on a host that has no transport for them."""
    try:
        with socket.socket(socket.AF_VSOCK) as server, contextlib.ExitStack() as stack:
            server.settimeout(TIMEOUT_S)
            server.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            server.listen()
            tool = stack.enter_context(socket.socket(socket.AF_VSOCK))
            tool.settimeout(TIMEOUT_S)
            tool.connect((VMADDR_CID_LOCAL, server.getsockname()[1]))
            kernel_end = server.accept()[0]
            stack.pop_all()
            return tool, kernel_end
    except OSError as error:
        if error.errno not in NO_VSOCK:
            raise
        return None


def socket_of_kind(kind: str) -> tuple[socket.socket | None, socket.socket]:
    """Return the tool's end, if there is one, and a new socket as the recording had it."""
    if kind == "vsock loopback connected":
        return vsock_pair() or tool_pair()
    if "unconnected" in kind or kind == "udp" or "listening" in kind:
        families = {"unix": socket.AF_UNIX, "vsoc": socket.AF_VSOCK}
        family = families.get(kind[:4], socket.AF_INET)
        sock = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
        if "listening" in kind:
            sock.bind("")  # an abstract name of the kernel's choice
            sock.listen()
        return None, sock
    if kind == "tcp connected":
        with socket.create_server(("127.0.0.1", 0)) as server:
            tool = socket.create_connection(server.getsockname(), TIMEOUT_S)
            return tool, server.accept()[0]
    packets = {"dgram pair": socket.SOCK_DGRAM, "seqpacket pair": socket.SOCK_SEQPACKET}
    tool, kernel_end = socket.socketpair(type=packets.get(kind, socket.SOCK_STREAM))
    tool.settimeout(TIMEOUT_S)
    if "nonblocking" in kind:
        kernel_end.setblocking(False)
    if "SO_RCVTIMEO" in kind:
        timeval = struct.pack("@ll", 0, 300_000)
        kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    if "peer closed" in kind:
        tool.close()
    return tool, kernel_end


def _named(results: list[int | str]) -> list[str | None]:
    return [None if result == 0 else str(result) for result in results]


@pytest.mark.parametrize("abi", [V11, V12], ids=lambda abi: abi.name)
def test_recorded_kernel_when_replayed_through_a_process_then_every_answer_is_equal(
    abi: KvmiAbi, tell: Tell
) -> None:
    with Emulated(abi) as victim:
        machine = RealMachine(victim)
        typed: Machine = machine
        try:
            compared, differing = replay(typed, steps(abi))
        finally:
            machine.close()

    assert differing == []
    assert compared == 432
    tell(f"{compared} steps compared with the recorded kernel, KVMI {abi.name}")


@pytest.mark.parametrize("abi", [V11, V12], ids=lambda abi: abi.name)
def test_recorded_kernel_when_introspection_is_off_then_every_answer_is_equal(
    abi: KvmiAbi, tell: Tell
) -> None:
    with Emulated(abi, options=["--fault", "introspection-off"]) as victim:
        machine = RealMachine(victim)
        typed: Machine = machine
        try:
            compared, differing = replay(typed, steps(abi, introspection=False))
        finally:
            machine.close()
        assert victim.check_extension(victim.do("open_kvm")) == 0

    assert differing == []
    assert compared == 15
    tell(f"{compared} steps compared with introspection=0, KVMI {abi.name}")


def test_extension_when_asked_for_then_one_on_both_fds_and_the_kernel_answers_the_rest() -> None:
    with Emulated(V12) as victim:
        kvm, vm = victim.do("open_kvm"), victim.make_vm()
        vcpu = victim.do("create_vcpu", vm=vm, index=0)

        assert victim.check_extension(kvm) == 1
        assert victim.check_extension(vm) == 1
        assert victim.check_extension(vcpu) == "EINVAL"
        assert victim.check_extension(kvm, 0x7FFFFFFF) == 0
        assert victim.check_extension(kvm, V12.capability | 1 << 32) == 0


def test_ioctls_when_made_on_a_wrong_fd_then_einval_or_the_kernels_own_answer() -> None:
    with Emulated(V12) as victim:
        kvm, vm = victim.do("open_kvm"), victim.make_vm()
        wrong = {
            "system": (kvm, "EINVAL"),
            "vcpu": (victim.do("create_vcpu", vm=vm, index=0), "EINVAL"),
            "memfd": (victim.do("memfd", name="kvmi-emulated-kvm-vm"), "ENOTTY"),
            "closed": (1000, "EBADF"),
            "negative": (-1, "EBADF"),
        }
        for name, (fd, expected) in wrong.items():
            results = {
                ioctl.name: victim.ioctl(
                    ioctl, fd, hook_argument(0) if ioctl.name == "HOOK" else ""
                )
                for ioctl in Ioctl
            }

            assert results == {ioctl.name: expected for ioctl in Ioctl}, name


@pytest.mark.parametrize(
    "request_value",
    [0x4004AECA, 0xAECA, 0x8008AECA, 0x4008AEC9, 0xAECD, 0x4008AEC8],
    ids=hex,
)
def test_ioctl_when_its_size_or_direction_is_wrong_then_enotty(request_value: int) -> None:
    with Emulated(V12) as victim:
        vm = victim.make_vm()

        assert victim.do("ioctl", fd=vm, request=request_value, argument=0) == "ENOTTY"


def test_argument_when_it_ends_at_an_unreadable_page_then_only_a_whole_one_is_taken() -> None:
    with Emulated(V12) as victim:
        vm = victim.make_vm()
        tool = victim.hook(vm)
        results = [
            victim.do(
                "ioctl_at_end_of_memory",
                fd=vm,
                request=V12.request(Ioctl.COMMAND),
                argument=feature(1, 8),
                inside=inside,
            )
            for inside in (8, 7, 4, 0)
        ]

        assert results == [0, "EFAULT", "EFAULT", "EFAULT"]
        tool.close()


FD_KINDS = ["closed", "memfd", "pipe", "eventfd", "O_PATH", "vm"]


@pytest.mark.parametrize("kind", FD_KINDS)
def test_hook_when_the_fd_is_no_socket_then_einval_and_the_next_hook_works(kind: str) -> None:
    with Emulated(V12) as victim:
        vm = victim.make_vm()
        fds: list[int] = []
        if kind == "closed":
            fd = 1000
        elif kind == "vm":
            fd = vm
        else:
            if kind == "memfd":
                fds = [os.memfd_create("x")]
            elif kind == "pipe":
                fds = list(os.pipe())
            elif kind == "eventfd":
                fds = [os.eventfd(0)]
            else:
                fds = [os.open("/", os.O_PATH)]
            fd = victim.do("received", fds=fds[:1])[0]
            for ours in fds:
                os.close(ours)

        assert victim.ioctl(Ioctl.HOOK, vm, hook_argument(fd)) == "EINVAL"
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, -1)) == "EFAULT"
        victim.hook(vm).close()


def test_hook_when_the_peer_is_closed_then_taken_and_unhook_clears_it() -> None:
    with Emulated(V12) as victim:
        vm = victim.make_vm()
        tool, kernel_end = tool_pair()
        tool.close()
        with kernel_end:
            argument = hook_argument(victim.give(kernel_end))

        assert victim.ioctl(Ioctl.HOOK, vm, argument) == 0
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, -1)) == 0
        assert victim.ioctl(Ioctl.PREUNHOOK, vm) == "ENOENT"
        assert victim.ioctl(Ioctl.HOOK, vm, argument) == "EEXIST"
        assert victim.ioctl(Ioctl.UNHOOK, vm) == 0
        assert victim.ioctl(Ioctl.HOOK, vm, argument) == 0


def test_hook_when_the_socket_is_not_connected_then_taken() -> None:
    with Emulated(V12) as victim:
        vm = victim.make_vm()

        assert victim.ioctl(Ioctl.HOOK, vm, hook_argument(victim.do("tcp_socket"))) == 0


def test_event_when_preunhook_sends_it_then_the_tool_reads_it_and_unhook_is_eof() -> None:
    with Emulated(V12) as victim:
        vm = victim.make_vm()
        with victim.hook(vm) as tool:
            assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 10)) == 0
            assert victim.ioctl(Ioctl.EVENT, vm, feature(1, 0)) == 0
            tool.sendall(struct.pack("<HHIHBBI", 10, 8, 5, 0, 1, 0, 0))
            assert received(tool, 16) == struct.pack("<HHIiI", 10, 8, 5, 0, 0)

            assert victim.ioctl(Ioctl.PREUNHOOK, vm) == 0
            assert received(tool, 16) == struct.pack("<HHIQ", 0, 8, 1, 0)
            assert victim.ioctl(Ioctl.UNHOOK, vm) == 0
            assert received(tool, 1) == b""
