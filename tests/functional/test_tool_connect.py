# SPDX-License-Identifier: Apache-2.0
"""Reaching a tool over real sockets: absent, hanging, lying, slow, and well-behaved."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_kvmi import hello_bytes

from kvmi_libvirt.errors import HandshakeProtocolError, HandshakeRefused, HandshakeTimeout
from kvmi_libvirt.policy.model import UnixSource
from kvmi_libvirt.tool.connect import (
    PeerCredentials,
    check_channel,
    connect,
    peer_credentials,
    shake_hands,
)
from kvmi_libvirt.tool.handshake import Answer, pack_answer

if TYPE_CHECKING:
    from collections.abc import Iterator

HELLO = hello_bytes()
LONG_S = 20.0


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a socket path that is short enough, in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="kvmi-") as directory:
        yield Path(directory) / "tool.sock"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return our end and the tool's end of a connection."""
    ours, tools = socket.socketpair()
    with ours, tools:
        yield ours, tools


def after(seconds: float) -> float:
    """Return the deadline *seconds* from now."""
    return time.monotonic() + seconds


def listening(place: Path, *, backlog: int = 5) -> socket.socket:
    """Return a stream socket listening at *place*."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(place))
    sock.listen(backlog)
    return sock


@contextlib.contextmanager
def full_queue(place: Path) -> Iterator[socket.socket]:
    """Listen at *place* with a queue in which there is no room left."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(place, backlog=0))
        while True:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)
            try:
                sock.connect(str(place))
            except BlockingIOError:
                break
        yield listener


