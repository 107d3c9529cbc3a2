# SPDX-License-Identifier: Apache-2.0
"""What is recorded below /run/kvmi-libvirt about each VM.

One directory, root only. Per VM, by uuid: ``UUID.json`` (what ``status`` shows),
``UUID.journal`` (what an unfinished session may have left in QEMU),
``UUID.lock`` and ``UUID.early`` (see ``startmark``). Files are replaced atomically;
/run does not survive a boot, so nothing is synced. May import ``errors``, ``newtypes``
and ``startmark``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import tempfile
import time
import uuid as uuid_module
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from kvmi_libvirt.errors import StateError
from kvmi_libvirt.startmark import StartMark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STATE_DIR: Final = Path("/run/kvmi-libvirt")

HOOKED: Final = "hooked"
WAITING: Final = "waiting"
FAILED: Final = "failed"
UNHOOKED: Final = "unhooked"

_MAX_FILE_LEN: Final = 1 << 20
_MAX_INODE: Final = 0xFFFF_FFFF  # the kernel's socket diagnosis counts in 32 bits
_LOCK_POLL_S: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class VmState:
    """What is known of one VM's introspection.

    ``commands`` and ``events`` are the canonical names granted beyond what is
    always allowed. ``start_ticks`` (clock ticks after boot) makes ``pid`` unique.
    ``socket_inode`` is the channel's, 0 when there is none, ``network`` the inode of the
    network namespace in which it was made (0: not known). ``all_ids`` holds
    "commands" and "events" where all ids were granted, those without a name too.
    ``policy`` is the digest of the policy last acted upon, ``adjusted`` what was
    allowed and denied by hand since, ``secret`` the name of the one the tool proved
    to know, ``vcpus`` how many vCPUs there were at the hook (0: not known),
    ``unhook_s`` how many seconds a tool gets that is asked to let go. Of the ids in
    ``unsure_commands`` and ``unsure_events`` it is not known whether they are allowed:
    a session that changed them did not live to tell. ``leaving``: its tool was asked by hand
    to let go; when it has, the VM is to be unhooked and not hooked again.
    """

    domain: str
    uuid: str
    pid: int
    start_ticks: int
    abi: str | None
    mode: str
    state: str
    source: str | None
    commands: tuple[str, ...]
    events: tuple[str, ...]
    since: str
    error: str | None
    socket_inode: int
    all_ids: tuple[str, ...] = ()
    policy: str = ""
    adjusted: tuple[str, ...] = ()
    secret: str | None = None
    vcpus: int = 0
    unhook_s: int = 60
    unsure_commands: tuple[int, ...] = ()
    unsure_events: tuple[int, ...] = ()
    network: int = 0
    leaving: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """Written before a session touches QEMU, removed when it ended cleanly.

    Everything a session can leave behind can be told from what was there before:
    a socket of QEMU that is not in ``sockets_before`` and is either the channel or
    one end of a pair QEMU has with itself; and the hook itself.
    """

    pid: int
    start_ticks: int
    sockets_before: tuple[int, ...]
    channel_inode: int
    request_unhook: int


class Leftover(NamedTuple):
    """A journal that is there: of a session at work, or of one that did not end."""

    uuid: str
    journal: Journal
    since: str


_Record = TypeVar("_Record", VmState, Journal)


class StateDir:
    """The state directory; made on first write.

    Parameters
        path  normally STATE_DIR; tests use another
    """

    def __init__(self, path: Path = STATE_DIR) -> None:
        """Nothing is touched yet."""
        self.path = path

    def _file(self, uuid: str, suffix: str) -> Path:
        # The uuid comes from a document: it must not be able to name another file.
        try:
            canonical = str(uuid_module.UUID(uuid))
        except ValueError:
            raise StateError(f"not a uuid: {uuid!r}") from None
        return self.path / f"{canonical}.{suffix}"

    def _make(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"cannot make {self.path}: {error.strerror}") from error

    @contextlib.contextmanager
    def locked(self, uuid: str, *, deadline: float) -> Iterator[None]:
        """Hold the VM's lock for the block: one session at a time.

        Polls, since flock(2) has no timeout; the file goes when the VM's state does.

        Raises
            StateError  not free until *deadline* (CLOCK_MONOTONIC seconds)
        """
        self._make()
        path = self._file(uuid, "lock")
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise StateError(f"cannot open {path}: {error.strerror}") from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_same_file(fd, path):
                    break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise StateError(
                        f"another process is at work on domain {uuid}; try again"
                    ) from None
                time.sleep(_LOCK_POLL_S)
            os.close(fd)
        try:
            yield
        finally:
            os.close(fd)

    def load(self, uuid: str) -> VmState | None:
        """Return what is recorded, None for nothing. Raises StateError when damaged."""
        return self._load(self._file(uuid, "json"), VmState)

    def save(self, state: VmState) -> None:
        """Record *state*, replacing what was there, atomically."""
        self._save(self._file(state.uuid, "json"), state)

    def load_journal(self, uuid: str) -> Journal | None:
        """Return the journal an interrupted session left, None for none."""
        return self._load(self._file(uuid, "journal"), Journal)

    def save_journal(self, uuid: str, journal: Journal) -> None:
        """Record *journal*; must happen before QEMU is touched."""
        self._save(self._file(uuid, "journal"), journal)

    def clear_journal(self, uuid: str) -> None:
        """Forget the journal: nothing is left behind in QEMU."""
        self._file(uuid, "journal").unlink(missing_ok=True)

    def mark_start(self, uuid: str) -> None:
        """Note that a start is watched for hooking it early, and begins now."""
        self._make()
        StartMark.make(self._file(uuid, "early"))

    def open_start(self, uuid: str) -> StartMark | None:
        """Return the mark of the watched start of *uuid*, for the caller to close; or None."""
        return StartMark.open(self._file(uuid, "early"))

    def remove(self, uuid: str) -> None:
        """Forget everything about a VM that has ended. Hold the lock, if anyone may want it."""
        for suffix in ("early", "json", "journal", "lock"):
            self._file(uuid, suffix).unlink(missing_ok=True)

    def all(self, damaged: Callable[[StateError], None] | None = None) -> list[VmState]:
        """Return every recorded VM by name.

        *damaged* is told of files that are no record; without it they raise StateError.
        """
        try:
            files = sorted(self.path.glob("*.json"))
        except OSError as error:
            raise StateError(f"cannot read {self.path}: {error.strerror}") from error
        states = []
        for file in files:
            try:
                if (state := self._load(file, VmState)) is not None:
                    states.append(state)
            except StateError as error:
                if damaged is None:
                    raise
                damaged(error)
        return sorted(states, key=lambda state: (state.domain, state.uuid))

    def journals(self, damaged: Callable[[StateError], None]) -> list[Leftover]:
        """Return what there is of journals; *damaged* is told of files that are none."""
        found = []
        for file in sorted(self.path.glob("*.journal")):
            try:
                journal = self.load_journal(file.stem)
                written_at = file.stat().st_mtime
            except StateError as error:
                damaged(error)
            except OSError:  # its session has just ended
                pass
            else:
                if journal is not None:
                    found.append(Leftover(file.stem, journal, _text_of(written_at)))
        return found

    def is_locked(self, uuid: str) -> bool:
        """Say whether a session is at work on the VM now."""
        try:
            fd = os.open(self._file(uuid, "lock"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def _load(self, path: Path, kind: type[_Record]) -> _Record | None:
        try:
            # O_NONBLOCK: whatever lies there, opening it must not wait.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                raw = os.read(fd, _MAX_FILE_LEN)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"cannot read {path}: {error.strerror}") from error
        try:
            return decode(json.loads(raw), kind)
        except (ValueError, TypeError, RecursionError) as error:
            raise StateError(f"{path} is damaged ({error}); remove it") from error

    def _save(self, path: Path, record: VmState | Journal) -> None:
        self._make()
        try:
            fd, temporary = tempfile.mkstemp(dir=self.path, prefix=".new-")
            try:
                with open(fd, "w", encoding="utf-8") as file:
                    json.dump(dataclasses.asdict(record), file)
                os.rename(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise StateError(f"cannot write {path}: {error.strerror}") from error


def _is_same_file(fd: int, path: Path) -> bool:
    # The lock's file may have been removed between open and flock.
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def decode(value: object, kind: type[_Record]) -> _Record:
    """Return the record of which *value* are the fields, as JSON has them.

    Raises
        ValueError, TypeError  it is none.
    """
    if not isinstance(value, dict):
        raise TypeError("not an object")
    fields = {}
    for field in dataclasses.fields(kind):
        if field.name not in value:
            if field.default is not dataclasses.MISSING:
                continue  # written by an earlier version
            raise ValueError(f"no {field.name}")
        item = value[field.name]
        if isinstance(item, list):
            item = tuple(item)
        if not _fits(item, str(field.type)):
            raise TypeError(f"{field.name} is no {field.type}")
        fields[field.name] = item
    if not 0 <= fields.get("socket_inode", 0) <= _MAX_INODE:
        raise ValueError("socket_inode out of range")
    return kind(**fields)


def _fits(item: object, annotation: str) -> bool:
    kinds: dict[str, type | tuple[type, ...]] = {
        "str": str,
        "str | None": (str, type(None)),
    }
    if annotation == "int":
        return type(item) is int and 0 <= item < 1 << 63
    if annotation == "bool":
        return type(item) is bool
    if annotation in kinds:
        return isinstance(item, kinds[annotation])
    element = str if "str" in annotation else int
    return isinstance(item, tuple) and all(isinstance(entry, element) for entry in item)


def now_text() -> str:
    """Return the time as RFC 3339 in UTC, for ``since``."""
    return _text_of(time.time())


def _text_of(epoch_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch_s))
