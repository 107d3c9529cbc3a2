# SPDX-License-Identifier: Apache-2.0
"""Which libvirt daemons run, and whether they know of hooks. Processes of our own only."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import wait_until

from kvmi_libvirt import daemons
from kvmi_libvirt.daemons import (
    Daemon,
    HookFile,
    forget,
    knows_of_hooks,
    qemu_hooks,
    reload_daemons,
    remember,
    running_daemons,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def process(tmp_path: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that the kernel knows as *name*."""
    program = tmp_path / name
    shutil.copy(Path("/bin/sleep").resolve(), program)
    # Whoever started the tests may have SIGHUP ignored, as nohup(1) does.
    command = ["env", "--default-signal=HUP", str(program), "60"]
    with subprocess.Popen(command) as running:
        comm = Path(f"/proc/{running.pid}/comm")
        wait_until(lambda: comm.read_text(encoding="ascii").strip() == name, what="it runs")
        try:
            yield running
        finally:
            running.kill()


def pidfile(tmp_path: Path, name: str, text: object) -> Path:
    path = tmp_path / "run" / f"{name}.pid"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{text}", encoding="ascii")
    return path


# -- which run ---------------------------------------------------------------------------


def test_a_running_daemon_is_found_with_its_start(tmp_path: Path) -> None:
    before = time.time()
    with process(tmp_path, "libvirtd") as running:
        after = time.time()
        path = pidfile(tmp_path, "libvirtd", f"{running.pid}\n")

        (found,) = running_daemons(pidfiles=[path], notes=tmp_path / "notes")

        assert (found.name, found.pid, found.knows) == ("libvirtd", running.pid, False)
        # The kernel counts in hundredths of a second.
        assert before - 0.1 <= found.started_at <= after + 0.1
        assert found.looked_at == found.started_at


def test_a_pidfile_that_names_another_process_is_not_believed(tmp_path: Path) -> None:
    with process(tmp_path, "innocent") as running:
        path = pidfile(tmp_path, "libvirtd", running.pid)

        assert running_daemons(pidfiles=[path], notes=tmp_path / "notes") == []
        assert reload_daemons(pidfiles=[path]) == []
        assert running.poll() is None


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "1.5", "999999999", "9" * 40])
def test_a_pidfile_without_a_process_is_passed_over(tmp_path: Path, text: str) -> None:
    path = pidfile(tmp_path, "libvirtd", text)

    assert running_daemons(pidfiles=[path], notes=tmp_path / "notes") == []
    assert reload_daemons(pidfiles=[path]) == []


def test_no_daemon_at_all(tmp_path: Path) -> None:
    missing = tmp_path / "libvirtd.pid"

    assert running_daemons(pidfiles=[missing], notes=tmp_path / "notes") == []
    assert reload_daemons(pidfiles=[missing]) == []


def test_a_running_daemon_is_told_to_look_again(tmp_path: Path) -> None:
    with process(tmp_path, "virtqemud") as running:
        path = pidfile(tmp_path, "virtqemud", running.pid)

        assert reload_daemons(pidfiles=[path]) == ["virtqemud"]
        assert running.wait(timeout=10) == -signal.SIGHUP


# -- what it knows -----------------------------------------------------------------------


def daemon(*, started_at: float = 100.0, looked_at: float = 100.0, knows: bool = False) -> Daemon:
    return Daemon(
        name="libvirtd",
        pid=1,
        start_ticks=1,
        started_at=started_at,
        looked_at=looked_at,
        knows=knows,
    )


def hook(changed_at: float, *, is_executable: bool = True) -> HookFile:
    return HookFile(path=Path("/x"), changed_at=changed_at, is_executable=is_executable)


@pytest.mark.parametrize(
    ("seen_by", "hooks", "ran_at", "expected"),
    [
        (daemon(), [hook(99.0)], None, True),
        (daemon(), [hook(100.0)], None, True),
        (daemon(), [hook(101.0)], None, False),
        (daemon(looked_at=102.0), [hook(101.0)], None, True),
        (daemon(), [hook(99.0, is_executable=False)], None, False),
        # Another's hook was there: it lists the directory anew for ours.
        (daemon(), [hook(99.0), hook(200.0)], None, True),
        (daemon(knows=True), [hook(200.0)], None, True),
        (daemon(), [hook(200.0)], 150.0, True),
        (daemon(), [hook(200.0)], 50.0, False),
        (daemon(), [], None, False),
    ],
)
def test_a_daemon_knows_of_what_was_there_when_it_looked(
    seen_by: Daemon, hooks: list[HookFile], ran_at: float | None, expected: bool
) -> None:
    assert knows_of_hooks(seen_by, hooks, ran_at=ran_at) is expected


