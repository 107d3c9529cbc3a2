# SPDX-License-Identifier: Apache-2.0
"""Where the hook's log goes, and where it must never go."""

from __future__ import annotations

import logging
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt import hooklog

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOG: Final = "hook.log"
NOBODY: Final = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raises = list(root.handlers), root.level, logging.raiseExceptions
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
            if isinstance(handler, logging.StreamHandler):
                handler.stream.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raises


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "log"
    directory.mkdir()
    return directory


def start_and_say(log_dir: Path, *, syslog_socket: str = "") -> logging.Handler:
    hooklog.start(log_dir=log_dir, syslog_socket=syslog_socket or str(log_dir / "no-socket"))
    logging.getLogger("kvmi_libvirt.hook").info("domain %s: %s", "db1", "hooked")
    return logging.getLogger().handlers[-1]


def test_without_syslog_there_is_a_private_file(log_dir: Path) -> None:
    start_and_say(log_dir)

    text = (log_dir / LOG).read_text(encoding="utf-8")
    assert text.endswith(f"kvmi-libvirt[{os.getpid()}]: INFO: domain db1: hooked\n")
    assert text.count("\n") == 1
    assert stat.S_IMODE((log_dir / LOG).stat().st_mode) == 0o600


def test_a_file_of_ours_is_appended_to(log_dir: Path) -> None:
    (log_dir / LOG).write_text("before\n", encoding="utf-8")

    start_and_say(log_dir)

    assert (log_dir / LOG).read_text(encoding="utf-8").startswith("before\n2")


def test_debug_messages_are_left_out(log_dir: Path) -> None:
    start_and_say(log_dir)
    logging.getLogger("kvmi_libvirt.qemu").debug("each call")

    assert "each call" not in (log_dir / LOG).read_text(encoding="utf-8")


def test_syslog_is_preferred(log_dir: Path) -> None:
    path = str(log_dir / "log.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(path)
        syslog.settimeout(5)
        start_and_say(log_dir, syslog_socket=path)
        record = syslog.recv(4096).rstrip(b"\0")

    assert record == f"<30>kvmi-libvirt[{os.getpid()}]: INFO: domain db1: hooked".encode()
    assert not (log_dir / LOG).exists()


@pytest.mark.parametrize(("level", "priority"), [("error", 27), ("warning", 28), ("critical", 26)])
def test_a_record_has_its_priority(log_dir: Path, level: str, priority: int) -> None:
    path = str(log_dir / "log.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(path)
        syslog.settimeout(5)
        start_and_say(log_dir, syslog_socket=path)
        syslog.recv(4096)
        getattr(logging.getLogger("kvmi_libvirt"), level)("said")

        assert syslog.recv(4096).startswith(f"<{priority}>".encode())


def test_a_symbolic_link_is_not_followed(log_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious", encoding="utf-8")
    (log_dir / LOG).symlink_to(target)

    handler = start_and_say(log_dir)

    assert isinstance(handler, logging.NullHandler)
    assert target.read_text(encoding="utf-8") == "precious"


def test_a_link_to_nothing_creates_nothing(log_dir: Path, tmp_path: Path) -> None:
    (log_dir / LOG).symlink_to(tmp_path / "new")

    start_and_say(log_dir)

    assert not (tmp_path / "new").exists()


def test_a_hard_link_is_refused(log_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious", encoding="utf-8")
    os.link(target, log_dir / LOG)

    handler = start_and_say(log_dir)

    assert isinstance(handler, logging.NullHandler)
    assert target.read_text(encoding="utf-8") == "precious"


@as_root
def test_a_file_of_another_owner_is_refused(log_dir: Path) -> None:
    (log_dir / LOG).write_text("", encoding="utf-8")
    os.chown(log_dir / LOG, NOBODY, NOBODY)

    handler = start_and_say(log_dir)

    assert isinstance(handler, logging.NullHandler)
    assert (log_dir / LOG).read_text(encoding="utf-8") == ""


@pytest.mark.parametrize("kind", ["fifo", "directory", "no-directory"])
def test_what_cannot_hold_a_log_is_no_error(log_dir: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(log_dir / LOG)  # to open it for writing would block for ever
    elif kind == "directory":
        (log_dir / LOG).mkdir()
    else:
        log_dir = log_dir / "missing"

    assert isinstance(start_and_say(log_dir), logging.NullHandler)


def test_a_fifo_with_a_reader_is_refused_too(log_dir: Path) -> None:
    os.mkfifo(log_dir / LOG)
    reader = os.open(log_dir / LOG, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert isinstance(start_and_say(log_dir), logging.NullHandler)
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)


def _redirect(handler: logging.Handler, path: str) -> None:
    assert isinstance(handler, logging.StreamHandler)
    fd = os.open(path, os.O_WRONLY)
    os.dup2(fd, handler.stream.fileno())
    os.close(fd)


def test_a_full_disk_is_not_the_vms_problem_and_nothing_is_printed(
    log_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # On stdout it could become a domain's XML, on stderr a line of virsh's error.
    handler = start_and_say(log_dir)
    _redirect(handler, "/dev/full")

    logging.getLogger("kvmi_libvirt").error("lost")
    logging.getLogger("kvmi_libvirt").error("wrong number of arguments: %s %s", "one")

    assert capfd.readouterr() == ("", "")
    _redirect(handler, os.devnull)
