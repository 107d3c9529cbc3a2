# SPDX-License-Identifier: Apache-2.0
"""Pinging an agent: one that answers, and everything that may sit in its place."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import daemons
from kvmi_libvirt.doctor import look_agent
from kvmi_libvirt.doctor.look_agent import AGENT_SOCKET, look_at_agent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Answer = Callable[[bytes], bytes | None]

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="an agent is root's")


@contextlib.contextmanager
def agent(path: Path, answer: Answer) -> Iterator[list[bytes]]:
    """Serve one client: *answer* makes an answer of its line, None says nothing at all."""
    asked: list[bytes] = []
    wake, end = socket.socketpair()

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, client.makefile("rb") as lines:
            asked.append(lines.readline())
            said = answer(asked[0])
            if said is None:
                end.recv(1)  # until the block ends
            else:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(said)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield asked
        finally:
            wake.close()
            thread.join()
            end.close()


def good(_line: bytes) -> bytes:
    return json.dumps({"version": 1, "ok": True, "pid": 4711}).encode() + b"\n"


def test_the_place_is_below_the_state_directory() -> None:
    assert str(AGENT_SOCKET) == "/run/kvmi-libvirt/agent.sock"


@root_only
def test_an_agent_that_answers(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with agent(path, good) as asked:
        found = look_at_agent(path, units=tmp_path)

    assert (found.pid, found.problem, found.is_enabled) == (4711, None, False)
    assert found.access is not None
    assert (found.access.uid, found.access.mode) == (0, 0o600)
    assert json.loads(asked[0]) == {"version": 1, "op": "ping"}


@root_only
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b'{"version": 1, "ok": false}\n', "does not answer a ping as an agent"),
        (b"[]\n", "does not answer a ping as an agent"),
        (b"nonsense\n", "agent.sock"),
        (b'{"ok": true, "pid": "x"}\n', "agent.sock"),
        (b"\xff\n", "agent.sock"),
        (b"", "it has ended"),
        (b"x" * 200_000, "too long"),
    ],
)
def test_what_answers_otherwise_is_no_agent(tmp_path: Path, answer: bytes, text: str) -> None:
    path = tmp_path / "agent.sock"
    with agent(path, lambda _line: answer):
        found = look_at_agent(path, units=tmp_path)

    assert found.pid is None
    assert text in str(found.problem)


@root_only
def test_an_agent_that_hangs_is_not_waited_for_long(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with agent(path, lambda _line: None):
        found = look_at_agent(path, units=tmp_path, timeout_s=0.2)

    assert found.pid is None
    assert "it hangs" in str(found.problem)


def test_an_agent_that_has_ended_left_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ended:
        ended.bind(str(path))

    found = look_at_agent(path, units=tmp_path)

    assert (found.pid, found.problem) == (
        None,
        f"{path} is there, but nobody listens: it has ended",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root's own socket is an agent's")
def test_a_stranger_in_its_place_is_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with agent(path, good):
        assert "not root's agent" in str(look_at_agent(path, units=tmp_path).problem)


@pytest.mark.parametrize("kind", ["wants", "requires"])
def test_an_agent_that_is_to_be_started_with_the_host(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "agent.sock"
    assert look_at_agent(path, units=tmp_path).is_enabled is False

    link = tmp_path / f"multi-user.target.{kind}" / "kvmi-libvirt-agent.service"
    link.parent.mkdir()
    (tmp_path / "unit").write_bytes(b"")
    link.symlink_to(tmp_path / "unit")

    found = look_at_agent(path, units=tmp_path)
    assert (found.is_enabled, found.access, found.problem) == (True, None, None)


@pytest.mark.parametrize("booted", [True, False])
def test_what_systemd_does_not_start_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, booted: bool
) -> None:
    link = tmp_path / "multi-user.target.wants" / "kvmi-libvirt-agent.service"
    link.parent.mkdir()
    link.write_bytes(b"")
    monkeypatch.setattr(look_agent, "_UNITS", tmp_path)
    monkeypatch.setattr(daemons, "is_booted_with_systemd", lambda: booted)

    assert look_at_agent(tmp_path / "agent.sock").is_enabled is booted
