# SPDX-License-Identifier: Apache-2.0
"""Reach an introspection tool: connect, shake hands, see that the channel is alive.

All of it within one deadline, and with no byte read that belongs to the kernel
after HOOK. Retrying, and judging the answer, are the caller's. May import
``errors``, ``tool.handshake`` and the source types of ``policy.model``.
"""

from __future__ import annotations

import errno
import json
import math
import os
import select
import socket
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from kvmi_libvirt.errors import (
    HandshakeError,
    HandshakeRefused,
    HandshakeTimeout,
    errno_name,
)
from kvmi_libvirt.policy.model import TcpSource, UnixSource, VsockSource
from kvmi_libvirt.tool.handshake import Answer, AnswerReader

if TYPE_CHECKING:
    from kvmi_libvirt.policy.model import Source

_timeval: Final = struct.Struct("@ll")
_ucred: Final = struct.Struct("@iII")

_KVM_FAMILIES: Final = frozenset({socket.AF_UNIX, socket.AF_VSOCK, socket.AF_INET, socket.AF_INET6})

_SO_VM_SOCKETS_CONNECT_TIMEOUT: Final = 6
"""<linux/vm_sockets.h>; 2 s unless set, whatever the socket's own timeout is."""

_KEEPALIVE: Final = (
    (socket.TCP_KEEPIDLE, 10),  # seconds
    (socket.TCP_KEEPINTVL, 5),  # seconds
    (socket.TCP_KEEPCNT, 3),
)
"""A machine that vanished closes nothing: without these the channel would look alive."""

_RESOLVE: Final = """\
import json, socket, sys
try:
    found = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_STREAM)
    json.dump([[family, list(address)] for family, _, _, _, address in found], sys.stdout)
except OSError as error:
    json.dump(str(error.strerror or error), sys.stdout)
"""
_MAX_ADDRESSES: Final = 8

_WHY: Final = {
    errno.ECONNREFUSED: "no tool listens on {where} (ECONNREFUSED): start the tool first",
    errno.ENOENT: "no tool listens on {where} (ENOENT): start the tool first",
    errno.EACCES: "not permitted to connect to {where} (EACCES): "
    "look at the owner and mode of the socket and of its directories",
    errno.EPROTOTYPE: "{where} is not a stream socket (EPROTOTYPE): a tool listens on a stream",
}

_WHY_ELSEWHERE: Final = {
    errno.ECONNRESET: "no tool listens on {where} (ECONNRESET): start the tool first",
    errno.ENODEV: "there is no machine at {where} (ENODEV): is the tool's VM running?",
    errno.ENETUNREACH: "there is no way to {where} (ENETUNREACH)",
    errno.EHOSTUNREACH: "there is no way to {where} (EHOSTUNREACH)",
}
"""Of vsock and TCP: a vsock port nobody listens on answers with a reset."""


class PeerCredentials(NamedTuple):
    """Who is at the other end of a unix socket."""

    pid: int
    """Process that called listen(2), socketpair(2) or connect(2); 0 in another pid namespace."""
    uid: int
    gid: int


def connect(source: Source, *, deadline: float) -> socket.socket:
    """Connect to the tool that listens at *source*.

    Parameters
        deadline  CLOCK_MONOTONIC seconds, as time.monotonic() returns them.
    Returns
        a new socket the caller owns: connected, blocking, close-on-exec, without
        send or receive timeout.
    Raises
        HandshakeRefused  nobody listens, or the socket may not be used.
        HandshakeTimeout  no connection by the deadline; looking up a host's name
                          counts.
        HandshakeError    this process can make no socket.
        In each case nothing is left open.
    Blocking
        until the listener has room in its queue, at most until the deadline.
    Source
        unix(7), vsock(7), tcp(7), socket(7).
    """
    if isinstance(source, UnixSource):
        return _connect_unix(source, deadline=deadline)
    if isinstance(source, VsockSource):
        address = (source.cid, source.port)
        return _connect_address(socket.AF_VSOCK, address, source, deadline=deadline)
    return _connect_tcp(source, deadline=deadline)


def _connect_unix(source: UnixSource, *, deadline: float) -> socket.socket:
    limit_s = deadline - time.monotonic()
    sock = _new_socket(socket.AF_UNIX)
    try:
        while not _connect_once(sock, source, deadline=deadline, limit_s=limit_s):
            pass
        set_send_timeout(sock, 0)
    except BaseException:
        sock.close()
        raise
    return sock


def _new_socket(family: int) -> socket.socket:
    try:
        return socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        is_vsock = family == socket.AF_VSOCK
        kind, advice = ("vsock ", " (is the kernel module vsock there?)") if is_vsock else ("", "")
        raise HandshakeError(f"cannot make a {kind}socket: {error.strerror}{advice}") from error


