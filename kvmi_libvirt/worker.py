# SPDX-License-Identifier: Apache-2.0
"""Run a session in a worker process: a child of its own, or this one if it is a worker.

ptrace belongs to one OS thread, and no Python signal handler may run between
stopping QEMU and restoring it: so every session runs in a forked child with
signals blocked, a timer for its deadlines, and nothing of ours open that libvirt
waits on. The child is never killed: if QEMU's thread cannot be stopped yet, the
child stays behind, waits, and gives the registers back when it can.

May import ``errors``, ``session`` and ``qemu``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt.errors import ExitCode, KvmiLibvirtError, RestoreFailed, SessionError
from kvmi_libvirt.qemu.tracee import hold, start_deadline_timer, stop_deadline_timer
from kvmi_libvirt.session import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from kvmi_libvirt.qemu.process import Process

logger = logging.getLogger(__name__)

_BLOCKED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
_GRACE_S: Final = 3.0
_MAX_RESULT_LEN: Final = 1 << 20


_is_worker = False  # changed once, by become_worker


def become_worker() -> None:
    """Make this whole process a worker, in which :func:`run` calls sessions directly.

    For a process that serves one session after the other and never does anything else:
    single-threaded, nobody's controlling terminal, ended by nobody while it works. It
    leaves the terminal's session and blocks the signals that would end it. Whoever waits for it
    must be able to go on without its answer, since a session can outlive its deadline.
    """
    global _is_worker
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    with contextlib.suppress(PermissionError):  # a group leader: in a session of its own
        os.setsid()
    _is_worker = True


_timers = 0  # how many blocks want the deadline timer


@contextlib.contextmanager
def _deadline_timer() -> Iterator[None]:
    global _timers
    _timers += 1
    start_deadline_timer()
    try:
        yield
    finally:
        _timers -= 1
        if not _timers:
            stop_deadline_timer()


@contextlib.contextmanager
def holding(process: Process, *, deadline: float) -> Iterator[None]:
    """Keep QEMU's main thread stopped over several calls of :func:`run`, and between them.

    Only in a process that called :func:`become_worker`.

    Raises
        TargetBusy  not found parked until the deadline; nothing was touched
        TargetGone  the process ended
    """
    assert _is_worker
    with _deadline_timer(), hold(process, deadline=deadline):
        yield


def _run_here(session: Callable[[], Report]) -> Report:
    with _deadline_timer():
        answer = _encode(session)
    return _report(answer)


def run(
    session: Callable[[], Report], *, deadline: float, keep_fds: Collection[int] = ()
) -> Report:
    """Run *session* in a child and return its report.

    Call from a single-threaded process: the child is forked, not executed. In a process
    that called :func:`become_worker` there is no child.

    Parameters
        session   a call of one function of ``session``, deadline included
        deadline  the same deadline (CLOCK_MONOTONIC seconds); the answer is waited
                  for a little longer, then given up while the child lives on
        keep_fds  descriptors the session needs; all others are closed in the child

    Raises
        SessionError  with what the session raised in .kind, .applied, .left
    """
    if _is_worker:
        return _run_here(session)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        pid = os.fork()
        if pid == 0:
            _child(session, writer, {*keep_fds, writer})
    except OSError:
        os.close(reader)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(writer)
    try:
        raw = _read_result(reader, deadline + _GRACE_S)
    finally:
        os.close(reader)
    if raw is None:
        raise SessionError(
            f"QEMU's main thread does not come back from the kernel; process {pid} waits "
            "to restore it",
            kind="RemoteCallTimeout",
            is_unfinished=True,
        )
    with contextlib.suppress(ChildProcessError):  # whoever started us ignores SIGCHLD
        os.waitpid(pid, 0)
    return _decode(raw)


def _child(session: Callable[[], Report], writer: int, keep_fds: set[int]) -> None:
    # Never returns: whatever happens, no frame of the parent runs twice.
    code = 1
    try:
        os.setsid()
        log = _LogKeeper()
        close_other_fds(keep_fds)
        start_deadline_timer()
        answer = json.dumps({**_encode(session), "log": log.lines}).encode()
        with contextlib.suppress(BrokenPipeError):  # the parent may have given up
            while answer:
                answer = answer[os.write(writer, answer) :]
        code = 0
    except BaseException:
        logging.getLogger(__name__).exception("worker failed")
    finally:
        os._exit(code)


class _LogKeeper(logging.Handler):
    # Where the parent logs to is closed here: it gets the lines with the result.
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[int, str]] = []
        logging.getLogger().handlers[:] = [self]

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


def close_other_fds(keep_fds: Collection[int] = ()) -> None:
    """Close all descriptors but *keep_fds*; have nothing at 0, 1 and 2."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    previous = 2
    for fd in (*sorted(fd for fd in keep_fds if fd > 2), os.sysconf("SC_OPEN_MAX")):
        os.closerange(previous + 1, fd)
        previous = fd


def _encode(session: Callable[[], Report]) -> dict[str, Any]:
    try:
        return {"report": dataclasses.asdict(session())}
    except SessionError as error:
        failure, kind = error, error.kind
    except (KvmiLibvirtError, OSError) as error:
        code = getattr(error, "exit_code", ExitCode.FAILED)
        unfinished = isinstance(error, RestoreFailed)
        failure = SessionError(str(error), exit_code=code, is_unfinished=unfinished)
        kind = type(error).__name__
    except Exception as error:
        logger.exception("defect in a session")
        failure = SessionError(f"{type(error).__name__}: {error}", is_unfinished=True)
        kind = type(error).__name__
    return {
        "error": str(failure),
        "kind": kind,
        "applied": failure.applied,
        "left": failure.left,
        "exit_code": int(failure.exit_code),
        "is_unfinished": failure.is_unfinished,
    }


def _read_result(reader: int, deadline: float) -> bytes | None:
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    chunks: list[bytes] = []
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunk = os.read(reader, _MAX_RESULT_LEN)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
    return None


def _decode(raw: bytes) -> Report:
    try:
        answer = json.loads(raw)
    except ValueError as error:
        raise SessionError(
            "the worker process ended without a result", is_unfinished=True
        ) from error
    for level, line in answer["log"]:
        logger.log(level, "%s", line)
    return _report(answer)


def _report(answer: dict[str, Any]) -> Report:
    if "report" in answer:
        fields = answer["report"]
        return Report(**{**fields, "applied": tuple(fields["applied"])})
    raise SessionError(
        answer["error"],
        applied=tuple(answer["applied"]),
        left=tuple(answer["left"]),
        kind=answer["kind"],
        exit_code=ExitCode(answer["exit_code"]),
        is_unfinished=answer["is_unfinished"],
    )
