# SPDX-License-Identifier: Apache-2.0
"""What the agent's two sockets have in common: how they are made, how a connection ends.

May import errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from pathlib import Path

_BACKLOG: Final = 128


def listen_unix(path: Path, *, mode: int) -> socket.socket:
    """Return a new socket that listens on *path*, owned by the caller.

    What lies there is replaced if it is a socket on which nobody listens any more.

    Raises
        KvmiLibvirtError  somebody listens there, or it is something else
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _make_room(path)
        old = os.umask(0o777 & ~mode)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(old)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise KvmiLibvirtError(f"cannot listen on {path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _make_room(path: Path) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise KvmiLibvirtError(f"{path} is there and is no socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.setblocking(False)  # whoever listens may not answer
        try:
            other.connect(os.fspath(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise KvmiLibvirtError(f"somebody listens on {path} already")


async def finish(writer: asyncio.StreamWriter, timeout_s: float) -> None:
    """Close a connection when its peer has read what is left, or after *timeout_s* seconds."""
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        writer.close()
        await asyncio.wait_for(writer.wait_closed(), timeout_s)
    writer.transport.abort()
