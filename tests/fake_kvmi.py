# SPDX-License-Identifier: Apache-2.0
"""A KVMI kernel's socket side, as far as the always-allowed commands go, for tests.

Written from docs/protocol.md with struct alone, so that it is a second opinion on
``tool.wire``. :class:`FakeKernel` is bytes in, bytes out; :class:`FakeVm` puts it
behind a hello on a real socket.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import TracebackType

UUID_BYTES = bytes.fromhex("c7a5fdbdedaf9455926ad65c16db1809")
UUID_TEXT = "c7a5fdbd-edaf-9455-926a-d65c16db1809"

V12_COMMANDS = frozenset({*range(2, 22), 23, 25, 27, 29})
V11_COMMANDS = V12_COMMANDS | {22}
V12_EVENTS = frozenset({0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19})

EPERM, ENOENT, EINVAL, ENOSYS = -1, -2, -22, -1000


def hello_bytes(*, name: str = "db1", size: int = 104, start_time_s: int = 1_600_000_000) -> bytes:
    """Return a hello as QEMU would send it, of *size* bytes."""
    body = struct.pack("<16s4xq64s", UUID_BYTES, start_time_s, name.encode())
    return struct.pack("<I", size) + body.ljust(size - 4, b"\0")[: size - 4]


class FakeKernel:
    """Answers GET_VERSION, CHECK_COMMAND and CHECK_EVENT from two sets of allowed ids."""

    def __init__(
        self,
        *,
        commands: Collection[int] = (),
        events: Collection[int] = (),
        known_commands: Collection[int] = V12_COMMANDS,
        known_events: Collection[int] = V12_EVENTS,
        is_v7: bool = False,
    ) -> None:
        self.always = {2, 3, 4} if is_v7 else {2, 4, 6}
        self.commands = set(commands)
        self.events = set(events)
        self.known_commands = known_commands
        self.known_events = known_events
        self.is_v7 = is_v7
        self.check_command, self.check_event = (3, 4) if is_v7 else (4, 6)
        self.rounds = 0
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """Return the replies to every whole message received so far."""
        self._buffer += data
        replies = b""
        while len(self._buffer) >= 8:
            id_, size, seq = struct.unpack_from("<HHI", self._buffer)
            if len(self._buffer) < 8 + size:
                break
            payload = self._buffer[8 : 8 + size]
            self._buffer = self._buffer[8 + size :]
            error, body = self._answer(id_, payload)
            reply = struct.pack("<iI", error, 0) + body
            replies += struct.pack("<HHI", id_, len(reply), seq) + reply
        return replies

    def _answer(self, id_: int, payload: bytes) -> tuple[int, bytes]:
        if id_ == 2:
            return 0, struct.pack("<II8x", 1, 0 if self.is_v7 else 8184)
        if id_ not in (self.check_command, self.check_event):
            return ENOSYS, b""
        about, pad16, pad32 = struct.unpack("<HHI", payload[:8].ljust(8, b"\0"))
        if pad16 or pad32:
            return EINVAL, b""
        if id_ == self.check_command:
            if about == 0:
                self.rounds += 1
            return self._verdict(about, self.commands | self.always, self.known_commands, 64), b""
        return self._verdict(about, self.events, self.known_events, 14), b""

    def _verdict(
        self, about: int, allowed: Collection[int], known: Collection[int], slots_v7: int
    ) -> int:
        if self.is_v7:
            if about >= slots_v7:
                return EINVAL
        elif about not in known:
            return ENOENT
        return 0 if about in allowed else EPERM


class FakeVm:
    """A device manager and its kernel: connects, says hello, then answers in a thread.

    The thread ends when the tool closes, or at the end of the with block, which
    closes the connection.

    Parameters
        path    where the tool listens
        before  called with the kernel before each piece received is answered
    """

    def __init__(
        self,
        path: str,
        kernel: FakeKernel,
        *,
        hello: bytes | None = None,
        before: Callable[[FakeKernel], None] | None = None,
    ) -> None:
        self.before = before
        self.kernel = kernel
        self.answer = b""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(path)
        self._hello = hello_bytes() if hello is None else hello
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FakeVm:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and wait for the thread."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.sock.close()

    def join(self) -> None:
        """Wait until the tool has closed."""
        self._thread.join(timeout=20)
        assert not self._thread.is_alive(), "the tool did not close"

    def _serve(self) -> None:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            self.sock.sendall(self._hello)
            # Exactly the answer: what follows is the kernel's.
            while len(self.answer) < 24:
                piece = self.sock.recv(24 - len(self.answer))
                if not piece:
                    return
                self.answer += piece
            while data := self.sock.recv(65536):
                if self.before is not None:
                    self.before(self.kernel)
                self.sock.sendall(self.kernel.feed(data))
