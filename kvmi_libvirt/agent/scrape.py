# SPDX-License-Identifier: Apache-2.0
"""Serve the metrics over HTTP, on a unix socket or a loopback port.

As much HTTP as a scrape needs: GET /metrics, one answer, then the end. prometheus-client's
own server has a thread a request and no unix sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.agent.listening import finish, listen_unix
from kvmi_libvirt.agent.metrics import CONTENT_TYPE
from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_REQUEST_S: Final = 5.0
_MAX_LEN: Final = 8192
_MAX_CONNECTIONS: Final = 16


class Scrape:
    """Serves what *render* returns at *address* ("unix:PATH" or "HOST:PORT")."""

    def __init__(self, address: str, render: Callable[[], bytes]) -> None:
        """Nothing listens yet."""
        self._address = address
        self._render = render
        self._server: asyncio.AbstractServer | None = None
        self._busy = 0

    async def start(self) -> None:
        """Listen. Raises KvmiLibvirtError when it cannot."""
        try:
            if self._address.startswith("unix:"):
                sock = listen_unix(Path(self._address.removeprefix("unix:")), mode=0o660)
                self._server = await asyncio.start_unix_server(
                    self._connected, sock=sock, limit=_MAX_LEN
                )
            else:
                host, _, port = self._address.rpartition(":")
                self._server = await asyncio.start_server(
                    self._connected, host.strip("[]"), int(port), limit=_MAX_LEN
                )
        except OSError as error:
            raise KvmiLibvirtError(
                f"cannot serve metrics on {self._address}: {error.strerror or error}"
            ) from error

    async def close(self) -> None:
        """Listen no longer."""
        if self._server is not None:
            self._server.close()
            if self._address.startswith("unix:"):
                with contextlib.suppress(OSError):
                    os.unlink(self._address.removeprefix("unix:"))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._busy += 1
        try:
            if self._busy <= _MAX_CONNECTIONS:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _REQUEST_S)
                writer.write(self._answer(head))
                await finish(writer, _REQUEST_S)
        except (
            OSError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            asyncio.TimeoutError,
        ) as error:
            logger.debug("a scrape came to nothing: %s", error)
        finally:
            self._busy -= 1
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"not HTTP\n")
        if words[0] != b"GET":
            return _response("405 Method Not Allowed", b"only GET\n")
        if words[1].partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"only /metrics\n")
        return _response("200 OK", self._render(), CONTENT_TYPE)


def _response(status: str, body: bytes, content_type: str = "text/plain") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