def test_hooks_are_what_libvirt_would_run(tmp_path: Path) -> None:
    directory = tmp_path / "qemu.d"
    (directory / "vm" / "start").mkdir(parents=True)
    for name, mode in (("50-ours", 0o755), ("10-other", 0o644), ("50-ours~", 0o700)):
        (directory / name).write_bytes(b"")
        (directory / name).chmod(mode)
    (directory / "90-link").symlink_to("50-ours")
    (directory / "95-dangling").symlink_to("nowhere")
    (tmp_path / "qemu").write_bytes(b"")
    (tmp_path / "qemu").chmod(0o755)

    found = [(file.path.name, file.is_executable) for file in qemu_hooks(tmp_path)]

    assert found == [
        ("qemu", True),
        ("10-other", False),
        ("50-ours", True),
        ("50-ours~", True),
        ("90-link", True),
    ]


def test_where_there_are_no_hooks(tmp_path: Path) -> None:
    assert qemu_hooks(tmp_path / "missing") == []


# -- what is noted -----------------------------------------------------------------------


def test_what_was_noted_counts_for_that_very_process(tmp_path: Path) -> None:
    notes = tmp_path / "run" / "notes"
    with process(tmp_path, "libvirtd") as running:
        path = pidfile(tmp_path, "libvirtd", running.pid)
        remember(running_daemons(pidfiles=[path], notes=notes), notes=notes)

        (found,) = running_daemons(pidfiles=[path], notes=notes)
        assert found.knows

        # The same number, but a process that started at another time.
        notes.write_text(json.dumps([[found.pid, found.start_ticks + 1]]), encoding="ascii")
        assert not running_daemons(pidfiles=[path], notes=notes)[0].knows

        remember([found], notes=notes)
        forget(notes=notes)
        assert not running_daemons(pidfiles=[path], notes=notes)[0].knows
    forget(notes=notes)


def test_a_process_that_has_ended_is_forgotten(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with process(tmp_path, "libvirtd") as running:
        path = pidfile(tmp_path, "libvirtd", running.pid)
        remember(running_daemons(pidfiles=[path], notes=notes), notes=notes)

    remember([], notes=notes)

    assert json.loads(notes.read_text(encoding="ascii")) == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[["a", 2]]', "null", "[[1, 2, 3]]"])
def test_damaged_notes_are_as_none(tmp_path: Path, text: str) -> None:
    notes = tmp_path / "notes"
    notes.write_text(text, encoding="ascii")
    with process(tmp_path, "libvirtd") as running:
        path = pidfile(tmp_path, "libvirtd", running.pid)

        assert not running_daemons(pidfiles=[path], notes=notes)[0].knows
        remember(running_daemons(pidfiles=[path], notes=notes), notes=notes)
        assert running_daemons(pidfiles=[path], notes=notes)[0].knows


def test_notes_that_cannot_be_written_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    remember([], notes=tmp_path / "file" / "notes")


# -- systemd -----------------------------------------------------------------------------


def fake_systemctl(tmp_path: Path, patch: pytest.MonkeyPatch, answer: str) -> None:
    """Have a host managed by systemd, whose systemctl prints *answer*."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script = directory / "systemctl"
    script.write_text(f"#!/bin/sh\necho \"$@\" >'{tmp_path}/asked'\n{answer}\n", encoding="ascii")
    script.chmod(0o755)
    patch.setenv("PATH", str(directory), prepend=os.pathsep)
    patch.setattr(daemons, "_SYSTEMD", tmp_path)


def test_a_reload_by_systemd_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with process(tmp_path, "libvirtd") as running:
        path = pidfile(tmp_path, "libvirtd", running.pid)
        reloaded_at = time.time() + 50
        told = f"echo MainPID={running.pid}; echo StateChangeTimestampMonotonic="
        told += f"{round((time.monotonic() + 50) * 1e6)}"
        fake_systemctl(tmp_path, monkeypatch, told)

        (found,) = running_daemons(pidfiles=[path], notes=tmp_path / "notes")

        assert found.looked_at == pytest.approx(reloaded_at, abs=10)
        assert found.started_at < reloaded_at - 20
        asked = (tmp_path / "asked").read_text(encoding="ascii").split()
        assert asked[0] == "show"
        assert asked[-1] == "libvirtd.service"


@pytest.mark.parametrize(
    "answer",
    [
        "echo MainPID=1; echo StateChangeTimestampMonotonic=9999999999999",
        "echo MainPID=; echo StateChangeTimestampMonotonic=",
        "echo nothing",
        "exit 1",
    ],
)
def test_a_systemd_that_tells_nothing_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    fake_systemctl(tmp_path, monkeypatch, answer)
    with process(tmp_path, "libvirtd") as running:
        path = pidfile(tmp_path, "libvirtd", running.pid)

        (found,) = running_daemons(pidfiles=[path], notes=tmp_path / "notes")

        assert found.looked_at == found.started_at


def test_the_command_to_reload_is_the_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "_SYSTEMD", tmp_path / "missing")
    assert daemons.reload_command(daemon()) == "kvmi-libvirt install --reload"
    monkeypatch.setattr(daemons, "_SYSTEMD", tmp_path)
    assert daemons.reload_command(daemon()) == "systemctl reload libvirtd"
