# SPDX-License-Identifier: Apache-2.0
"""``status`` of a VM about which only the journal of an unfinished session tells."""

from __future__ import annotations

import calendar
import contextlib
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvmi_libvirt.cli import main, status
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.state import Journal, StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UUID = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"
WAIT = "import sys; print(flush=True); sys.stdin.read()"


@contextlib.contextmanager
def guest(*arguments: str) -> Iterator[Process]:
    """Run a process that was started with *arguments*."""
    command = [sys.executable, "-c", WAIT, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        with Process(Pid(running.pid)) as process:
            yield process


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateDir:
    found = StateDir(tmp_path / "state")
    monkeypatch.setattr(status, "state_dir", lambda: found)
    return found


def journal(process: Process, *, start_ticks: int | None = None) -> Journal:
    return Journal(
        pid=process.pid,
        start_ticks=process.start_ticks if start_ticks is None else start_ticks,
        sockets_before=(),
        channel_inode=1,
        request_unhook=0,
    )


def shown(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["status", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: list[dict[str, Any]] = json.loads(out)
    return found


def test_a_vm_of_an_interrupted_session_is_listed(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with guest("-name", "guest=web1,debug-threads=on", "-uuid", UUID) as process:
        state.save_journal(UUID, journal(process))

        (found,) = shown(capsys)

    assert (found["domain"], found["uuid"], found["pid"]) == ("web1", UUID, process.pid)
    assert found["state"] == "failed"
    assert "kvmi-libvirt unhook web1" in found["error"]
    written_at = calendar.timegm(time.strptime(found["since"], "%Y-%m-%dT%H:%M:%SZ"))
    assert abs(time.time() - written_at) < 600


def test_while_a_session_is_at_work_it_is_said_to_wait(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with guest("-name", "guest=web1") as process:
        with state.locked(UUID, deadline=time.monotonic() + 5):
            state.save_journal(UUID, journal(process))
            (found,) = shown(capsys)
            assert (found["state"], found["error"]) == ("waiting", "it is being hooked right now")

        assert shown(capsys)[0]["state"] == "failed"


def test_a_vm_that_has_ended_is_not_listed(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with guest() as process:
        # The same number, but of a process that started at another time.
        state.save_journal(UUID, journal(process, start_ticks=process.start_ticks + 1))
        assert shown(capsys) == []
        state.save_journal(UUID, journal(process))
        assert len(shown(capsys)) == 1
    assert shown(capsys) == []


def test_a_damaged_journal_is_told_and_the_others_are_listed(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    other = UUID.replace("5a4a", "6b5b")
    with guest() as process:
        state.save_journal(UUID, journal(process))
        state.save_journal(other, journal(process))
        (state.path / f"{other}.journal").write_text("{", encoding="ascii")

        assert main(["status", "--json"]) == 1

    out, err = capsys.readouterr()
    assert [entry["domain"] for entry in json.loads(out)] == [UUID]  # it was given no name
    assert f"{other}.journal is damaged" in err


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["-name", "guest=web1,debug-threads=on"], "web1"),
        (["-name", "debug-threads=on,guest=web1"], "web1"),
        (["-name", "web1"], "web1"),
        (["-name", "guest=a,,b,process=x"], "a,b"),
        (["-name", "guest=with space,x=y"], "with space"),
        (["-uuid", UUID], None),
        (["-name"], None),
    ],
)
def test_the_name_is_the_one_qemu_was_given(arguments: list[str], name: str | None) -> None:
    with guest(*arguments) as process:
        assert process.guest_name() == name
