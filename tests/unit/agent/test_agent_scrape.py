# SPDX-License-Identifier: Apache-2.0
"""Metrics over HTTP: right and wrong requests, slow and many clients."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.agent import scrape as scrape_module
from kvmi_libvirt.agent.scrape import Scrape
from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PATIENCE_S = 20.0
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def serve(
    address: str, body: Callable[[], Awaitable[None]], *, render: Callable[[], bytes] | None = None
) -> None:
    """Serve at *address* while *body* runs, in a loop of its own."""

    async def main() -> None:
        scrape = Scrape(address, render or (lambda: b"metric 1\n"))
        await scrape.start()
        try:
            await asyncio.wait_for(body(), PATIENCE_S)
        finally:
            await scrape.close()

    asyncio.run(main())


async def said(path: Path, request: bytes) -> bytes:
    """Return all that is answered to *request*."""
    reader, writer = await asyncio.open_unix_connection(path)
    with contextlib.suppress(ConnectionError):
        writer.write(request)
        await writer.drain()
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_metrics_are_answered_and_the_connection_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"

    async def body() -> None:
        assert path.stat().st_mode & 0o777 == 0o660
        for request in (
            GET,
            b"GET /metrics?a=b HTTP/1.0\r\n\r\n",
            b"GET /metrics HTTP/1.1\r\nAccept: */*\r\nX: " + b"x" * 4000 + b"\r\n\r\nbody",
        ):
            head, _, text = (await said(path, request)).partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            assert lines[0] == b"HTTP/1.1 200 OK"
            assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8" in lines
            assert b"Content-Length: 9" in lines
            assert b"Connection: close" in lines
            assert text == b"metric 1\n"

    serve(f"unix:{path}", body)
    assert not path.exists()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"POST /metrics HTTP/1.1", b"405 Method Not Allowed"),
        (b"get /metrics HTTP/1.1", b"405 Method Not Allowed"),
        (b"GET / HTTP/1.1", b"404 Not Found"),
        (b"GET /metrics/x HTTP/1.1", b"404 Not Found"),
        (b"GET //metrics HTTP/1.1", b"404 Not Found"),
        (b"GET /metrics", b"400 Bad Request"),
        (b"GET /metrics HTTP/2", b"400 Bad Request"),
        (b"GET /metrics HTTP/1.1 x", b"400 Bad Request"),
        (b"", b"400 Bad Request"),
        (b"\x16\x03\x01\x02\x00", b"400 Bad Request"),
        (b"\xff\xfe /metrics HTTP/1.1", b"405 Method Not Allowed"),
    ],
)
def test_what_is_no_scrape_is_answered_so(
    tmp_path: Path, request_line: bytes, status: bytes
) -> None:
    path = tmp_path / "m.sock"

    async def body() -> None:
        answer = await said(path, request_line + b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 " + status + b"\r\n")
        assert b"metric" not in answer.partition(b"\r\n\r\n")[2].replace(b"only /metrics", b"")

    serve(f"unix:{path}", body)


@pytest.mark.parametrize("request_", [b"", b"GET", b"x" * 20_000, b"GET /metrics HTTP/1.1\r\n"])
def test_a_client_that_ends_half_way_or_says_too_much_gets_nothing(
    tmp_path: Path, request_: bytes
) -> None:
    path = tmp_path / "m.sock"

    async def body() -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        with contextlib.suppress(ConnectionError):
            writer.write(request_)
            await writer.drain()
            writer.write_eof()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert (await said(path, GET)).startswith(b"HTTP/1.1 200 ")

    serve(f"unix:{path}", body)


def test_clients_that_say_nothing_are_ended_and_too_many_are_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrape_module, "_REQUEST_S", 1.0)
    path = tmp_path / "m.sock"

    async def body() -> None:
        clients = [await asyncio.open_unix_connection(path) for _ in range(100)]
        ends = [asyncio.create_task(reader.read()) for reader, _ in clients]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) < 100  # the first few are still waited for
        assert await asyncio.gather(*ends) == [b""] * 100
        for _, writer in clients:
            writer.close()
        assert (await said(path, GET)).startswith(b"HTTP/1.1 200 ")

    serve(f"unix:{path}", body)


def test_a_client_that_does_not_read_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrape_module, "_REQUEST_S", 0.5)
    path = tmp_path / "m.sock"

    async def body() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(40):  # more than are served at once
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                await asyncio.get_running_loop().sock_connect(sock, str(path))
                sock.send(GET)
            # They are still there, and still do not read. Nobody tells when they are given up.
            answer = b""
            while len(answer) <= 8 << 20:
                answer = await said(path, GET)
                await asyncio.sleep(0.05)

    serve(f"unix:{path}", body, render=lambda: b"x" * (8 << 20))


def test_a_loopback_port_serves_as_well() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def body() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        assert (await reader.read()).endswith(b"metric 1\n")
        writer.close()

    serve(f"127.0.0.1:{port}", body)


# -- where it cannot listen --------------------------------------------------------------


def start(address: str) -> None:
    async def main() -> None:
        scrape = Scrape(address, lambda: b"")
        await scrape.start()
        await scrape.close()

    asyncio.run(main())


def test_what_lies_in_its_place_is_not_removed_unless_it_is_a_dead_socket(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    path.write_text("precious", encoding="ascii")
    with pytest.raises(KvmiLibvirtError, match="is no socket; remove it"):
        start(f"unix:{path}")
    assert path.read_text(encoding="ascii") == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        with pytest.raises(KvmiLibvirtError, match="somebody listens on"):
            start(f"unix:{path}")
        assert path.is_socket()
    start(f"unix:{path}")


@pytest.mark.parametrize("name", ["none/m.sock", "x" * 200])
def test_a_place_that_cannot_be_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(KvmiLibvirtError) as caught:
        start(f"unix:{tmp_path}/{name}")
    assert "\n" not in str(caught.value)
    assert "None" not in str(caught.value)


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(KvmiLibvirtError, match=r"cannot serve metrics on 127\.0\.0\.1:"):
            start(f"127.0.0.1:{other.getsockname()[1]}")
