# SPDX-License-Identifier: Apache-2.0
"""Put the libvirt hook in place, and take it away. May import errors and datafiles.

Only ever touches our own file in ``qemu.d``; never ``hooks/qemu``, which belongs
to the operator or another product.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Final

from kvmi_libvirt.datafiles import data_file
from kvmi_libvirt.errors import KvmiLibvirtError

HOOK_DIR: Final = Path("/etc/libvirt/hooks/qemu.d")
HOOK_NAME: Final = "50-kvmi-libvirt"

_MODE: Final = 0o755
_PYTHON_LINE: Final = b'PYTHON = ""\n'
_MARK: Final = b"kvmi_libvirt.hook"


def hook_text(python: str) -> bytes:
    """Return the hook script, made to run the package with the interpreter *python*."""
    text = data_file(f"hooks/qemu.d/{HOOK_NAME}").read_bytes()
    if text.count(_PYTHON_LINE) != 1:
        raise KvmiLibvirtError("the shipped hook script has no PYTHON line")
    # JSON's string literals are Python's as well, whatever the path holds.
    return text.replace(_PYTHON_LINE, f"PYTHON = {json.dumps(python)}\n".encode())


def install_hook(*, hook_dir: Path = HOOK_DIR, python: str = sys.executable) -> bool:
    """Install the hook, replacing an older one of ours atomically.

    Returns
        True when the file changed, False when it was in place already
    Raises
        KvmiLibvirtError  a file of that name is not ours; it is left alone
    """
    if hook_is_current(hook_dir=hook_dir, python=python):
        return False
    path = hook_dir / HOOK_NAME
    text = hook_text(python)
    # libvirt runs any executable in qemu.d: it must never see the new file half made.
    hook_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text, mode=_MODE, scratch=hook_dir.parent)
    return True


def write_atomically(path: Path, content: bytes, *, mode: int, scratch: Path | None = None) -> None:
    """Make or replace *path* in one step, with *mode* whatever the umask is.

    Parameters
        scratch  directory of the same file system to write in; the file's own if None
    Raises
        OSError  and *path* is as it was
    """
    temporary = (scratch or path.parent) / f".{path.name}.new"
    try:
        temporary.write_bytes(content)
        temporary.chmod(mode)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def hook_is_current(*, hook_dir: Path = HOOK_DIR, python: str = sys.executable) -> bool:
    """Say whether :func:`install_hook` would find nothing to do.

    Raises
        KvmiLibvirtError  a file of that name is not ours
    """
    path = hook_dir / HOOK_NAME
    present = _read(path)
    _require_ours(path, present)
    return present == hook_text(python) and stat.S_IMODE(path.stat().st_mode) == _MODE


def uninstall_hook(*, hook_dir: Path = HOOK_DIR) -> bool:
    """Remove the hook. Returns whether it was there; running VMs stay as they are."""
    path = hook_dir / HOOK_NAME
    present = _read(path)
    if present is None:
        return False
    _require_ours(path, present)
    path.unlink()
    return True


def is_our_hook(text: bytes) -> bool:
    """Say whether *text* is a hook script of ours, of whatever version."""
    return _MARK in text


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _require_ours(path: Path, present: bytes | None) -> None:
    if present is not None and not is_our_hook(present):
        raise KvmiLibvirtError(f"{path} is not ours: move it away first")
