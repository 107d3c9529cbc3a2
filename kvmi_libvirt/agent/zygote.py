# SPDX-License-Identifier: Apache-2.0
"""The process that the agent's workers are forked from.

A worker must be a fork of a single-threaded process, and must not load everything
anew; the daemon itself has threads and an event loop. So this is forked from the
daemon before it has any of them, and forks again whenever it is sent a socket. It
ends with the daemon, and a worker when its job is done and its socket has ended:
nobody kills a process that may be holding a QEMU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING, NoReturn

from kvmi_libvirt import linux, worker
from kvmi_libvirt.agent import frames
from kvmi_libvirt.agent.jobs import Jobs
from kvmi_libvirt.agent.logs import job_context

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmi_libvirt.agent.jobs import Places

logger = logging.getLogger(__name__)

_LEFT_TO_OTHERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def start(places: Places, *, not_theirs: Iterable[int] = ()) -> tuple[socket.socket, int]:
    """Fork the zygote; call it while this process has one thread and no event loop.

    Parameters
        not_theirs  descriptors that workers must not keep open
    Returns
        the socket on which to send it one end of a socket pair for each worker, and
        its process id
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gc.collect()
    gc.freeze()  # what is shared stays shared
    pid = os.fork()
    if pid == 0:
        for fd in not_theirs:
            with contextlib.suppress(OSError):
                os.close(fd)
        _run_child(_serve_forks, theirs, ours, places)
    theirs.close()
    return ours, pid


def _run_child(
    target: object, sock: socket.socket, other: socket.socket | None, places: Places
) -> NoReturn:
    # No frame of the parent runs twice, whatever happens.
    code = 1
    try:
        if other is not None:
            other.close()
        assert callable(target)
        target(sock, places)
        code = 0
    except BaseException:
        logger.exception("worker process failed")
    finally:
        os._exit(code)


def _serve_forks(sock: socket.socket, places: Places) -> None:
    linux.set_process_title("kvmi-workers")
    for number in _LEFT_TO_OTHERS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    while True:
        chunk, fd = frames.receive_some(sock)
        if not chunk:
            return
        if fd is None:
            continue
        with socket.socket(fileno=fd) as end:
            try:
                pid = os.fork()
            except OSError as error:
                logger.warning("no worker: %s", error)  # its socket ends, which says it
                continue
            if pid == 0:
                _run_child(_serve_jobs, end, sock, places)


def _serve_jobs(sock: socket.socket, places: Places) -> None:
    linux.set_process_title("kvmi-worker")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    worker.become_worker()
    jobs = Jobs(places)
    decoder = frames.Decoder()
    while True:
        try:
            chunk, _fd = frames.receive_some(sock)
        except ConnectionResetError:  # it ended before it read our last answer
            return
        if not chunk:
            return
        frame = decoder.feed(chunk)
        if frame is None:
            continue
        header, xml = frame
        with job_context(header["argument"]):
            outcome = jobs.run(header["job"], header["argument"], xml)
        answer = frames.encode(dataclasses.asdict(outcome))
        with contextlib.suppress(ConnectionError):  # given up waiting
            frames.send(sock, answer, outcome.channel)
        if outcome.channel is not None:
            os.close(outcome.channel)
