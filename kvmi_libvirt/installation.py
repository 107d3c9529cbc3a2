# SPDX-License-Identifier: Apache-2.0
"""What ``install`` puts where, besides the hook, and how it is taken away again.

Three kinds of things: directories, which are made and left; configuration, which is
only ever made, so that nobody's edits are lost; and files that are ours. Of the latter
a note is kept of what was written: a file that is no longer that was edited, and is left
alone. May import ``errors``, ``datafiles`` and ``installer``.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.datafiles import data_file, data_files
from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.installer import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG_DIR: Final = Path("/etc/kvmi-libvirt")
LOG_DIR: Final = Path("/var/log/kvmi-libvirt")
UNIT_DIR: Final = Path("/etc/systemd/system")
AGENT_UNIT: Final = "kvmi-libvirt-agent.service"

_NOTES: Final = Path("/var/lib/kvmi-libvirt/installed.json")
_PACKAGED_COMMAND: Final = b"/usr/bin/kvmi-libvirt"
_MAX_NOTES_LEN: Final = 1 << 20


class Kind(enum.Enum):
    """What may be done to a thing that is there already."""

    DIRECTORY = "directory"
    CONFIG = "configuration"
    OURS = "file"


class Change(enum.Enum):
    """What became of a thing, as the command says it."""

    MADE = "installed {path}"
    UPDATED = "updated {path}"
    SAME = "{path} is in place already"
    KEPT = "left {path} as it is: it was edited, or is not ours"
    PACKAGED = "left out {path}: the distribution's package has it"
    REMOVED = "removed {path}"
    GONE = "{path} was not there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing to be installed.

    Parameters
        path      where, below the root directory
        vendor    where a distribution's package would have it; then it is left out
        is_volatile  below /run: made only on the running system, never in another root
    """

    path: Path
    kind: Kind
    mode: int
    content: bytes = b""
    vendor: tuple[Path, ...] = ()
    is_volatile: bool = False


def items(*, command: str, prefix: Path = Path("/usr/local")) -> list[Item]:
    """Return everything but the hook, in the order in which it is made.

    What this installation does not carry (man pages, units) is left out.

    Parameters
        command  the path of ``kvmi-libvirt``, which units are made to run
        prefix   where man pages and completion go
    """
    found = [
        _directory(CONFIG_DIR, 0o755),
        _directory(CONFIG_DIR / "secrets", 0o700),
        _directory(CONFIG_DIR / "profiles.d", 0o755),
    ]
    for name in ("host-policy.xml", "agent.conf"):
        found.append(_config(CONFIG_DIR / name, data_file(f"packaging/config/{name}")))
    found += [
        _directory(Path("/run/kvmi"), 0o755, is_volatile=True),
        _directory(Path("/run/kvmi-libvirt"), 0o700, is_volatile=True),
        _directory(LOG_DIR, 0o755),
    ]
    for source in data_files("packaging/logrotate"):
        found.append(_config(Path("/etc/logrotate.d") / source.name, source))
    for source in data_files("packaging/tmpfiles.d", "*.conf"):
        found.append(_ours(source, "/etc/tmpfiles.d", "/usr/lib/tmpfiles.d"))
    for source in data_files("packaging/systemd", "*.*"):
        if source.suffix in (".service", ".socket", ".timer", ".path"):
            places = (UNIT_DIR, "/usr/lib/systemd/system", "/lib/systemd/system")
            found.append(_ours(source, *places, command=command))
    return found + list(_documents(prefix))


def _documents(prefix: Path) -> Iterator[Item]:
    share, vendor = prefix / "share", Path("/usr/share")
    for source in data_files("packaging/man", "*.[1-8]"):
        place = Path("man") / f"man{source.suffix[1:]}"
        yield _ours(source, share / place, vendor / place, compressed=True)
    for name, directory, *others in (
        ("kvmi-libvirt", "bash-completion/completions"),
        ("_kvmi-libvirt", "zsh/site-functions", "zsh/vendor-completions"),
        ("kvmi-libvirt.fish", "fish/vendor_completions.d"),
    ):
        for source in data_files("packaging/completion", name):
            yield _ours(source, share / directory, *(vendor / o for o in (directory, *others)))


def _directory(path: Path, mode: int, *, is_volatile: bool = False) -> Item:
    return Item(path=path, kind=Kind.DIRECTORY, mode=mode, is_volatile=is_volatile)


def _config(path: Path, source: Path) -> Item:
    return Item(path=path, kind=Kind.CONFIG, mode=0o644, content=source.read_bytes())


