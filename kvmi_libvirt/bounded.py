# SPDX-License-Identifier: Apache-2.0
"""Ask what may never answer: in a child process that is given up after a while.

A hung libvirtd, a dead network file system or a device node can block a call for
ever, and a signal does not always end it. No package imports.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")

_END_S: Final = 1.0
_END_POLL_S: Final = 0.005
_MAX_CHUNK_LEN: Final = 1 << 16


class Unanswered(Exception):
    """No answer in time, or the child ended without one; the text says which."""


def call(ask: Callable[[], _Result], *, timeout_s: float) -> _Result:
    """Return what *ask* returns, or raise what it raises, in *timeout_s* seconds at most.

    It runs in a forked child, so nothing it changes is seen here; its result must be
    picklable. Call from a single-threaded process. A child that does not answer is
    killed; where even that has no effect at once it is left to end by itself.

    Raises
        Unanswered  see there
        Exception   what *ask* raised; where that cannot be carried over, Unanswered
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(ask, writer)
    os.close(writer)
    try:
        raw = _read(reader, time.monotonic() + timeout_s)
    finally:
        os.close(reader)
        _end(pid)
    if raw is None:
        raise Unanswered(f"no answer within {timeout_s:g} s")
    try:
        # From our own child, through a pipe nobody else has.
        is_result, value = pickle.loads(raw)  # noqa: S301
    except (pickle.UnpicklingError, EOFError) as error:
        raise Unanswered("the process that asked has ended without an answer") from error
    if not is_result:
        raise value
    result: _Result = value
    return result


def _child(ask: Callable[[], object], writer: int) -> None:
    # Never returns: whatever happens, no frame of the parent runs twice.
    try:
        os.setsid()
        try:
            answer = _pickled(is_result=True, value=ask())
        except Exception as error:
            answer = _pickled(is_result=False, value=error)
        while answer:
            answer = answer[os.write(writer, answer) :]
    finally:
        os._exit(0)


def _pickled(*, is_result: bool, value: object) -> bytes:
    try:
        raw = pickle.dumps((is_result, value))
        pickle.loads(raw)  # noqa: S301 - some exceptions can be written but not read
    except Exception:
        return pickle.dumps((False, Unanswered(f"{type(value).__name__}: {value}")))
    return raw


def _read(reader: int, deadline: float) -> bytes | None:
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    chunks: list[bytes] = []
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunk = os.read(reader, _MAX_CHUNK_LEN)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
    return None


def _end(pid: int) -> None:
    # Its children too: it is in a session, and so a process group, of its own.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _END_S
    with contextlib.suppress(ChildProcessError):  # whoever started us ignores SIGCHLD
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(_END_POLL_S)
