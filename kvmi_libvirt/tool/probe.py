# SPDX-License-Identifier: Apache-2.0
"""A tool that listens on a unix socket and asks each VM that connects.

Sockets, clock and waiting around ``tool.inquiry``. One thread serves all VMs, and
none of them can hold up another: nothing here blocks on a single connection.
May import ``abi``, ``errors`` and the rest of ``tool``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import shlex
import socket
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import HandshakeTimeout, KvmiLibvirtError
from kvmi_libvirt.tool.connect import peer_credentials
from kvmi_libvirt.tool.inquiry import Conversation, Pace, ProbeResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmi_libvirt.abi.kvmi import KvmiAbi

_OWN_DIRECTORY: Final = "/run/kvmi"
_BACKLOG: Final = 16
_RECEIVE_MAX: Final = 65536
CONNECTIONS_MAX: Final = 256
"""More than these wait in the listener's queue: descriptors are limited."""


@contextlib.contextmanager
def listen_unix(path: str) -> Iterator[socket.socket]:
    """Listen on the unix socket *path* for the time of the with block.

    The socket's mode is 0600: the device manager's helper connects as root. The
    directory must exist; only /run/kvmi is made. A socket nobody listens on any more
    is replaced, anything else at *path* is left alone.

    Returns
        the listening socket, non-blocking, owned by the block; its file is removed at
        the end unless somebody put another in its place.
    Raises
        KvmiLibvirtError  the place is taken or cannot be used; nothing is left there.
    Source
        unix(7).
    """
    where = f"unix:{path}"
    try:
        if os.path.dirname(path) == _OWN_DIRECTORY:
            with contextlib.suppress(FileExistsError):
                os.mkdir(_OWN_DIRECTORY, 0o755)
        _make_room(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise _cannot_listen(where, error) from error
    with sock:
        sock.setblocking(False)
        try:
            sock.bind(path)
        except OSError as error:
            raise _cannot_listen(where, error) from error
        identity = _identity(path)
        try:
            # Until listen() every connection is refused, whatever the mode.
            try:
                os.chmod(path, 0o600)
                sock.listen(_BACKLOG)
            except OSError as error:
                raise _cannot_listen(where, error) from error
            yield sock
        finally:
            if identity is not None and _identity(path) == identity:
                os.unlink(path)


def _cannot_listen(where: str, error: OSError) -> KvmiLibvirtError:
    if error.errno == errno.ENOENT:
        return KvmiLibvirtError(f"cannot listen on {where}: its directory does not exist")
    if error.errno == errno.EADDRINUSE:
        return KvmiLibvirtError(f"cannot listen on {where}: somebody else just began to")
    return KvmiLibvirtError(f"cannot listen on {where}: {error.strerror or error}")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_room(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        error = KvmiLibvirtError(f"cannot listen on unix:{path}: it exists and is not a socket")
        raise error.then(f"ls -l {shlex.quote(path)}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except OSError as refused:
            # A full queue, or a socket of another type: somebody is there.
            if refused.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    error = KvmiLibvirtError(f"cannot listen on unix:{path}: another process listens there")
    raise error.then("ss -xlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a Probe serves.

    ``once`` ends after the first VM that introduces itself; ``hold`` then keeps its
    channel open until it closes. ``watch`` reports every change, and so implies hold.
    ``wait_s`` bounds the time until that first VM's hello, None means for ever.
    ``secret`` is what the hello's answer proves to know, None: nothing.
    """

    pace: Pace = field(default_factory=Pace)
    abi: KvmiAbi | None = None
    once: bool = False
    hold: bool = False
    watch: bool = False
    wait_s: float | None = None
    secret: bytes | None = field(default=None, repr=False)


class _Connection:
    # One accepted socket with its conversation; owned by the Probe.

    def __init__(self, sock: socket.socket, manner: Manner) -> None:
        peer = peer_credentials(sock)
        self.sock = sock
        self.outgoing = bytearray()
        self.conversation = Conversation(
            now=time.monotonic(),
            pace=manner.pace,
            origin=f"connection from pid {peer.pid}" if peer and peer.pid else "connection",
            abi=manner.abi,
            watch=manner.watch,
            secret=manner.secret,
        )


class Probe:
    """Serve the VMs that connect to *listener*, each on its own.

    Parameters
        listener  borrowed, non-blocking, listening; closed as soon as ``once`` has its VM
        stop      borrowed socket; serving ends when it becomes readable
        report    called with every settled result
        complain  called with what went wrong on one connection (not with ``once``: raised)
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        stop: socket.socket,
        report: Callable[[ProbeResult], None],
        complain: Callable[[KvmiLibvirtError], None],
        manner: Manner,
    ) -> None:
        self._listener = listener
        self._stop = stop
        self._report = report
        self._complain = complain
        self._manner = manner
        self._connections: set[_Connection] = set()
        self._chosen: _Connection | None = None
        self._accepts = False
        self._selector = selectors.DefaultSelector()

    def run(self) -> bool:
        """Serve until there is nothing more to do.

        Returns
            True when it did what it should; False when, with ``once``, *stop* ended
            it before there was a result.
        Raises
            KvmiLibvirtError  with ``once``: the VM's conversation failed, or none came.
            In each case every connection is closed.
        """
        manner = self._manner
        give_up_at = None if manner.wait_s is None else time.monotonic() + manner.wait_s
        with self._selector, contextlib.ExitStack() as stack:
            stack.callback(self._drop_all)
            self._selector.register(self._stop, selectors.EVENT_READ)
            self._set_accepting(accepts=True)
            while True:
                waits_until = give_up_at if self._chosen is None else None
                for key, mask in self._selector.select(self._until_next(waits_until)):
                    if key.fileobj is self._stop:
                        return not manner.once or self._has_result()
                    if key.fileobj is self._listener:
                        if self._accepts:  # not closed a moment ago
                            self._accept()
                    elif key.data in self._connections:  # not dropped a moment ago
                        self._guarded(self._transfer, key.data, mask)
                for connection in list(self._connections):
                    self._guarded(self._tick, connection)
                if manner.once and self._is_done():
                    return True
                if self._chosen is None and give_up_at is not None:
                    self._check_wait(give_up_at)

    def _has_result(self) -> bool:
        return self._chosen is not None and self._chosen.conversation.is_settled

    def _is_done(self) -> bool:
        stays = self._manner.hold or self._manner.watch
        return self._has_result() and not (stays and self._chosen in self._connections)

    def _check_wait(self, give_up_at: float) -> None:
        if time.monotonic() >= give_up_at:
            raise HandshakeTimeout(f"no VM introduced itself within {self._manner.wait_s:g} s")

    def _until_next(self, give_up_at: float | None) -> float | None:
        times = [connection.conversation.wake_at for connection in self._connections]
        due = [at for at in (*times, give_up_at) if at is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _set_accepting(self, *, accepts: bool) -> None:
        if accepts and not self._accepts:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif not accepts and self._accepts:
            self._selector.unregister(self._listener)
        self._accepts = accepts

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        sock.setblocking(False)
        connection = _Connection(sock, self._manner)
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        self._set_accepting(accepts=len(self._connections) < CONNECTIONS_MAX)

    def _guarded(
        self, act: Callable[..., None], connection: _Connection, *arguments: object
    ) -> None:
        try:
            act(connection, *arguments)
        except KvmiLibvirtError as error:
            self._drop(connection)
            if self._manner.once:
                raise
            self._complain(error)

    def _transfer(self, connection: _Connection, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._send(connection, b"")
        if mask & selectors.EVENT_READ and connection in self._connections:
            self._receive(connection)

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(_RECEIVE_MAX)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._closed(connection)
            return
        conversation = connection.conversation
        output = conversation.receive(data, now=time.monotonic())
        if self._manner.once and self._chosen is None and conversation.hello is not None:
            self._choose(connection)
        self._publish(connection)
        self._send(connection, output)

    def _tick(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._send(connection, connection.conversation.tick(now=time.monotonic()))

    def _publish(self, connection: _Connection) -> None:
        result = connection.conversation.take_result()
        if result is not None:
            self._report(result)
        if connection.conversation.is_leaving:
            self._closed(connection)

    def _choose(self, connection: _Connection) -> None:
        # The others learn at once that nobody will serve them.
        self._chosen = connection
        self._set_accepting(accepts=False)
        self._listener.close()
        for other in self._connections - {connection}:
            self._drop(other)

    def _send(self, connection: _Connection, data: bytes) -> None:
        connection.outgoing += data
        if not connection.outgoing or connection not in self._connections:
            return
        try:
            sent = connection.sock.send(connection.outgoing, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except (BrokenPipeError, ConnectionResetError):
            self._closed(connection)
            return
        del connection.outgoing[:sent]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outgoing else 0)
        self._selector.modify(connection.sock, events, connection)

    def _closed(self, connection: _Connection) -> None:
        self._drop(connection)
        # Who connects and leaves without a word only looked whether a tool listens.
        if connection.conversation.has_spoken:
            connection.conversation.closed()

    def _drop(self, connection: _Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        if self._chosen is None:
            self._set_accepting(accepts=True)

    def _drop_all(self) -> None:
        for connection in self._connections:
            connection.sock.close()
        self._connections.clear()
