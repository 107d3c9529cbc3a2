# SPDX-License-Identifier: Apache-2.0
"""The agent's log: the journal's native protocol, and plain lines where there is none."""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from kvmi_libvirt.agent import logs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Return the root logger; as it was, afterwards."""
    logger = logging.getLogger()
    handlers, level, raises = list(logger.handlers), logger.level, logging.raiseExceptions
    yield logger
    for handler in logger.handlers:
        if handler not in handlers:
            handler.close()
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logging.raiseExceptions = raises


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "journal"))
        sock.settimeout(10)
        yield sock


@pytest.fixture
def stderr_is_the_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")


def fields(datagram: bytes) -> dict[str, str]:
    """Return the fields of a datagram, read as the protocol's description says."""
    found = {}
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        if b"=" in line:
            key, _, value = line.partition(b"=")
        else:
            key, length = line, int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        assert key.decode() not in found
        found[key.decode()] = value.decode()
        datagram = rest
    return found


def record(text: str, level: int = logging.INFO, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("x", level, "x.py", 1, text, (), None, "some_function")
    made.__dict__.update(more)
    return made


def handler(journal: socket.socket) -> logs.JournalHandler:
    made = logs.JournalHandler(journal.getsockname())
    made.setFormatter(logging.Formatter("%(message)s"))
    return made


def test_a_line_is_one_datagram_with_its_fields(journal: socket.socket) -> None:
    sender = handler(journal)
    sender.emit(record("domain web1: hooked", domain="web1", uuid="1-2", event="hooked"))
    assert fields(journal.recv(1 << 17)) == {
        "MESSAGE": "domain web1: hooked",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "kvmi-libvirt-agent",
        "CODE_FUNC": "some_function",
        "KVMI_LIBVIRT_DOMAIN": "web1",
        "KVMI_LIBVIRT_UUID": "1-2",
        "KVMI_LIBVIRT_EVENT": "hooked",
    }
    sender.close()


def test_several_lines_are_one_message(journal: socket.socket) -> None:
    sender = handler(journal)
    sender.emit(record("first\nPRIORITY=0\nlast", logging.ERROR, domain="a\nMESSAGE=forged"))
    found = fields(journal.recv(1 << 17))
    assert found["MESSAGE"] == "first\nPRIORITY=0\nlast"
    assert found["PRIORITY"] == "3"
    assert found["KVMI_LIBVIRT_DOMAIN"] == "a\nMESSAGE=forged"
    sender.close()


def test_a_traceback_goes_along(journal: socket.socket) -> None:
    sender = handler(journal)
    try:
        raise OSError("broken")
    except OSError:
        made = record("failed", logging.ERROR)
        made.exc_info = sys.exc_info()
    sender.emit(made)
    message = fields(journal.recv(1 << 17))["MESSAGE"]
    assert message.startswith("failed\nTraceback ")
    assert message.endswith("OSError: broken")
    sender.close()


@settings(max_examples=50)
@given(hs.text(), hs.text())
def test_whatever_is_said_comes_out(text: str, domain: str) -> None:
    # A pair instead of a path: the datagrams are the same.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        sender = logs.JournalHandler.__new__(logs.JournalHandler)
        logging.Handler.__init__(sender)
        sender._sock = ours
        sender.setFormatter(logging.Formatter("%(message)s"))
        sender.emit(record(text.replace("%", "%%"), domain=domain))
        found = fields(theirs.recv(1 << 17))
        assert found["MESSAGE"] == text.replace("%", "%%")
        assert found.get("KVMI_LIBVIRT_DOMAIN", "") == domain
        logging.Handler.close(sender)


def test_a_journal_that_is_full_or_gone_costs_lines_and_nothing_else(
    journal: socket.socket,
) -> None:
    sender = handler(journal)
    for _ in range(10_000):
        sender.emit(record("x" * 1000))
    sender.emit(record("x" * (1 << 20)))
    journal.close()
    sender.emit(record("after the end"))
    sender.close()


def test_a_line_that_is_too_long_is_cut_and_arrives(journal: socket.socket) -> None:
    sender = handler(journal)
    sender.emit(record("x" * (1 << 20), logging.ERROR, domain="web1"))
    found = fields(journal.recv(1 << 17))
    assert 1000 < len(found["MESSAGE"]) < 1 << 16
    assert set(found["MESSAGE"]) == {"x"}
    assert found["KVMI_LIBVIRT_DOMAIN"] == "web1"
    sender.close()


def test_a_line_that_cannot_be_formatted_is_no_error_of_the_work(
    journal: socket.socket, root: logging.Logger
) -> None:
    sender = handler(journal)
    root.handlers[:] = [sender]
    logging.raiseExceptions = False
    root.setLevel(logging.INFO)
    root.warning("%d bytes", "many")
    root.warning("then")
    assert fields(journal.recv(1 << 17))["MESSAGE"] == "then"


def test_lines_of_a_job_carry_its_vm(journal: socket.socket) -> None:
    sender = handler(journal)
    with logs.job_context({"name": "web1", "uuid": "1-2", "operation": "started"}):
        sender.emit(record("in the job"))
        sender.emit(record("told otherwise", event="hooked"))
    sender.emit(record("outside"))
    found = [fields(journal.recv(1 << 17)) for _ in range(3)]
    events = [each.get("KVMI_LIBVIRT_EVENT") for each in found]
    assert events == ["started", "hooked", None]
    assert [each.get("KVMI_LIBVIRT_DOMAIN") for each in found] == ["web1", "web1", None]
    sender.close()


@pytest.mark.parametrize(
    ("level", "number"),
    [
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
        (logging.DEBUG, 7),
        (1, 7),
    ],
)
def test_levels_as_syslog_knows_them(level: int, number: int) -> None:
    assert logs.severity(level) == number


# -- where it goes -----------------------------------------------------------------------


def said(root: logging.Logger, *texts: str) -> str:
    """Let the one handler write into memory, and return what it does."""
    (found,) = root.handlers
    assert isinstance(found, logging.StreamHandler)
    found.stream = io.StringIO()
    for text in texts:
        root.warning(text, extra={"domain": "web1"})
    text = found.stream.getvalue()
    assert isinstance(text, str)
    return text


def test_without_a_journal_lines_go_to_stderr(
    root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    logs.start(logging.INFO, journal=str(tmp_path / "none"))
    assert said(root, "first\nsecond") == "warning: first\nsecond domain=web1\n"


def test_where_stderr_is_the_journals_each_line_has_its_priority(
    root: logging.Logger, tmp_path: Path, stderr_is_the_journals: None
) -> None:
    assert stderr_is_the_journals is None
    logs.start(logging.INFO, journal=str(tmp_path / "none"))
    assert said(root, "first\nsecond") == "<4>first\n<4>second domain=web1\n"


@pytest.mark.parametrize("stream", ["", "1", "1:x", "0:0", ":"])
def test_any_other_stream_has_none(
    root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    logs.start(logging.INFO, journal=str(tmp_path / "none"))
    assert said(root, "first") == "warning: first domain=web1\n"


def test_where_stderr_is_the_journals_and_it_listens_it_is_told_natively(
    root: logging.Logger,
    journal: socket.socket,
    tmp_path: Path,
    stderr_is_the_journals: None,
) -> None:
    assert stderr_is_the_journals is None
    logs.start(logging.INFO, journal=str(tmp_path / "journal"))
    root.warning("hello")
    root.debug("not this")
    assert fields(journal.recv(1 << 17))["MESSAGE"] == "hello"
    # Started anew it still has one handler.
    logs.start(logging.INFO, journal=str(tmp_path / "journal"))
    assert len(root.handlers) == 1


@pytest.mark.parametrize("lies_there", ["a file", "a dead socket"])
def test_a_journal_that_is_none_is_done_without(
    root: logging.Logger, tmp_path: Path, stderr_is_the_journals: None, lies_there: str
) -> None:
    assert stderr_is_the_journals is None
    path = tmp_path / "journal"
    if lies_there == "a file":
        path.touch()
    else:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(path))
    logs.start(logging.INFO, journal=str(path))
    assert said(root, "first") == "<4>first domain=web1\n"