@contextlib.contextmanager
def alarms(interval_s: float, handler: object) -> Iterator[None]:
    """Call *handler* on SIGALRM every *interval_s* seconds."""
    previous = signal.signal(signal.SIGALRM, lambda *_: handler())  # type: ignore[operator]
    signal.setitimer(signal.ITIMER_REAL, interval_s, interval_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def assert_fit_for_the_kernel(sock: socket.socket) -> None:
    """Assert that *sock* blocks, has no time limit, and is close-on-exec."""
    zero = bytes(16)
    flags = fcntl.fcntl(sock, fcntl.F_GETFL)
    assert flags & os.O_NONBLOCK == 0
    assert sock.gettimeout() is None
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == zero
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == zero
    assert not sock.get_inheritable()


def test_connect_when_a_tool_listens_then_the_socket_is_fit_for_the_kernel(place: Path) -> None:
    with (
        listening(place) as listener,
        connect(UnixSource(path=str(place)), deadline=after(LONG_S)) as sock,
    ):
        accepted, _ = listener.accept()
        with accepted:
            sock.sendall(b"hi")

            assert accepted.recv(10) == b"hi"
        assert_fit_for_the_kernel(sock)


def test_connect_when_path_is_missing_then_refused(place: Path) -> None:
    with pytest.raises(HandshakeRefused) as caught:
        connect(UnixSource(path=str(place)), deadline=after(LONG_S))

    assert str(caught.value) == (f"no tool listens on unix:{place} (ENOENT): start the tool first")


def test_connect_when_nobody_listens_then_refused(place: Path) -> None:
    listening(place).close()

    with pytest.raises(HandshakeRefused) as caught:
        connect(UnixSource(path=str(place)), deadline=after(LONG_S))

    assert str(caught.value) == (
        f"no tool listens on unix:{place} (ECONNREFUSED): start the tool first"
    )


def test_connect_when_path_is_an_ordinary_file_then_refused(place: Path) -> None:
    place.touch()

    with pytest.raises(HandshakeRefused, match="ECONNREFUSED"):
        connect(UnixSource(path=str(place)), deadline=after(LONG_S))


def test_connect_when_parent_is_a_file_then_refused(place: Path) -> None:
    place.touch()

    with pytest.raises(HandshakeRefused, match=r"cannot connect to unix:.*: Not a directory"):
        connect(UnixSource(path=f"{place}/tool.sock"), deadline=after(LONG_S))


def test_connect_when_socket_is_of_another_type_then_refused(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(place))

        with pytest.raises(HandshakeRefused, match="is not a stream socket"):
            connect(UnixSource(path=str(place)), deadline=after(LONG_S))


def test_connect_when_not_permitted_then_refused(place: Path) -> None:
    with listening(place):
        os.chmod(place, 0)
        os.chmod(place.parent, 0o755)
        was_root = os.geteuid() == 0
        if was_root:  # whom no mode stops
            os.seteuid(65534)
        try:
            with pytest.raises(HandshakeRefused, match=r"not permitted to connect .* \(EACCES\)"):
                connect(UnixSource(path=str(place)), deadline=after(LONG_S))
        finally:
            if was_root:
                os.seteuid(0)


def test_connect_when_the_queue_is_full_then_timeout_at_the_deadline(place: Path) -> None:
    with full_queue(place):
        begun = time.monotonic()
        with pytest.raises(HandshakeTimeout, match=r"did not accept within 0\.2 s"):
            connect(UnixSource(path=str(place)), deadline=begun + 0.2)

        assert 0.19 <= time.monotonic() - begun < 5


def test_connect_when_signals_interrupt_the_wait_then_still_timeout(place: Path) -> None:
    # The standard library takes the interrupted wait for a connection.
    count = 0

    def handler() -> None:
        nonlocal count
        count += 1

    with full_queue(place), alarms(0.01, handler), pytest.raises(HandshakeTimeout):
        connect(UnixSource(path=str(place)), deadline=after(0.3))

    assert count > 3


def test_connect_when_the_tool_accepts_late_then_connected(place: Path) -> None:
    accepted: list[socket.socket] = []
    with full_queue(place) as listener:

        def accept_one() -> None:
            accepted.append(listener.accept()[0])

        with alarms(0.05, accept_one):
            sock = connect(UnixSource(path=str(place)), deadline=after(LONG_S))
        with sock:
            check_channel(sock)
    for tool in accepted:
        tool.close()


def test_connect_when_the_deadline_is_past_then_timeout(place: Path) -> None:
    with listening(place), pytest.raises(HandshakeTimeout, match=r"within 0\.0 s"):
        connect(UnixSource(path=str(place)), deadline=after(-1))


Pair = tuple[socket.socket, socket.socket]


def test_shake_hands_when_answered_then_the_next_byte_is_left(pair: Pair) -> None:
    ours, tools = pair
    tools.sendall(pack_answer(b"h" * 20) + b"to KVM")
    answer = shake_hands(ours, HELLO, deadline=after(LONG_S))

    assert answer == Answer(cookie_hash=b"h" * 20)
    assert tools.recv(1000) == HELLO
    assert ours.recv(1000) == b"to KVM"
    assert_fit_for_the_kernel(ours)


def test_shake_hands_when_answer_is_longest_then_its_tail_is_swallowed(pair: Pair) -> None:
    ours, tools = pair
    tools.sendall(struct.pack("<I", 65536) + b"h" * 65532 + b"to KVM")

    assert shake_hands(ours, HELLO, deadline=after(LONG_S)).cookie_hash == b"h" * 20
    assert ours.recv(1000) == b"to KVM"


def test_shake_hands_when_answer_comes_byte_by_byte_then_answered(pair: Pair) -> None:
    ours, tools = pair

    def tool() -> None:
        assert tools.recv(1000) == HELLO
        for byte in pack_answer(b"h" * 20) + b"K":
            tools.sendall(bytes([byte]))

    thread = threading.Thread(target=tool)
    thread.start()
    answer = shake_hands(ours, HELLO, deadline=after(LONG_S))
    thread.join()

    assert answer.cookie_hash == b"h" * 20
    assert ours.recv(10) == b"K"


def test_shake_hands_when_tool_is_silent_then_timeout_at_the_deadline(pair: Pair) -> None:
    ours, _ = pair
    begun = time.monotonic()
    with pytest.raises(HandshakeTimeout, match=r"did not answer within 0\.2 s \(0 bytes came\)"):
        shake_hands(ours, HELLO, deadline=begun + 0.2)

    assert 0.19 <= time.monotonic() - begun < 5
    assert_fit_for_the_kernel(ours)


def test_shake_hands_when_answer_drips_then_the_deadline_is_for_all_of_it(pair: Pair) -> None:
    ours, tools = pair

    def drip() -> None:
        # One byte each 50 ms, until the other end is closed.
        poll = select.poll()
        poll.register(tools, select.POLLRDHUP)
        for byte in pack_answer():
            if poll.poll(50):
                return
            tools.sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(HandshakeTimeout, match=r"within 0\.3 s"):
        shake_hands(ours, HELLO, deadline=begun + 0.3)
    took_s = time.monotonic() - begun
    ours.shutdown(socket.SHUT_RDWR)
    thread.join()

    assert took_s < 1.0


def test_shake_hands_when_tool_does_not_read_then_timeout(pair: Pair) -> None:
    ours, _ = pair
    with pytest.raises(HandshakeTimeout):
        shake_hands(ours, bytes(10_000_000), deadline=after(0.2))

    assert_fit_for_the_kernel(ours)


def test_shake_hands_when_deadline_is_past_then_nothing_is_sent(pair: Pair) -> None:
    ours, tools = pair
    with pytest.raises(HandshakeTimeout):
        shake_hands(ours, HELLO, deadline=after(-1))
    tools.setblocking(False)

    with pytest.raises(BlockingIOError):
        tools.recv(1)


@pytest.mark.parametrize(
    "garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(100), b"\x17\0\0\0"]
)
def test_shake_hands_when_answer_is_garbage_then_protocol_error(pair: Pair, garbage: bytes) -> None:
    ours, tools = pair
    tools.sendall(garbage)
    with pytest.raises(HandshakeProtocolError, match="the tool's answer announces"):
        shake_hands(ours, HELLO, deadline=after(LONG_S))

    assert_fit_for_the_kernel(ours)
    tools.shutdown(socket.SHUT_WR)
    assert ours.recv(1000) == garbage[4:]  # only the size was read


@pytest.mark.parametrize("length", [0, 3, 4, 23])
def test_shake_hands_when_tool_closes_early_then_refused(pair: Pair, length: int) -> None:
    ours, tools = pair
    tools.sendall(pack_answer()[:length])
    tools.shutdown(socket.SHUT_WR)

    with pytest.raises(HandshakeRefused, match=rf"without an answer \({length} bytes came\)"):
        shake_hands(ours, HELLO, deadline=after(LONG_S))


def test_shake_hands_when_tool_has_closed_then_refused(pair: Pair) -> None:
    ours, tools = pair
    tools.close()

    with pytest.raises(HandshakeRefused, match=r"closed the connection \(EPIPE\)"):
        shake_hands(ours, HELLO, deadline=after(LONG_S))


def test_shake_hands_when_tool_closes_with_the_hello_unread_then_refused(pair: Pair) -> None:
    ours, tools = pair

    def tool() -> None:
        poll = select.poll()
        poll.register(tools, select.POLLIN)
        assert poll.poll(LONG_S * 1000)
        tools.close()

    thread = threading.Thread(target=tool)
    thread.start()
    with pytest.raises(HandshakeRefused, match=r"closed the connection \(ECONNRESET\)"):
        shake_hands(ours, HELLO, deadline=after(LONG_S))
    thread.join()


def test_shake_hands_when_it_fails_then_the_message_names_the_tool(place: Path) -> None:
    with (
        listening(place),
        connect(UnixSource(path=str(place)), deadline=after(LONG_S)) as sock,
        pytest.raises(HandshakeTimeout, match=rf"^the tool did not answer .* \(unix:{place}; "),
    ):
        shake_hands(sock, HELLO, deadline=after(0.05))


def test_peer_credentials_when_unix_then_those_of_the_peer(pair: Pair) -> None:
    assert peer_credentials(pair[0]) == PeerCredentials(os.getpid(), os.getuid(), os.getgid())


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_peer_credentials_when_there_are_none_then_none(family: int) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        assert peer_credentials(sock) is None


def test_check_channel_when_alive_then_nothing_is_read(pair: Pair) -> None:
    ours, tools = pair
    tools.sendall(b"to KVM")
    check_channel(ours)

    assert ours.recv(100) == b"to KVM"


def test_check_channel_when_tool_closed_then_refused(pair: Pair) -> None:
    ours, tools = pair
    tools.close()

    with pytest.raises(HandshakeRefused, match="has closed the connection"):
        check_channel(ours)


def test_check_channel_when_tool_sends_no_more_then_refused(pair: Pair) -> None:
    ours, tools = pair
    tools.sendall(b"last words")
    tools.shutdown(socket.SHUT_WR)

    with pytest.raises(HandshakeRefused, match="has closed the connection"):
        check_channel(ours)


def test_check_channel_when_tool_left_our_bytes_unread_then_refused(pair: Pair) -> None:
    ours, tools = pair
    ours.sendall(HELLO)
    tools.close()

    with pytest.raises(HandshakeRefused, match="has failed: Connection reset by peer"):
        check_channel(ours)


def test_check_channel_when_we_shut_it_down_then_refused(pair: Pair) -> None:
    ours, _ = pair
    ours.shutdown(socket.SHUT_RDWR)

    with pytest.raises(HandshakeRefused):
        check_channel(ours)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_check_channel_when_no_stream_then_refused(kind: int) -> None:
    ours, tools = socket.socketpair(socket.AF_UNIX, kind)
    with ours, tools, pytest.raises(HandshakeRefused, match="not a stream"):
        check_channel(ours)


def test_check_channel_when_not_connected_then_refused() -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock,
        pytest.raises(HandshakeRefused, match="not connected"),
    ):
        check_channel(sock)


def test_check_channel_when_listening_then_refused(place: Path) -> None:
    with listening(place) as sock, pytest.raises(HandshakeRefused, match="not connected"):
        check_channel(sock)


def test_check_channel_when_of_a_family_kvm_was_not_seen_with_then_refused() -> None:
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock,
        pytest.raises(HandshakeRefused, match="no unix, vsock or TCP socket"),
    ):
        check_channel(sock)
