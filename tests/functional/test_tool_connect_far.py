# SPDX-License-Identifier: Apache-2.0
"""Tools that are reached over TCP or vsock, and whether such a channel still lives."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import sockdiag
from kvmi_libvirt.errors import HandshakeError, HandshakeRefused, HandshakeTimeout
from kvmi_libvirt.policy.model import TcpSource, VsockSource
from kvmi_libvirt.tool import connect as connect_module
from kvmi_libvirt.tool.connect import (
    check_channel,
    connect,
    peer_credentials,
    set_send_timeout,
    shake_hands,
)
from kvmi_libvirt.tool.handshake import pack_answer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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


# -- vsock on a machine that has none: the socket is of another family, all else is real ----


class StandInVsock(socket.socket):
    """A unix socket that says it is a vsock socket, and connects to a tool's listener."""

    listener = ""
    refusal: int | None = None

    def __init__(self) -> None:
        self.asked: list[object] = []
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)

    @property
    def family(self) -> int:  # type: ignore[override]  # what the code under test looks at
        return socket.AF_VSOCK

    def connect(self, address: object) -> None:
        self.asked.append(address)
        if self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal))
        super().connect(self.listener)


@pytest.fixture
def vsock_options(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bytes]]:
    """Options of level AF_VSOCK, which a unix socket does not have, as they were set."""
    found: list[tuple[int, bytes]] = []
    real = connect_module._set_option

    def set_option(sock: socket.socket, level: int, option: int, value: bytes) -> None:
        if level == socket.AF_VSOCK:
            found.append((option, value))
        else:
            real(sock, level, option, value)

    monkeypatch.setattr(connect_module, "_set_option", set_option)

    def new_socket(family: int) -> StandInVsock:
        assert family == socket.AF_VSOCK
        return StandInVsock()

    monkeypatch.setattr(connect_module, "_new_socket", new_socket)
    return found


def test_vsock_tool_is_connected_to_and_shakes_hands(
    tmp_path: Path, vsock_options: list[tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInVsock, "listener", str(tmp_path / "tool"))
    with (
        socket.create_server(StandInVsock.listener, family=socket.AF_UNIX) as listener,
        connect(VsockSource(cid=7, port=4321), deadline=after(LONG_S)) as sock,
    ):
        assert isinstance(sock, StandInVsock)
        assert sock.asked == [(7, 4321)]
        ((option, value),) = vsock_options
        seconds, microseconds = struct.unpack("@ll", value)
        assert option == 6  # SO_VM_SOCKETS_CONNECT_TIMEOUT of <linux/vm_sockets.h>
        assert 0 < seconds + microseconds / 1e6 <= LONG_S
        assert sock.gettimeout() is None
        assert peer_credentials(sock) is None
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(pack_answer(b"p" * 20))
            answer = shake_hands(sock, b"hello", deadline=after(LONG_S))
            assert answer.cookie_hash == b"p" * 20
            assert accepted.recv(99) == b"hello"
            set_send_timeout(sock, 10)
            check_channel(sock)


@pytest.mark.usefixtures("vsock_options")
@pytest.mark.parametrize(
    ("refusal", "kind", "message"),
    [
        (errno.ECONNRESET, HandshakeRefused, "no tool listens on {} (ECONNRESET): start the tool"),
        (errno.ENODEV, HandshakeRefused, "there is no machine at {} (ENODEV): is the tool's VM"),
        (errno.ENETUNREACH, HandshakeRefused, "there is no way to {} (ENETUNREACH)"),
        (errno.EHOSTUNREACH, HandshakeRefused, "there is no way to {} (EHOSTUNREACH)"),
        (errno.EADDRNOTAVAIL, HandshakeRefused, "cannot connect to {}: Cannot assign requested"),
        (errno.EINTR, HandshakeRefused, "cannot connect to {}: Interrupted"),
        (errno.ETIMEDOUT, HandshakeTimeout, "no connection to {} within"),
        (errno.EAGAIN, HandshakeTimeout, "no connection to {} within"),
    ],
)
def test_vsock_error_is_one_line_that_names_the_place(
    refusal: int, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInVsock, "refusal", refusal)
    with pytest.raises(kind) as caught:
        connect(VsockSource(cid=7, port=4321), deadline=after(LONG_S))
    assert str(caught.value).startswith(message.format("vsock:7:4321"))
    assert "\n" not in str(caught.value)


def test_kernel_without_vsock_is_said_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr("kvmi_libvirt.tool.connect.socket.socket", refused)
    with pytest.raises(HandshakeError, match=r"^cannot make a vsock socket: .*kernel module vsock"):
        connect(VsockSource(cid=7, port=4321), deadline=after(LONG_S))


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
