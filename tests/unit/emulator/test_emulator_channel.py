# SPDX-License-Identifier: Apache-2.0
"""The channel with tools that flood, stall, tear messages apart or go away."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator import channel as channel_module
from kvmi_libvirt.emulator.channel import READ_LEN, REPLIES_LIMIT_LEN, Channel
from kvmi_libvirt.emulator.kernel import VmState
from kvmi_libvirt.emulator.protocol import Service
from kvmi_libvirt.newtypes import LocalFd

if TYPE_CHECKING:
    from collections.abc import Iterator

GET_VERSION = struct.pack("<HHI", 2, 0, 7)
VERSION_REPLY_LEN = 32


class NoVcpu:
    def vcpu_count(self) -> int:
        return 0

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        return None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        return False

    def max_gfn(self) -> int:
        return 0


class Pair:
    """A channel and the tool's end of its socket."""

    def __init__(
        self, kind: socket.SocketKind = socket.SOCK_STREAM, *, send_timeout_us: int = 0
    ) -> None:
        self.tool, kernel_end = socket.socketpair(socket.AF_UNIX, kind)
        self.tool.setblocking(False)
        self.tool.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        timeval = struct.pack("@ll", 0, send_timeout_us)
        kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        vm = VmState(hooked=True, connected=True, commands=1 << 2)
        self.channel = Channel(LocalFd(kernel_end.detach()), Service(V12, vm, NoVcpu()))

    def turns(self, count: int = 1000) -> None:
        """Do what the supervisor does, until there is nothing to do."""
        for _ in range(count):
            if not self.channel.is_open:
                return
            poll = select.poll()
            poll.register(self.channel.fd, self.channel.interest)
            ready = dict(poll.poll(0)).get(self.channel.fd, 0)
            deadline = self.channel.deadline
            if not ready and (deadline is None or deadline > time.monotonic()):
                return
            self.channel.turn(ready)
        pytest.fail(f"still busy after {count} turns")

    def received(self) -> bytes:
        data = b""
        while True:
            try:
                piece = self.tool.recv(65536)
            except BlockingIOError:
                return data
            if not piece:
                return data
            data += piece


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.channel.release()
    made.tool.close()


def test_message_when_it_arrives_byte_by_byte_then_one_reply(pair: Pair) -> None:
    for byte in GET_VERSION:
        pair.tool.send(bytes([byte]))
        pair.turns()

    assert len(pair.received()) == VERSION_REPLY_LEN


def test_tool_when_it_closes_then_its_last_messages_count_and_the_channel_ends(pair: Pair) -> None:
    pair.tool.send(GET_VERSION * 3)
    pair.tool.shutdown(socket.SHUT_WR)
    pair.turns()

    assert len(pair.received()) == 3 * VERSION_REPLY_LEN
    assert not pair.channel.is_open


def test_tool_when_it_floods_and_reads_nothing_then_memory_is_bounded(pair: Pair) -> None:
    sent = 0
    while True:
        try:
            sent += pair.tool.send(GET_VERSION * 256)
        except BlockingIOError:
            before = sent
            pair.turns()
            try:
                sent += pair.tool.send(GET_VERSION)
            except BlockingIOError:
                break
            assert sent > before
        held = len(pair.channel._unsent) + len(pair.channel._decoder._buffer)
        assert held <= REPLIES_LIMIT_LEN + READ_LEN + VERSION_REPLY_LEN

    assert pair.channel.is_open
    assert not pair.channel.interest & select.POLLIN


def test_tool_when_it_reads_again_after_flooding_then_no_reply_is_missing(pair: Pair) -> None:
    count = 10_000
    to_send, data = memoryview(GET_VERSION * count), b""
    while to_send or len(data) < count * VERSION_REPLY_LEN:
        try:
            to_send = to_send[pair.tool.send(to_send) :] if to_send else to_send
        except BlockingIOError:
            pass
        pair.turns()
        data += pair.received()

    assert len(data) == count * VERSION_REPLY_LEN
    assert pair.channel.is_open


def test_turn_when_a_thousand_messages_wait_then_only_a_few_are_answered(pair: Pair) -> None:
    pair.tool.send(GET_VERSION * 100)

    pair.channel.turn(select.POLLIN)

    assert len(pair.received()) == channel_module.MESSAGES_PER_TURN * VERSION_REPLY_LEN
    assert pair.channel.deadline == 0.0


def test_message_when_it_is_too_long_then_the_tool_gets_what_came_before_and_eof(
    pair: Pair,
) -> None:
    pair.tool.send(GET_VERSION + struct.pack("<HHI", 2, 8185, 0))
    pair.turns()

    assert len(pair.tool.recv(4096)) == VERSION_REPLY_LEN
    assert pair.tool.recv(1) == b""
    assert not pair.channel.is_open


def test_garbage_when_a_mebibyte_of_it_comes_then_the_channel_ends(pair: Pair) -> None:
    garbage = memoryview(b"\xff" * (1 << 20))
    while pair.channel.is_open:
        try:
            garbage = garbage[pair.tool.send(garbage) :]
        except BlockingIOError:
            pass
        pair.turns()

    with pytest.raises(BrokenPipeError):
        pair.tool.send(b"x")


def events_until_stuck(pair: Pair) -> int:
    """Send events until one does not go out; return how many did."""
    for seq in range(1, 10_000):
        pair.channel.send_event(seq)
        if not pair.channel.event_sent:
            assert pair.channel.event_sent is None
            return seq - 1
    pytest.fail("a socket without end")


