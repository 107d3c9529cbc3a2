# SPDX-License-Identifier: Apache-2.0
"""An introspection tool of one file, written from docs/protocol.md and nothing else.

It imports nothing of this project, and whoever changes it must not either: it shows that
the page is enough to write a tool, and what it had to guess is a fault of the page.

    python protocol_client.py SOCKET

listens, takes one VM, and speaks the revision the VM's hello and the kernel's answers tell.
Each line on standard input is then a request, ``{"op": "read", "gpa": 0, "size": 4}``, and answered
with a line ``{"error": 0, "data": HEX}``, *error* being the protocol's (positive) number.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import socket
import struct
import sys
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PAYLOAD = 8184
PAGE = 4096

ERRORS = {
    1: "EPERM",
    2: "ENOENT",
    7: "E2BIG",
    11: "EAGAIN",
    12: "ENOMEM",
    14: "EFAULT",
    16: "EBUSY",
    22: "EINVAL",
    95: "EOPNOTSUPP",
    1000: "ENOSYS",
}


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The numbers in which the revisions differ."""

    get_version: int
    check_command: int
    check_event: int
    get_info: int
    control_events: int
    read: int
    write: int
    range: str
    event_ids: tuple[int, ...]
    pause: int
    answer: int
    get_max_gfn: int | None = None
    control_cleanup: int | None = None


V12 = Dialect(2, 4, 6, 8, 10, 12, 14, "<QHHI", (0, 1), 16, 1, None, 18)
V11 = dataclasses.replace(V12, get_max_gfn=20)
V7 = Dialect(2, 3, 4, 5, 8, 17, 18, "<QQ", (1,), 7, 0, 29, None)


@dataclasses.dataclass(frozen=True)
class Hello:
    """What the device manager says about the VM."""

    size: int
    uuid: uuid.UUID
    start_time: int
    name: bytes
    max_gpa: int | None


class Refused(Exception):
    """The kernel answered a command with an error, of this positive number and name."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.error = ERRORS.get(number, str(number))
        super().__init__(f"the kernel answered {self.error}")


@dataclasses.dataclass(frozen=True)
class Event:
    """A message the kernel began: its payload's `event_id`, and all of the payload."""

    seq: int
    event_id: int
    payload: bytes


