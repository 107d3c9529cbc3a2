# SPDX-License-Identifier: Apache-2.0
"""Whether a socket is connected, asked of the kernel by inode: real sockets, real answers."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import sockdiag
from kvmi_libvirt.sockdiag import unix_stream_is_connected

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, tools = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, tools:
        try:
            unix_stream_is_connected(inode(ours))
        except OSError as error:
            pytest.skip(f"no unix socket diagnosis here ({error.strerror}): modprobe unix_diag")
        yield ours, tools


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def test_a_connected_pair_is_connected(pair: Pair) -> None:
    assert unix_stream_is_connected(inode(pair[0]))
    assert unix_stream_is_connected(inode(pair[1]))


def test_a_connection_through_a_path_is_connected(pair: Pair, tmp_path: Path) -> None:
    path = str(tmp_path / "tool.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        assert not unix_stream_is_connected(inode(client))
        listener.bind(path)
        listener.listen()
        assert not unix_stream_is_connected(inode(listener))
        client.connect(path)
        assert not unix_stream_is_connected(inode(client))  # nobody has accepted it yet
        accepted, _ = listener.accept()
        with accepted:
            assert unix_stream_is_connected(inode(accepted))
        assert not unix_stream_is_connected(inode(client))


def test_a_tool_that_closed_is_seen(pair: Pair) -> None:
    ours, tools = pair
    tools.close()

    assert not unix_stream_is_connected(inode(ours))


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
@pytest.mark.parametrize("whose", [0, 1], ids=["ours", "the-tools"])
def test_either_side_shutting_down_is_seen(pair: Pair, how: int, whose: int) -> None:
    # KVM shuts its end down when the protocol is broken; a tool may do so before it closes.
    pair[whose].shutdown(how)

    assert not unix_stream_is_connected(inode(pair[0]))


def test_unread_data_makes_no_difference(pair: Pair) -> None:
    pair[0].send(b"x")
    pair[1].send(b"y")

    assert unix_stream_is_connected(inode(pair[0]))


def test_a_socket_that_only_the_kernel_holds_is_still_found(pair: Pair) -> None:
    # As after HOOK: every copy in user space closed. Here a queue of the kernel holds it.
    ours, tools = pair
    number = inode(ours)
    carrier, other = socket.socketpair()
    with carrier, other:
        socket.send_fds(carrier, [b"x"], [ours.fileno()])
        ours.close()
        assert unix_stream_is_connected(number)
        tools.close()
        assert not unix_stream_is_connected(number)


def test_a_socket_that_is_gone_is_not_connected(pair: Pair) -> None:
    number = inode(pair[0])
    pair[0].close()

    assert not unix_stream_is_connected(number)


def _error_answer(code: int) -> bytes:
    payload = struct.pack("=i", -code)
    header = struct.pack("=IHHII", 16 + len(payload), sockdiag._NLMSG_ERROR, 0, 1, 0)
    return header + payload


def test_the_kernel_refusing_to_answer_is_no_closed_channel() -> None:
    with pytest.raises(OSError, match="sock_diag") as caught:
        sockdiag._is_connected(_error_answer(errno.EPERM))

    assert caught.value.errno == errno.EPERM


def test_no_such_socket_is_a_closed_channel() -> None:
    assert not sockdiag._is_connected(_error_answer(errno.ENOENT))


def test_an_attribute_without_a_length_ends_the_reading() -> None:
    # Never seen from a kernel; it must not loop for ever.
    message = struct.pack("=BBBBIII", 1, 1, 1, 0, 5, 0, 0) + struct.pack("=HH", 0, 0)
    header = struct.pack("=IHHII", 16 + len(message), 20, 0, 1, 0)

    assert not sockdiag._is_connected(header + message)