def test_event_when_the_tool_reads_nothing_then_it_stays_open_until_the_tool_reads(
    pair: Pair,
) -> None:
    sent = events_until_stuck(pair)
    pair.turns()
    states = [pair.channel.event_sent]
    received = pair.received()
    pair.turns()
    states.append(pair.channel.event_sent)

    assert states == [None, True]
    received += pair.received()
    events = [struct.pack("<HHIQ", 0, 8, seq, 0) for seq in range(1, sent + 2)]
    assert received == b"".join(events)


def test_event_when_the_send_timeout_passes_then_it_fails_and_the_channel_lives() -> None:
    pair = Pair(send_timeout_us=50_000)
    sent = events_until_stuck(pair)
    deadline = pair.channel.deadline
    assert deadline is not None
    select.poll().poll(max(0.0, deadline - time.monotonic()) * 1000 + 1)
    pair.turns()

    assert pair.channel.event_sent is False
    assert pair.channel.is_open
    assert len(pair.received()) == 16 * sent
    pair.channel.release()
    pair.tool.close()


def test_replies_when_the_send_timeout_passes_then_the_channel_ends() -> None:
    pair = Pair(send_timeout_us=50_000)
    pair.tool.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    pair.tool.send(GET_VERSION * 1000)
    pair.turns()
    deadline = pair.channel.deadline
    assert deadline is not None
    select.poll().poll(max(0.0, deadline - time.monotonic()) * 1000 + 1)
    pair.channel.turn(0)

    assert not pair.channel.is_open
    pair.tool.close()


def test_event_when_the_tool_is_gone_then_it_fails_and_the_channel_ends(pair: Pair) -> None:
    pair.tool.close()
    pair.channel.send_event(1)

    assert pair.channel.event_sent is False
    assert not pair.channel.is_open


def test_event_when_the_channel_ends_while_it_waits_then_it_fails(pair: Pair) -> None:
    events_until_stuck(pair)
    pair.channel.close()

    assert pair.channel.event_sent is False


def test_close_when_others_hold_the_socket_then_the_tool_gets_eof() -> None:
    pair = Pair()
    other_copy = os.dup(pair.channel.fd)
    pair.channel.close()
    pair.channel.close()

    assert pair.tool.recv(1) == b""
    os.close(other_copy)
    pair.tool.close()


def test_release_when_others_hold_the_socket_then_the_tool_notices_nothing() -> None:
    pair = Pair()
    with socket.socket(fileno=os.dup(pair.channel.fd)) as other_copy:
        pair.channel.release()
        with pytest.raises(BlockingIOError):
            pair.tool.recv(1)
        other_copy.send(b"x")

        assert pair.tool.recv(1) == b"x"
    pair.tool.close()


def test_channel_when_served_then_the_socket_keeps_its_blocking_mode(pair: Pair) -> None:
    pair.tool.send(GET_VERSION)
    pair.turns()

    assert os.get_blocking(pair.channel.fd)


def test_packet_socket_when_a_packet_holds_header_and_payload_then_the_payload_is_lost() -> None:
    pair = Pair(socket.SOCK_SEQPACKET)
    pair.tool.send(GET_VERSION)
    pair.turns()
    assert len(pair.received()) == VERSION_REPLY_LEN

    pair.tool.send(struct.pack("<HHIHHI", 4, 8, 1, 2, 0, 0))
    pair.turns()
    assert pair.received() == b""

    pair.tool.send(struct.pack("<HHI", 2, 0, 0))  # taken as the payload
    pair.turns()
    assert len(pair.received()) == 16
    pair.channel.release()
    pair.tool.close()


def test_receive_timeout_when_the_tool_says_nothing_then_the_channel_ends() -> None:
    tool, kernel_end = socket.socketpair()
    kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 0, 1000))
    vm = VmState(hooked=True, connected=True)
    channel = Channel(LocalFd(kernel_end.detach()), Service(V12, vm, NoVcpu()))
    assert channel.deadline is not None
    while channel.is_open:
        wait_ms = max(0.0, channel.deadline - time.monotonic()) * 1000 if channel.deadline else 0.0
        select.poll().poll(int(wait_ms) + 1)
        channel.turn(0)

    assert tool.recv(1) == b""
    tool.close()


@pytest.mark.parametrize("kind", ["unconnected", "listening", "tcp", "vsock"])
def test_socket_when_it_was_never_connected_then_taken_and_the_channel_ends(kind: str) -> None:
    family = {"tcp": socket.AF_INET, "vsock": socket.AF_VSOCK}.get(kind, socket.AF_UNIX)
    try:
        sock = socket.socket(family)
    except OSError as error:
        pytest.skip(f"this kernel has no such sockets: {error}")
    if kind == "listening":
        sock.bind("")
        sock.listen()
    vm = VmState(hooked=True, connected=True)
    channel = Channel(LocalFd(sock.detach()), Service(V12, vm, NoVcpu()))
    assert channel.is_open

    channel.turn(select.POLLIN)

    assert not channel.is_open


def test_fd_when_it_is_no_socket_then_oserror_and_it_is_closed() -> None:
    fd = os.memfd_create("x")

    with pytest.raises(OSError, match="non-socket"):
        Channel(LocalFd(fd), Service(V12, VmState(), NoVcpu()))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
