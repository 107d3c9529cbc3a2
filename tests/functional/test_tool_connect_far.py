# SPDX-License-Identifier: Apache-2.0
"""Tools that are reached over TCP or vsock, and whether such a channel still lives."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import sockdiag
from kvmi_libvirt.errors import HandshakeRefused, HandshakeTimeout
from kvmi_libvirt.policy.model import TcpSource, VsockSource
from kvmi_libvirt.tool import connect as connect_module
from kvmi_libvirt.tool.connect import check_channel, connect, peer_credentials, set_send_timeout

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG_S = 20.0


def after(seconds: float) -> float:
    return time.monotonic() + seconds


@pytest.fixture(params=["127.0.0.1", "::1", "localhost"])
def tool(request: pytest.FixtureRequest) -> Iterator[tuple[TcpSource, socket.socket]]:
    host: str = request.param
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host if ":" in host else "127.0.0.1", 0), family=family)
    except OSError as error:
        pytest.skip(f"no loopback of that family ({error.strerror})")
    with listener:
        yield TcpSource(host=host, port=listener.getsockname()[1]), listener


def test_tcp_tool_is_reached_and_the_socket_is_fit_for_the_kernel(
    tool: tuple[TcpSource, socket.socket],
) -> None:
    source, listener = tool
    with connect(source, deadline=after(LONG_S)) as sock:
        accepted, _ = listener.accept()
        with accepted:
            assert sock.getblocking()
            assert sock.gettimeout() is None
            assert not sock.get_inheritable()
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert peer_credentials(sock) is None
            check_channel(sock)
        with pytest.raises(HandshakeRefused, match="has closed the connection"):
            check_channel(sock)


def test_tcp_channel_lives_until_either_side_closes(tool: tuple[TcpSource, socket.socket]) -> None:
    source, listener = tool
    try:
        sockdiag.tcp_stream_is_connected(1)
    except OSError as error:
        pytest.skip(f"this kernel has no TCP diagnosis ({error})")
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(connect(source, deadline=after(LONG_S)))
        inode = os.fstat(sock.fileno()).st_ino
        accepted, _ = listener.accept()
        assert sockdiag.tcp_stream_is_connected(inode)
        accepted.close()
        assert sock.recv(1) == b""  # the end has arrived
        assert not sockdiag.tcp_stream_is_connected(inode)
    assert not sockdiag.tcp_stream_is_connected(inode)


def test_tcp_port_where_nobody_listens_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(HandshakeRefused, match=r"no tool listens on tcp:127\.0\.0\.1"):
        connect(TcpSource(host="127.0.0.1", port=port), deadline=after(LONG_S))


def test_name_that_does_not_exist_is_refused() -> None:
    source = TcpSource(host="no-such-host.invalid", port=1)
    with pytest.raises(HandshakeRefused, match=r"the name in tcp:no-such-host.invalid:1 cannot be"):
        connect(source, deadline=after(LONG_S))


def test_resolver_that_does_not_answer_is_ended_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connect_module, "_RESOLVE", "import signal; signal.pause()")
    before = time.monotonic()
    with pytest.raises(HandshakeTimeout, match="was not resolved within"):
        connect(TcpSource(host="tool.example", port=1), deadline=after(0.5))
    assert time.monotonic() - before < LONG_S / 2


def test_full_queue_of_a_tcp_listener_is_a_timeout_at_the_deadline() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        source = TcpSource(host=address[0], port=address[1])
        with pytest.raises(HandshakeTimeout, match="no connection to tcp:"):
            connect(source, deadline=after(0.5))


@pytest.mark.parametrize("source", [TcpSource(host="::1", port=1), VsockSource(cid=1, port=1)])
def test_deadline_that_is_past_is_a_timeout(source: TcpSource | VsockSource) -> None:
    with pytest.raises(HandshakeTimeout):
        connect(source, deadline=after(-1))


def test_vsock_port_where_nobody_answers_ends_in_time() -> None:
    before = time.monotonic()
    with pytest.raises((HandshakeRefused, HandshakeTimeout)):
        connect(VsockSource(cid=1, port=0x7FFFFFF0), deadline=after(0.5))
    assert time.monotonic() - before < LONG_S / 2


def test_time_limits_of_a_vsock_socket_can_be_set() -> None:
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        pytest.skip(f"no vsock in this kernel ({error.strerror})")
    with sock:
        set_send_timeout(sock, 10)
        duplicate = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, os.dup(sock.fileno()))
        with duplicate:
            value = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)
    assert struct.unpack("@ll", value) == (10, 0)


def test_vsock_tool_is_reached_over_the_loopback() -> None:
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
            listener.bind((socket.VMADDR_CID_ANY, 0x7FFFFFF1))
            listener.listen()
            sock = stack.enter_context(
                connect(VsockSource(cid=1, port=0x7FFFFFF1), deadline=after(0.5))
            )
        except (OSError, HandshakeRefused, HandshakeTimeout) as error:
            pytest.skip(f"no vsock loopback here ({error}); modprobe vsock_loopback")
        accepted, _ = listener.accept()
        with accepted:
            check_channel(sock)
            assert sock.gettimeout() is None


# -- what the kernel says about vsock, which not every kernel can be asked -----------------


def vsock_message(inode: int, *, state: int = 1, shutdown: int = 0) -> bytes:
    body = struct.pack("=BBBB7I", socket.AF_VSOCK, 1, state, shutdown, 2, 9, 3, 8, inode, 0, 0)
    return struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 0) + body


DONE = struct.pack("=IHHIIi", 20, 3, 2, 1, 0, 0)


class FakeNetlink:
    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)

    def __enter__(self) -> FakeNetlink:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._answers == []  # a dump is read to its end, or to what was looked for

    def settimeout(self, _timeout_s: float) -> None:
        pass

    def send(self, data: bytes) -> None:
        assert data[4:8] == struct.pack("=HH", 20, 0x301)
        assert data[16] == socket.AF_VSOCK

    def recv(self, _length: int) -> bytes:
        return self._answers.pop(0)


@pytest.mark.parametrize(
    ("answers", "connected"),
    [
        ((vsock_message(5) + vsock_message(7), DONE), None),
        ((vsock_message(7, state=8) + DONE,), False),
        ((vsock_message(7, shutdown=1) + DONE,), False),
        ((vsock_message(5), DONE), False),
        ((DONE,), False),
    ],
)
def test_vsock_channel_is_looked_up_by_inode(
    answers: tuple[bytes, ...], connected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if connected is None:
        answers, connected = answers[:1], True
    fake = FakeNetlink(*answers)
    monkeypatch.setattr("kvmi_libvirt.sockdiag.socket.socket", lambda *_: fake)
    assert sockdiag.vsock_stream_is_connected(7) == connected


def test_kernel_that_cannot_be_asked_is_an_error_and_not_a_no(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusal = struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -2) + bytes(16)
    monkeypatch.setattr("kvmi_libvirt.sockdiag.socket.socket", lambda *_: FakeNetlink(refusal))
    with pytest.raises(FileNotFoundError):
        sockdiag.vsock_stream_is_connected(7)
