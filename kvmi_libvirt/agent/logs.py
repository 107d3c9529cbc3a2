# SPDX-License-Identifier: Apache-2.0
"""The agent's log: structured lines to the journal, or plain ones to stderr.

Journal fields of our own begin with KVMI_LIBVIRT_: _DOMAIN, _UUID and _EVENT.
No package imports.

Source: systemd.journal-fields(7); the journal's native protocol (one datagram of
KEY=VALUE lines), described in systemd's docs/JOURNAL_NATIVE_PROTOCOL.md; sd-daemon(3)
for the <N> prefix.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import socket
import stat
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
IDENTIFIER: Final = "kvmi-libvirt-agent"
FIELDS: Final = ("domain", "uuid", "event")
_MAX_VALUE_LEN: Final = 32 << 10
"""Of a field: several must fit into one datagram, and a cut one is none for the journal."""

_context: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "kvmi_libvirt_job", default=None
)


@contextlib.contextmanager
def job_context(argument: Mapping[str, str]) -> Iterator[None]:
    """Mark every line logged in the block with the VM that *argument* names."""
    fields = {
        "domain": argument.get("name", ""),
        "uuid": argument.get("uuid", ""),
        "event": argument.get("operation", ""),
    }
    token = _context.set(fields)
    try:
        yield
    finally:
        _context.reset(token)


def start(level: int, *, journal: str = JOURNAL_SOCKET) -> None:
    """Send the root logger's lines to the journal if that is where stderr goes, else to stderr.

    Never raises: what cannot be logged must not keep a VM from its introspection.
    """
    root = logging.getLogger()
    logging.raiseExceptions = False
    for handler in tuple(root.handlers):
        root.removeHandler(handler)
        if isinstance(handler, JournalHandler):
            handler.close()
    root.setLevel(level)
    root.addHandler(_journal(journal) or _stderr())


def _fields_of(record: logging.LogRecord) -> dict[str, str]:
    found = dict(_context.get() or {})
    for name in FIELDS:
        value = getattr(record, name, None)
        if value:
            found[name] = str(value)
    return {name: value for name, value in found.items() if value}


def severity(level: int) -> int:
    """Return the syslog severity of a logging level."""
    for limit, number in (
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
    ):
        if level >= limit:
            return number
    return 7


class JournalHandler(logging.Handler):
    """Lines as datagrams of the journal's native protocol; what does not fit now is dropped."""

    def __init__(self, address: str) -> None:
        """Connect. Raises OSError when nobody listens."""
        super().__init__()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._sock.setblocking(False)
        try:
            self._sock.connect(address)
        except OSError:
            self._sock.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line."""
        try:
            self._send(record)
        except Exception:  # a defect in a message must not become one in the work
            self.handleError(record)

    def _send(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        fields = {
            "MESSAGE": text,
            "PRIORITY": str(severity(record.levelno)),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "CODE_FUNC": record.funcName or "",
            **{f"KVMI_LIBVIRT_{key.upper()}": value for key, value in _fields_of(record).items()},
        }
        datagram = b"".join(_field(key, value) for key, value in fields.items())
        with contextlib.suppress(OSError):
            self._sock.send(datagram)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
        super().close()


def _field(key: str, value: str) -> bytes:
    raw = value.encode("utf-8", "backslashreplace")[:_MAX_VALUE_LEN]
    if b"\n" not in raw:
        return key.encode() + b"=" + raw + b"\n"
    # A value of several lines carries its length instead.
    return key.encode() + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n"


class _Plain(logging.Formatter):
    def __init__(self, *, with_priority: bool) -> None:
        super().__init__("%(message)s")
        self._with_priority = with_priority

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        fields = "".join(f" {key}={value}" for key, value in _fields_of(record).items())
        if self._with_priority:
            mark = f"<{severity(record.levelno)}>"
            return "\n".join(mark + line for line in f"{text}{fields}".split("\n"))
        return f"{record.levelname.lower()}: {text}{fields}"


def _stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain(with_priority=_is_journal_stream()))
    return handler


def _is_journal_stream() -> bool:
    # systemd tells which descriptor it connected to the journal, systemd.exec(5).
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(2)
        return (found.st_dev, found.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False


def _journal(address: str) -> logging.Handler | None:
    try:
        is_there = stat.S_ISSOCK(os.stat(address).st_mode)
    except OSError:
        return None
    if not is_there or not _is_journal_stream():
        return None
    try:
        handler = JournalHandler(address)
    except OSError:
        return None
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler
