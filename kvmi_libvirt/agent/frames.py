# SPDX-License-Identifier: Apache-2.0
"""How the daemon and its workers talk: a JSON header, bytes behind it, at most one fd.

On a stream socket pair between processes of one program, so there is nothing to
distrust; lengths come first only so that nothing is read twice.
"""

from __future__ import annotations

import array
import json
import socket
import struct
from typing import Any, Final

_lengths: Final = struct.Struct("=II")
_FD_SPACE: Final = socket.CMSG_SPACE(4)
CHUNK: Final = 1 << 16


def encode(header: dict[str, Any], blob: bytes = b"") -> bytes:
    """Return the frame of *header* and *blob*."""
    text = json.dumps(header).encode()
    return _lengths.pack(len(text), len(blob)) + text + blob


class Decoder:
    """Frames from chunks of bytes."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> tuple[dict[str, Any], bytes] | None:
        """Take *chunk*; return a frame when one is complete. Never holds a second one."""
        self._buffer += chunk
        if len(self._buffer) < _lengths.size:
            return None
        text_len, blob_len = _lengths.unpack_from(self._buffer)
        end = _lengths.size + text_len + blob_len
        if len(self._buffer) < end:
            return None
        blob_at = _lengths.size + text_len
        header = json.loads(self._buffer[_lengths.size : blob_at])
        blob = bytes(self._buffer[blob_at:end])
        del self._buffer[:end]
        return header, blob


def send(sock: socket.socket, frame: bytes, fd: int | None = None) -> None:
    """Send *frame* on a blocking socket, *fd* with its first bytes."""
    if fd is not None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        frame = frame[sock.sendmsg([frame], rights) :]
    if frame:  # an empty packet would be taken for the end
        sock.sendall(frame)


def receive_some(sock: socket.socket) -> tuple[bytes, int | None]:
    """Receive a chunk, and the fd that came with it, owned by the caller.

    An empty chunk is the end. Raises BlockingIOError on a non-blocking socket.
    """
    chunk, control, _flags, _address = sock.recvmsg(CHUNK, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
    fd = None
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            (fd,) = struct.unpack("=i", data[:4])
    return chunk, fd
