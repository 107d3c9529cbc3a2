# SPDX-License-Identifier: Apache-2.0
"""A small introspection tool written from docs/protocol.md and nothing else.

It shares no code with the package on purpose: what it can do, a reader of that page
can. ``protocol_client.py SOCKET`` waits for one VM, then takes one JSON request a line on stdin
and answers with one JSON line: ``{"op": "read", "gpa": .., "size": ..}``, "write" (with
"data" in hex), "check" ("id"), "check-event", "info", "max-gfn", "subscribe", "event", "quit".
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import sys
from typing import Any

# Where the revisions differ; by the size of the hello.
REVISIONS: dict[int, dict[str, Any]] = {
    104: {
        "name": "v11 or v12",
        "check": 4,
        "check-event": 6,
        "info": 8,
        "subscribe": 10,
        "read": 12,
        "write": 14,
        "max-gfn": 20,
        "physical": struct.Struct("<QHHI"),
        "events": (0, 1),
    },
    96: {
        "name": "v7",
        "check": 3,
        "check-event": 4,
        "info": 5,
        "subscribe": 8,
        "read": 17,
        "write": 18,
        "max-gfn": 29,
        "physical": struct.Struct("<QQ"),
        "events": (1,),
    },
}


class Client:
    """One VM's tool."""

    def __init__(self, sock: socket.socket, secret: bytes | None = None) -> None:
        self.sock = sock
        self.seq = 0
        self.events: list[tuple[int, int, int]] = []
        size = struct.unpack("<I", self.take(4))[0]
        if not 32 <= size <= 65536:
            raise SystemExit(f"a hello of {size} bytes")
        hello = self.take(size - 4)
        self.uuid = hello[:16].hex()
        self.start_time = struct.unpack_from("<q", hello, 20)[0]
        self.name = hello[28:92].split(b"\0")[0].decode()
        self.revision = REVISIONS[size]
        self.hello_size = size
        cookie = hashlib.sha1(secret).digest() if secret else bytes(20)
        sock.sendall(struct.pack("<I", 24) + cookie)
        error, data = self.command(2)
        self.version = struct.unpack_from("<I", data)[0] if not error else None

    def take(self, count: int) -> bytes:
        """Return the next *count* bytes."""
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise SystemExit("end of file")
            data += piece
        return data

    def message(self) -> tuple[int, int, bytes]:
        """Return id, seq and payload of the next message."""
        id_, size, seq = struct.unpack("<HHI", self.take(8))
        return id_, seq, self.take(size)

    def command(self, id_: int, payload: bytes = b"") -> tuple[int, bytes]:
        """Send one command; return its error (positive) and data."""
        self.seq += 1
        self.sock.sendall(struct.pack("<HHI", id_, len(payload), self.seq) + payload)
        while True:
            got, seq, reply = self.message()
            if (got, seq) == (id_, self.seq):
                return -struct.unpack_from("<i", reply)[0], reply[8:]
            self.events.append((got, seq, len(reply)))

    def physical(self, gpa: int, size: int) -> bytes:
        """Return the head of a memory command."""
        layout: struct.Struct = self.revision["physical"]
        padding = () if self.revision["name"] == "v7" else (0, 0)
        return layout.pack(gpa, size, *padding)

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request."""
        op = request["op"]
        if op == "event":
            if not self.events:
                got, seq, reply = self.message()
                self.events.append((got, seq, len(reply)))
            return {"event": self.events.pop(0)}
        if op in ("check", "check-event"):
            payload = struct.pack("<HHI", request["id"], 0, 0)
        elif op == "read":
            payload = self.physical(request["gpa"], request["size"])
        elif op == "write":
            data = bytes.fromhex(request["data"])
            payload = self.physical(request["gpa"], len(data)) + data
        elif op == "subscribe":
            payload = struct.pack("<HBBI", 0, 1, 0, 0)
        else:
            payload = b""
        error, data = self.command(self.revision[op], payload)
        return {"error": error, "data": data.hex()}


def main() -> None:
    """Serve one VM."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen(1)
        listener.settimeout(60)
        print(json.dumps({"listening": sys.argv[1]}), flush=True)
        sock, _ = listener.accept()
    sock.settimeout(60)
    client = Client(sock)
    hello = {"uuid": client.uuid, "name": client.name, "start_time": client.start_time}
    print(
        json.dumps({**hello, "version": client.version, "hello_size": client.hello_size}),
        flush=True,
    )
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            break
        print(json.dumps(client.do(request)), flush=True)
    sock.close()


if __name__ == "__main__":
    main()
