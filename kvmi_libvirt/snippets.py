# SPDX-License-Identifier: Apache-2.0
"""Put Proxmox VE's hookscript into a storage's snippets, and take it away.

May import ``errors`` and ``datafiles``. Only ever touches our own file.
"""

from __future__ import annotations

import json
import stat
import sys
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.datafiles import data_file
from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from pathlib import Path

HOOKSCRIPT_NAME: Final = "kvmi-hookscript"

_MODE: Final = 0o755
_PYTHON_LINE: Final = b'PYTHON = ""\n'
_MARK: Final = b"kvmi_libvirt.proxmox"


def hookscript_text(python: str) -> bytes:
    """Return the hookscript, made to run the package with the interpreter *python*."""
    text = data_file(f"hooks/proxmox/{HOOKSCRIPT_NAME}").read_bytes()
    if text.count(_PYTHON_LINE) != 1:
        raise KvmiLibvirtError("the shipped hookscript has no PYTHON line")
    # JSON's string literals are Python's as well, whatever the path holds.
    return text.replace(_PYTHON_LINE, f"PYTHON = {json.dumps(python)}\n".encode())


def hookscript_is_current(directory: Path, *, python: str = sys.executable) -> bool:
    """Say whether :func:`install_hookscript` would find it in place. Raises as it does."""
    if not directory.is_dir():
        raise KvmiLibvirtError(
            f"{directory} is no directory; name that of a storage's snippets, for example "
            "/var/lib/vz/snippets"
        )
    path = directory / HOOKSCRIPT_NAME
    is_same = _present(path) == hookscript_text(python)
    return is_same and stat.S_IMODE(path.stat().st_mode) == _MODE


def install_hookscript(directory: Path, *, python: str = sys.executable) -> bool:
    """Install the hookscript into *directory*, replacing an older one of ours atomically.

    Returns
        True when the file changed, False when it was in place already
    Raises
        KvmiLibvirtError  a file of that name is not ours, and is left alone; or there
                          is no such directory
    """
    if hookscript_is_current(directory, python=python):
        return False
    path = directory / HOOKSCRIPT_NAME
    temporary = directory / f".{HOOKSCRIPT_NAME}.new"
    temporary.write_bytes(hookscript_text(python))
    temporary.chmod(_MODE)
    temporary.rename(path)
    return True


def uninstall_hookscript(directory: Path) -> bool:
    """Remove the hookscript. Returns whether it was there.

    A VM whose configuration still names it does not start then.
    """
    path = directory / HOOKSCRIPT_NAME
    if _present(path) is None:
        return False
    path.unlink()
    return True


def _present(path: Path) -> bytes | None:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    if _MARK not in text:
        raise KvmiLibvirtError(f"{path} is not ours: move it away first")
    return text
