# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor, spoken to a server that behaves, and to ones that do not."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.errors import TargetUnsuitable
from kvmi_libvirt.qmp import Monitor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
OK = b'{"return": {}}\r\n'


@contextlib.contextmanager
def served(path: Path, *answers: bytes) -> Iterator[list[bytes]]:
    """Have a server that says *answers*, the first unasked; yield what it was asked."""
    asked: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock, sock.makefile("rb") as lines:
                for answer in answers:
                    sock.sendall(answer)
                    asked.append(lines.readline())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            thread.join(timeout=10)
            assert not thread.is_alive()


def soon() -> float:
    return time.monotonic() + 10


def test_commands_are_answered_and_events_are_passed_over(tmp_path: Path) -> None:
    event = b'{"event": "RESUME", "timestamp": {}}\r\n'
    status = event + b'{"return": {"status": "prelaunch"}}\r\n'
    path = tmp_path / "qmp"
    with (
        served(path, GREETING, OK, status, event + OK) as asked,
        Monitor(path, deadline=soon()) as monitor,
    ):
        assert monitor.status() == "prelaunch"
        assert monitor.execute("migrate", uri="unix:/x") == {}
    assert [json.loads(line) for line in asked if line] == [
        {"execute": "qmp_capabilities"},
        {"execute": "query-status"},
        {"execute": "migrate", "arguments": {"uri": "unix:/x"}},
    ]


def test_a_refusal_is_told_in_qemus_words(tmp_path: Path) -> None:
    refusal = b'{"error": {"class": "GenericError", "desc": "no way"}}\r\n'
    path = tmp_path / "qmp"
    with (
        served(path, GREETING, OK, refusal),
        Monitor(path, deadline=soon()) as monitor,
        pytest.raises(TargetUnsuitable, match=r"qmp: cont: no way$"),
    ):
        monitor.execute("cont")


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [
        (b"SSH-2.0-x\n", "no monitor"),
        (b"[]\n", "no monitor"),
        (b"{}\n", "no monitor"),
        (b"[" * 100_000 + b"\n", "no monitor"),
    ],
)
def test_who_is_no_monitor_is_refused(tmp_path: Path, greeting: bytes, expected: str) -> None:
    with served(tmp_path / "qmp", greeting), pytest.raises(TargetUnsuitable, match=expected):
        Monitor(tmp_path / "qmp", deadline=soon())


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()

        def flood() -> None:
            with listener.accept()[0] as sock, contextlib.suppress(OSError):
                while True:
                    sock.sendall(b"x" * 65536)

        thread = threading.Thread(target=flood)
        thread.start()
        with pytest.raises(TargetUnsuitable, match="no monitor"):
            Monitor(tmp_path / "qmp", deadline=soon())
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TargetUnsuitable, match="No such file or directory"):
        Monitor(tmp_path / "qmp", deadline=soon())


def test_a_monitor_that_is_taken_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    # As QEMU listens: one client is served, a few may queue.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(0)
        with pytest.raises(TargetUnsuitable, match="no answer in time"):
            Monitor(tmp_path / "qmp", deadline=time.monotonic() + 0.05)
        # The queue is full now: even connecting must end.
        with pytest.raises(TargetUnsuitable):
            Monitor(tmp_path / "qmp", deadline=time.monotonic() + 0.05)