def _connect_tcp(source: TcpSource, *, deadline: float) -> socket.socket:
    refused: HandshakeError | None = None
    for family, address in _addresses(source, deadline=deadline)[:_MAX_ADDRESSES]:
        try:
            sock = _connect_address(family, address, source, deadline=deadline)
        except HandshakeTimeout:
            raise
        except HandshakeError as error:
            refused = refused or error
            continue
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        except BaseException:
            sock.close()
            raise
        return sock
    raise refused or HandshakeRefused(f"{source.describe()}: the host has no address")


def _addresses(source: TcpSource, *, deadline: float) -> list[tuple[int, tuple[object, ...]]]:
    # An address in numbers needs no resolver. A name does, and that cannot be given a
    # deadline, nor be left behind in a thread by a process that is going to fork: so
    # it has a process of its own, which can be ended.
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, source.host)
        except OSError:
            continue
        return [(family, (source.host, source.port))]
    remaining_s = deadline - time.monotonic()
    where = source.describe()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _RESOLVE, source.host, str(source.port)],
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=max(remaining_s, 0),
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        text = f"the name in {where} was not resolved within {max(remaining_s, 0):.1f} s"
        raise HandshakeTimeout(text) from error
    except (OSError, ValueError) as error:
        raise HandshakeRefused(f"the name in {where} cannot be resolved: {error}") from error
    if not isinstance(found, list):
        raise HandshakeRefused(f"the name in {where} cannot be resolved: {found}")
    ours = (socket.AF_INET, socket.AF_INET6)
    return [(int(family), tuple(address)) for family, address in found if family in ours]


def _connect_address(
    family: int,
    address: tuple[object, ...],
    source: VsockSource | TcpSource,
    *,
    deadline: float,
) -> socket.socket:
    where = source.describe()
    limit_s = deadline - time.monotonic()
    if limit_s <= 0:
        raise HandshakeTimeout(f"no connection to {where} within {max(limit_s, 0):.1f} s")
    sock = _new_socket(family)
    try:
        if family == socket.AF_VSOCK:
            value = _packed_timeval(limit_s)
            _set_option(sock, socket.AF_VSOCK, _SO_VM_SOCKETS_CONNECT_TIMEOUT, value)
        # Non-blocking underneath: connect() then waits in poll(2) until the deadline.
        sock.settimeout(limit_s)
        sock.connect(address)
        sock.settimeout(None)
    except (TimeoutError, BlockingIOError) as error:
        sock.close()
        raise HandshakeTimeout(f"no connection to {where} within {limit_s:.1f} s") from error
    except OSError as error:
        sock.close()
        reason = _WHY_ELSEWHERE.get(error.errno or 0) or _WHY.get(error.errno or 0)
        if reason is None:
            reason = f"cannot connect to {{where}}: {error.strerror or error}"
        raise HandshakeRefused(reason.format(where=where)) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_once(
    sock: socket.socket, source: UnixSource, *, deadline: float, limit_s: float
) -> bool:
    where = source.describe()
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise HandshakeTimeout(f"no connection to {where} within {max(limit_s, 0):.1f} s")
    # A blocking connect waits for room in the listener's queue no longer than the send
    # timeout. A non-blocking one would fail at once with EAGAIN, and nothing to poll for.
    set_send_timeout(sock, remaining_s)
    try:
        sock.connect(source.path)
    except BlockingIOError as error:
        raise HandshakeTimeout(
            f"the tool did not accept within {limit_s:.1f} s ({where}): "
            "its queue of connections is full"
        ) from error
    except OSError as error:
        reason = _WHY.get(error.errno or 0)
        if reason is None:
            reason = f"cannot connect to {{where}}: {error.strerror or error}"
        raise HandshakeRefused(reason.format(where=where)) from error
    # socket.connect() takes a wait that a signal handler cut short for a connection on
    # its way, which a unix socket never has. Ask, and go on waiting.
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise HandshakeRefused(f"cannot connect to {where}: {error.strerror}") from error
        return False
    return True


def set_send_timeout(sock: socket.socket, timeout_s: float) -> None:
    """Let sends on *sock* fail after *timeout_s* seconds, also those of the kernel; 0 is never.

    Source
        SO_SNDTIMEO in socket(7).
    """
    # 0 means for ever, so a small rest is rounded up.
    _set_option(sock, socket.SOL_SOCKET, socket.SO_SNDTIMEO, _packed_timeval(timeout_s))


