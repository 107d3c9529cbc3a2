# SPDX-License-Identifier: Apache-2.0
"""Ask the agent something, if there is one. No package imports."""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

VERSION: Final = 1
"""Of what is spoken on the agent's socket."""

SOCKET_NAME: Final = "agent.sock"
_MAX_LEN: Final = 64 << 20


def ask(state_dir: Path, op: str, *, timeout_s: float = 2.0) -> dict[str, Any] | None:
    """Return the agent's answer to *op* ("ping" or "status"), or None without one.

    None, too, for an agent that hangs, is of another version, or may not be asked by
    us: whoever asks must be able to do without it.

    Parameters
        state_dir  where its socket is
        timeout_s  for everything together
    """
    deadline = time.monotonic() + timeout_s
    chunks = []
    size = 0
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(state_dir / SOCKET_NAME))
            sock.sendall(json.dumps({"version": VERSION, "op": op}).encode() + b"\n")
            while chunk := sock.recv(1 << 16):
                chunks.append(chunk)
                size += len(chunk)
                left = deadline - time.monotonic()
                if left <= 0 or size > _MAX_LEN:
                    return None
                sock.settimeout(left)
        answer = json.loads(b"".join(chunks))
    except (OSError, ValueError):
        return None
    if not isinstance(answer, dict) or answer.get("version") != VERSION or not answer.get("ok"):
        return None
    return answer
