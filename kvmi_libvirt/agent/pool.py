# SPDX-License-Identifier: Apache-2.0
"""Worker processes, as the event loop sees them.

Grows with the work, and shrinks to nothing when there is none. A worker whose answer
does not come is left alone, never killed: it may be holding a QEMU, and ends by itself
when it can.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import logging
import os
import socket
from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt.agent import frames
from kvmi_libvirt.agent.jobs import SLOW_RETRY_S, Outcome
from kvmi_libvirt.agent.tracing import reach

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

IDLE_S: Final = 5.0
"""After this long without work a worker is let go."""

JOB_S: Final = 45.0
"""For one job: a handshake of at most 30 s, and visits to QEMU."""

LOST: Final = frozenset({"NoWorker", "WorkerDied", "WorkerTimeout"})
"""Kinds of failure after which nobody knows what a job did."""


class Lane(enum.Enum):
    """What a job waits behind."""

    URGENT = enum.auto()
    """libvirt waits for it: only behind others like it."""
    START = enum.auto()
    """Lasts as long as the start of a VM."""
    CHANGE = enum.auto()
    """For a VM with a tool: not behind those that call one."""
    CALL = enum.auto()
    """May call a tool, which answers when it likes."""


_MAX_OF: Final = {Lane.URGENT: 96, Lane.START: 96, Lane.CHANGE: 16, Lane.CALL: 16}


class Pool:
    """Runs jobs in worker processes.

    Parameters
        zygote  the socket of :func:`agent.zygote.start`; borrowed
    """

    def __init__(self, zygote: socket.socket) -> None:
        """No worker is there yet."""
        self._zygote = zygote
        zygote.setblocking(False)
        self._idle: list[_Worker] = []
        self._lanes = {lane: asyncio.Semaphore(count) for lane, count in _MAX_OF.items()}
        self._reaper: asyncio.TimerHandle | None = None
        self.running = 0

    async def run(
        self,
        job: str,
        argument: dict[str, str],
        xml: bytes,
        *,
        timeout_s: float,
        lane: Lane,
        on_sent: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Return what became of a job; its failure, too, is an outcome.

        Parameters
            timeout_s  for the answer; the job may go on when nobody waits any more
            lane       what it waits behind
            on_sent    called when a worker has the job, and will do it even without us
        """
        async with self._lanes[lane]:
            self.running += 1
            try:
                return await self._run(job, argument, xml, timeout_s, on_sent)
            finally:
                self.running -= 1

    async def _run(
        self,
        job: str,
        argument: dict[str, str],
        xml: bytes,
        timeout_s: float,
        on_sent: Callable[[], None],
    ) -> Outcome:
        frame = frames.encode({"job": job, "argument": argument}, xml)
        try:
            worker = self._idle.pop() if self._idle else self._new_worker()
        except OSError as error:
            return _lost(f"no worker process: {error.strerror}", "NoWorker")
        try:
            answer = await asyncio.wait_for(worker.call(frame, on_sent), timeout_s)
        except asyncio.TimeoutError:
            worker.close()
            return _lost(
                f"no result within {timeout_s:g} s: QEMU's main thread does not come back "
                "from the kernel; a worker process waits to restore it",
                "WorkerTimeout",
            )
        except (OSError, EOFError, ValueError):
            worker.close()
            return _lost("the worker process ended without a result", "WorkerDied")
        except asyncio.CancelledError:
            worker.close()
            raise
        self._idle.append(worker)
        self._reap_later()
        return answer

    def _new_worker(self) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                frames.send(self._zygote, b"w", theirs.fileno())
        except OSError:
            ours.close()
            raise
        return _Worker(ours)

    def _reap_later(self) -> None:
        if self._reaper is None:
            self._reaper = asyncio.get_running_loop().call_later(IDLE_S, self._reap)

    def _reap(self) -> None:
        self._reaper = None
        for worker in self._idle:
            worker.close()
        self._idle.clear()

    def close(self) -> None:
        """Let the idle workers go; busy ones end with their job."""
        if self._reaper is not None:
            self._reaper.cancel()
        self._reap()


class _Worker:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)

    async def call(self, frame: bytes, on_sent: Callable[[], None]) -> Outcome:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, frame)
        reach("job-sent")
        on_sent()
        decoder = frames.Decoder()
        channel: int | None = None
        try:
            while True:
                chunk, fd = await _readable(loop, self._sock, frames.receive_some)
                channel = fd if fd is not None else channel
                if not chunk:
                    raise EOFError
                answer = decoder.feed(chunk)
                if answer is not None:
                    outcome = _outcome(answer[0])
                    outcome.channel, channel = channel, None
                    return outcome
        finally:
            if channel is not None:
                os.close(channel)

    def close(self) -> None:
        self._sock.close()


def _lost(error: str, kind: str) -> Outcome:
    return Outcome(error=error, kind=kind, retry_s=SLOW_RETRY_S)


def _outcome(fields: dict[str, Any]) -> Outcome:
    names = {field.name for field in dataclasses.fields(Outcome)}
    return Outcome(**{name: value for name, value in fields.items() if name in names})


async def _readable(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    receive: Callable[[socket.socket], tuple[bytes, int | None]],
) -> tuple[bytes, int | None]:
    # asyncio has no recvmsg, and a descriptor comes along.
    try:
        return receive(sock)
    except BlockingIOError:
        pass
    ready = loop.create_future()
    loop.add_reader(sock, ready.set_result, None)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
    return receive(sock)