def _packed_timeval(seconds: float) -> bytes:
    return _timeval.pack(*divmod(math.ceil(seconds * 1_000_000), 1_000_000))


def _set_option(sock: socket.socket, level: int, option: int, value: bytes) -> None:
    if sock.family != socket.AF_VSOCK:
        sock.setsockopt(level, option, value)
        return
    # Python takes every option of a vsock socket for a 64 bit number. It does not know
    # the family of this second name for the same socket.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, os.dup(sock.fileno())) as alias:
        alias.setsockopt(level, option, value)


def shake_hands(sock: socket.socket, hello: bytes, *, deadline: float) -> Answer:
    """Send *hello* and read the tool's answer.

    Not one byte beyond the answer is read: what the tool sends next is for the
    kernel. Must not be called once the socket was given to the kernel.

    Parameters
        sock      borrowed; connected to the tool. Afterwards, also after an error,
                  it is blocking and has no receive timeout (KVM takes the end of
                  one for the end of the channel). After an error close it.
        hello     as pack_hello() made it.
        deadline  CLOCK_MONOTONIC seconds, for all of it.
    Raises
        HandshakeRefused        the tool closed the connection.
        HandshakeTimeout        the answer was not complete by the deadline, however
                                slowly it came in.
        HandshakeProtocolError  what came is no answer.
    Blocking
        until the answer is complete, at most until the deadline.
    """
    limit_s = deadline - time.monotonic()
    reader = AnswerReader()
    try:
        _wait_at_most(sock, deadline)
        sock.sendall(hello, socket.MSG_NOSIGNAL)
        while True:
            _wait_at_most(sock, deadline)
            data = sock.recv(reader.wanted())
            if not data:
                raise HandshakeRefused(
                    "the tool closed the connection without an answer "
                    f"{_about(sock, f'{reader.received} bytes came')}"
                )
            answer = reader.feed(data)
            if answer is not None:
                return answer
    except HandshakeError:
        raise
    except TimeoutError as error:
        raise HandshakeTimeout(
            f"the tool did not answer within {max(limit_s, 0):.1f} s "
            f"{_about(sock, f'{reader.received} bytes came')}"
        ) from error
    except OSError as error:
        raise HandshakeRefused(
            f"the tool closed the connection {_about(sock, errno_name(error.errno or 0))}"
        ) from error
    finally:
        sock.settimeout(None)


def _wait_at_most(sock: socket.socket, deadline: float) -> None:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:  # 0 would make the socket non-blocking
        raise TimeoutError
    sock.settimeout(remaining_s)


def _about(sock: socket.socket, detail: str) -> str:
    # Comes after what happened, which is what must be seen where not all is shown.
    return f"({where}; {detail})" if (where := _peer(sock)) else f"({detail})"


def _peer(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return ""
    if name and isinstance(name, str):
        return f"unix:{name}"
    if sock.family == socket.AF_VSOCK:
        return f"vsock:{name[0]}:{name[1]}"
    if sock.family == socket.AF_INET6:
        return f"tcp:[{name[0]}]:{name[1]}"
    return f"tcp:{name[0]}:{name[1]}" if sock.family == socket.AF_INET else ""


def peer_credentials(sock: socket.socket) -> PeerCredentials | None:
    """Return who is at the other end, None where the socket's family cannot tell.

    Source
        SO_PEERCRED in unix(7).
    """
    if sock.family != socket.AF_UNIX:
        return None
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size)
    except OSError:
        return None
    # A socket that was never connected answers pid 0 and uid -1.
    pid, uid, gid = _ucred.unpack(data)
    return None if uid == 0xFFFFFFFF else PeerCredentials(pid, uid, gid)


def check_channel(sock: socket.socket) -> None:
    """Raise HandshakeRefused unless *sock* is fit to be given to the kernel.

    HOOK accepts any socket there is, also a dead one, and no ioctl tells later. So
    call this immediately before it: a connected stream of a family KVM was seen to
    work with, no error pending, and the tool still there. Nothing is read.

    Source
        a real KVMI kernel, asked with every kind of socket.
    """
    peer = _peer(sock)
    what = f"the tool at {peer}" if peer else "the tool"
    try:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) not in _KVM_FAMILIES:
            raise HandshakeRefused("the channel is no unix, vsock or TCP socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
            raise HandshakeRefused("the channel is not a stream socket")
        pending = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        sock.getpeername()
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        happened = poll.poll(0)
    except OSError as error:
        raise HandshakeRefused(f"the channel is not connected: {error.strerror}") from error
    if pending:
        raise HandshakeRefused(f"the channel to {what} has failed: {os.strerror(pending)}")
    if happened:
        raise HandshakeRefused(f"{what} has closed the connection")