def _ours(
    source: Path,
    directory: Path | str,
    *vendors: Path | str,
    command: str | None = None,
    compressed: bool = False,
) -> Item:
    content = source.read_bytes()
    if command is not None:
        content = content.replace(_PACKAGED_COMMAND, command.encode())
    names = [source.name, f"{source.name}.gz"] if compressed else [source.name]
    return Item(
        path=Path(directory) / source.name,
        kind=Kind.OURS,
        mode=0o644,
        content=content,
        vendor=tuple(Path(vendor) / name for vendor in vendors for name in names),
    )


class Installer:
    """Makes and removes things below a root directory.

    Parameters
        root      normally /; another for images and chroots
        dry_run   change nothing, answer as if it had been
    """

    def __init__(self, root: Path = Path("/"), *, dry_run: bool = False) -> None:
        """Nothing is touched yet."""
        self._root = root
        self._dry_run = dry_run
        self._notes = self._at(_NOTES)
        self._written = self._read_notes()

    def _at(self, path: Path) -> Path:
        return self._root / path.relative_to("/")

    @property
    def _is_elsewhere(self) -> bool:
        return self._root.resolve() != Path("/")

    def make(self, item: Item) -> Change | None:
        """Install *item*; return what became of it, None when it is not for this root.

        A file that changes is replaced in one step, so that none is ever half there.

        Raises
            OSError           the file system refuses; what was there is unchanged
            KvmiLibvirtError  something that is no such thing stands in its place
        """
        path = self._at(item.path)
        if item.is_volatile and self._is_elsewhere:
            return None
        if item.kind is Kind.DIRECTORY:
            return self._make_directory(path, item)
        if any(self._at(vendor).exists() for vendor in item.vendor):
            return Change.PACKAGED
        present = _content(path)
        if present is not None and item.kind is Kind.CONFIG:
            return Change.SAME if present == item.content else Change.KEPT
        if present == item.content:
            self._note(item.path, item.content)
            return Change.SAME
        if present is not None and not self._is_ours(item.path, present):
            return Change.KEPT
        if not self._dry_run:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, item.content, mode=item.mode)
        if item.kind is Kind.OURS:
            self._note(item.path, item.content)
        return Change.MADE if present is None else Change.UPDATED

    def _make_directory(self, path: Path, item: Item) -> Change:
        if path.is_dir():
            return Change.SAME
        if not self._dry_run:
            path.mkdir(mode=item.mode, parents=True)
            path.chmod(item.mode)  # whatever the umask is
        return Change.MADE

    def remove(self, item: Item, *, purge: bool = False) -> Change | None:
        """Take *item* away; None for what stays: directories, and configuration.

        Parameters
            purge  configuration as well, edited or not
        """
        path = self._at(item.path)
        if item.kind is Kind.DIRECTORY or (item.kind is Kind.CONFIG and not purge):
            return None
        present = _content(path)
        if present is None:
            return Change.GONE
        if item.kind is Kind.OURS and not self._is_ours(item.path, present, item.content):
            return Change.KEPT
        if not self._dry_run:
            path.unlink()
            self._written.pop(str(item.path), None)
            self._save_notes()
        return Change.REMOVED

    def purge(self) -> list[Path]:
        """Remove the directories of configuration, secrets too, and of logs, with all in them."""
        directories = map(self._at, (CONFIG_DIR, LOG_DIR))
        there = [path for path in directories if path.is_dir() and not path.is_symlink()]
        for directory in [] if self._dry_run else there:
            for path in directory.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            with contextlib.suppress(OSError):  # a mount point stays
                directory.rmdir()
        return there

    def _is_ours(self, path: Path, present: bytes, shipped: bytes | None = None) -> bool:
        return present == shipped or self._written.get(str(path)) == _digest(present)

    def _note(self, path: Path, content: bytes) -> None:
        if self._dry_run or self._written.get(str(path)) == _digest(content):
            return
        self._written[str(path)] = _digest(content)
        self._save_notes()

    def _read_notes(self) -> dict[str, str]:
        try:
            with open(self._notes, encoding="utf-8") as file:
                found = json.loads(file.read(_MAX_NOTES_LEN))
            return {str(path): str(digest) for path, digest in found.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError):
            return {}  # then every file that differs counts as edited, and stays

    def _save_notes(self) -> None:
        if not self._written:
            self._notes.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not there, or somebody else's things in it
                self._notes.parent.rmdir()
            return
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._written, indent=2, sort_keys=True) + "\n"
        write_atomically(self._notes, text.encode(), mode=0o644)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise KvmiLibvirtError(f"{path} is a directory: move it away first") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