class Client:
    """One VM's channel. Commands are methods; events met on the way wait in `events`."""

    def __init__(self, connection: socket.socket, *, secret: bytes | None = None) -> None:
        self._socket = connection
        self._seq = 0
        self.events: collections.deque[Event] = collections.deque()
        self.hello = self._read_hello()
        digest = bytes(20) if secret is None else hashlib.sha1(secret).digest()
        connection.sendall(struct.pack("<I20s", 24, digest))
        self.dialect = V7 if self.hello.size == 96 else V12

    # the handshake

    def _read_hello(self) -> Hello:
        (size,) = struct.unpack("<I", self._exactly(4))
        if not 32 <= size <= 65536:
            raise ValueError(f"a hello of {size} bytes")
        body = self._exactly(size - 4).ljust(100, b"\0")
        identity, _, start, name, gpa = struct.unpack_from("<16sIq64sQ", body)
        return Hello(
            size,
            uuid.UUID(bytes=identity),
            start,
            name.partition(b"\0")[0],
            gpa if size >= 104 else None,
        )

    def _exactly(self, count: int) -> bytes:
        """The next *count* bytes, and not one more."""
        parts = b""
        while len(parts) < count:
            part = self._socket.recv(count - len(parts))
            if not part:
                raise EOFError("the channel ended")
            parts += part
        return parts

    # messages

    def send(self, message_id: int, payload: bytes = b"", seq: int | None = None) -> int:
        """Send one message without waiting; returns its seq."""
        if seq is None:
            self._seq += 1
            seq = self._seq
        self._socket.sendall(struct.pack("<HHI", message_id, len(payload), seq) + payload)
        return seq

    def receive(self) -> tuple[int, int, bytes]:
        """The next message, whatever it is: (id, seq, payload)."""
        message_id, size, seq = struct.unpack("<HHI", self._exactly(8))
        return message_id, seq, self._exactly(size)

    def reply_to(self, message_id: int, seq: int) -> bytes:
        """The data of one command's reply, or Refused. Events before it are kept."""
        while True:
            got, got_seq, payload = self.receive()
            if got in self.dialect.event_ids:
                self.events.append(self._event(got_seq, payload))
                continue
            if (got, got_seq) != (message_id, seq):
                raise ValueError(f"a reply to {got}/{got_seq}, not to {message_id}/{seq}")
            (error,) = struct.unpack_from("<i", payload)
            if error:
                raise Refused(-error)
            return payload[8:]

    def command(self, message_id: int, payload: bytes = b"") -> bytes:
        """Send one command and return its reply's data."""
        return self.reply_to(message_id, self.send(message_id, payload))

    def _event(self, seq: int, payload: bytes) -> Event:
        at, form = (4, "<B") if self.dialect is V7 else (0, "<H")
        return Event(seq, struct.unpack_from(form, payload, at)[0], payload)

    def next_event(self) -> Event:
        """The oldest event not yet taken; waits for one."""
        if not self.events:
            message_id, seq, payload = self.receive()
            if message_id not in self.dialect.event_ids:
                raise ValueError(f"message {message_id} where an event was due")
            self.events.append(self._event(seq, payload))
        return self.events.popleft()

    # commands

    def identify(self) -> str:
        """Tell v12 from v11 ("v7" is told by the hello) and use its commands from now on."""
        if self.dialect is not V7:
            unknown = self.check_command(22) == "ENOENT"
            self.dialect = V12 if unknown else V11
        return {V12: "v12", V11: "v11", V7: "v7"}[self.dialect]

    def get_version(self) -> tuple[int, int | None]:
        """The protocol's version and its largest payload (None where it is not told)."""
        data = self.command(self.dialect.get_version)
        version, limit = struct.unpack_from("<II", data)
        return version, limit or None

    def _check(self, command: int, asked: int) -> str:
        try:
            self.command(command, struct.pack("<HHI", asked, 0, 0))
        except Refused as why:
            return why.error
        return "allowed"

    def check_command(self, asked: int) -> str:
        """ "allowed", "EPERM", "ENOENT" or "EINVAL"."""
        return self._check(self.dialect.check_command, asked)

    def check_event(self, asked: int) -> str:
        """As `check_command`."""
        return self._check(self.dialect.check_event, asked)

    def vcpu_count(self) -> int:
        return int(struct.unpack_from("<I", self.command(self.dialect.get_info))[0])

    def control_vm_event(self, event_id: int, enable: int) -> None:
        payload = struct.pack("<HBBI", event_id, enable, 0, 0)
        self.command(self.dialect.control_events, payload)

    def control_cleanup(self, enable: int) -> None:
        assert self.dialect.control_cleanup is not None
        self.command(self.dialect.control_cleanup, bytes((enable,)) + bytes(7))

    def max_gfn(self) -> int:
        assert self.dialect.get_max_gfn is not None
        return int(struct.unpack("<Q", self.command(self.dialect.get_max_gfn))[0])

    def pause_vcpu(self, vcpu: int, wait: int = 0) -> None:
        if self.dialect is V7:
            payload = struct.pack("<HHIBBHI", vcpu, 0, 0, wait, 0, 0, 0)
        else:
            payload = struct.pack("<HBBI", vcpu, wait, 0, 0)
        self.command(self.dialect.pause, payload)

    def _range(self, gpa: int, size: int) -> bytes:
        zeros = (0, 0) if self.dialect.range == "<QHHI" else ()
        return struct.pack(self.dialect.range, gpa, size, *zeros)

    def read_once(self, gpa: int, size: int) -> bytes:
        """One READ_PHYSICAL, inside one page."""
        return self.command(self.dialect.read, self._range(gpa, size))

    def write_once(self, gpa: int, data: bytes) -> None:
        """One WRITE_PHYSICAL, inside one page."""
        self.command(self.dialect.write, self._range(gpa, len(data)) + data)

    def read(self, gpa: int, size: int) -> bytes:
        """Any range of guest memory, a page at a time."""
        return b"".join(self.read_once(at, count) for at, count in pieces(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        """Any range of guest memory, a page at a time."""
        for at, count in pieces(gpa, len(data)):
            self.write_once(at, data[at - gpa : at - gpa + count])

    def read_many(self, gpas: list[int], size: int) -> list[bytes]:
        """Pipelined: all questions first, then all answers."""
        seqs = [self.send(self.dialect.read, self._range(gpa, size)) for gpa in gpas]
        return [self.reply_to(self.dialect.read, seq) for seq in seqs]

    def close(self) -> None:
        self._socket.close()


def pieces(gpa: int, size: int) -> list[tuple[int, int]]:
    """`(address, count)` for each page the range touches."""
    out = []
    end = gpa + size
    while gpa < end:
        count = min(end - gpa, PAGE - gpa % PAGE)
        out.append((gpa, count))
        gpa += count
    return out


def listen(path: str) -> socket.socket:
    """Where the device manager is to connect to."""
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    return listener


# -- as a program ----------------------------------------------------------------------------


def answer(client: Client, request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request says."""
    asked = request.get("id", 0)
    operations: dict[str, Callable[[], object]] = {
        "identify": client.identify,
        "version": client.get_version,
        "check": lambda: client.check_command(asked),
        "check-event": lambda: client.check_event(asked),
        "info": client.vcpu_count,
        "max-gfn": client.max_gfn,
        "subscribe": lambda: client.control_vm_event(asked, request.get("enable", 1)),
        "cleanup": lambda: client.control_cleanup(request["enable"]),
        "pause": lambda: client.pause_vcpu(request["vcpu"], request.get("wait", 0)),
        "read": lambda: client.read(request["gpa"], request["size"]).hex(),
        "read-once": lambda: client.read_once(request["gpa"], request["size"]).hex(),
        "read-many": lambda: [
            data.hex() for data in client.read_many(request["gpas"], request["size"])
        ],
        "write": lambda: client.write(request["gpa"], bytes.fromhex(request["data"])),
        "event": lambda: dataclasses.asdict(client.next_event()) | {"payload": None},
        "raw": lambda: client.command(asked, bytes.fromhex(request.get("data", ""))).hex(),
    }
    try:
        return {"error": 0, "data": operations[request["op"]]()}
    except Refused as why:
        return {"error": why.number, "data": None}
    except (EOFError, ConnectionError):
        return {"error": "eof", "data": None}


def main() -> None:
    """Serve one VM."""
    with listen(sys.argv[1]) as listener:
        listener.settimeout(60)
        print(json.dumps({"listening": sys.argv[1]}), flush=True)
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(60)
        client = Client(connection)
        hello = client.hello
        print(
            json.dumps(
                {
                    "uuid": str(hello.uuid),
                    "name": hello.name.decode(),
                    "start_time": hello.start_time,
                    "hello_size": hello.size,
                    "max_gpa": hello.max_gpa,
                }
            ),
            flush=True,
        )
        for line in sys.stdin:
            print(json.dumps(answer(client, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
