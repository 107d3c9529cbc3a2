# SPDX-License-Identifier: Apache-2.0
"""The agent's socket: what libvirt's hook hands over, and questions from the command line.

A request is one line. Either ``hook VERSION NAME_LEN OPERATION XML_LEN`` with the name
and the XML behind it, answered at once with ``accepted`` and later with ``pass``,
``refuse TEXT`` or ``decline``; this form costs the hook no JSON. Or one JSON object,
answered by one. Only root is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt.agent.domains import identity
from kvmi_libvirt.agent.listening import finish, listen_unix
from kvmi_libvirt.agent.tracing import reach
from kvmi_libvirt.agentclient import VERSION
from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

OPERATIONS: Final = frozenset(
    {"prepare", "start", "started", "stopped", "release", "migrate", "restore", "reconnect"}
)
_MAX_LINE_LEN: Final = 4096
_MAX_NAME_LEN: Final = 4096
_MAX_XML_LEN: Final = 64 << 20
_MAX_CONNECTIONS: Final = 512
_READ_S: Final = 5.0
_WRITE_S: Final = 10.0
_END_S: Final = 10.0
_ucred: Final = struct.Struct("=iII")

Operation = "Callable[[str, str, str, bytes], Awaitable[str | None]]"
Question = "Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]"


class Server:
    """Serves the socket.

    Parameters
        path      of the socket; its directory is root's alone
        operate   (name, uuid, operation, xml) -> veto; raises KvmiLibvirtError to decline
        answer    a JSON request -> its answer
        owner     the only uid that is served
    """

    def __init__(
        self,
        path: Path,
        *,
        operate: Callable[[str, str, str, bytes], Awaitable[str | None]],
        answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
        owner: int = 0,
    ) -> None:
        """Nothing listens yet."""
        self._path = path
        self._operate = operate
        self._answer = answer
        self._owner = owner
        self._server: asyncio.AbstractServer | None = None
        self._lock = -1
        self._tasks: set[asyncio.Task[None]] = set()
        self.refused = 0

    async def start(self) -> None:
        """Listen. Raises KvmiLibvirtError when an agent listens already."""
        directory = self._path.parent
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.stat()
            if found.st_uid not in (self._owner, os.geteuid()) or found.st_mode & 0o022:
                raise KvmiLibvirtError(f"{directory}: others than root may write there")
            self._lock = _locked(self._path.with_suffix(".lock"))
        except OSError as error:
            raise KvmiLibvirtError(f"cannot use {directory}: {error.strerror or error}") from error
        try:
            sock = listen_unix(self._path, mode=0o600)
            self._server = await asyncio.start_unix_server(
                self._connected, sock=sock, limit=_MAX_LINE_LEN, start_serving=True
            )
        except BaseException:
            os.close(self._lock)
            raise

    async def close(self) -> None:
        """Listen no longer, and wait for the answers under way."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(self._lock)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_S)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            if self._is_welcome(writer) and len(self._tasks) <= _MAX_CONNECTIONS:
                await self._serve(reader, writer)
            else:
                self.refused += 1
        except (OSError, EOFError, ValueError, RecursionError, asyncio.TimeoutError) as error:
            logger.debug("a request came to nothing: %s", error)
        except Exception:
            # The edge of the process: one request must not end the agent.
            logger.exception("a request failed unexpectedly")
        finally:
            await finish(writer, _WRITE_S)

    def _is_welcome(self, writer: asyncio.StreamWriter) -> bool:
        sock = writer.get_extra_info("socket")
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size)
        _pid, uid, _gid = _ucred.unpack(raw)
        if uid in (self._owner, os.geteuid()):
            return True
        logger.warning("uid %d may not talk to the agent", uid)
        return False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await asyncio.wait_for(reader.readline(), _READ_S)
        if not line.endswith(b"\n"):
            return
        if line.startswith(b"hook "):
            await self._hook(line.split(), reader, writer)
            return
        request = json.loads(line)
        if not isinstance(request, dict):
            raise ValueError("not an object")  # noqa: TRY004 - of the request, not of an argument
        writer.write(json.dumps(await self._answer(request)).encode() + b"\n")

    async def _hook(
        self, words: list[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        _hook, version, name_len, raw_operation, xml_len = words
        operation = raw_operation.decode("ascii")
        sizes = int(name_len), int(xml_len)
        if int(version) != VERSION or operation not in OPERATIONS:
            writer.write(b"decline\n")
            return
        if not (0 < sizes[0] <= _MAX_NAME_LEN and 0 <= sizes[1] <= _MAX_XML_LEN):
            raise ValueError("lengths out of range")
        body = await asyncio.wait_for(reader.readexactly(sum(sizes)), _READ_S)
        name, xml = os.fsdecode(body[: sizes[0]]), body[sizes[0] :]
        writer.write(b"accepted\n")
        try:
            uuid = identity(xml)[1]
            veto = await self._operate(name, uuid, operation, xml)
        except KvmiLibvirtError as error:
            # The hook then does it by itself.
            logger.warning("domain %s: %s: %s", name, operation, error)
            writer.write(b"decline\n")
        else:
            answer = "pass" if veto is None else f"refuse {' '.join(veto.split())}"
            writer.write(os.fsencode(answer) + b"\n")
        reach("answered")


def _locked(path: Path) -> int:
    # Held as long as we serve: of two agents that start at once only one does.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise KvmiLibvirtError(f"an agent runs already; it holds {path}") from None
    return fd
