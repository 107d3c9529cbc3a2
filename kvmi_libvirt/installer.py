# SPDX-License-Identifier: Apache-2.0
"""Put the hooks in place, and take them away. May import errors and datafiles.

Only ever touches our own file in ``qemu.d``; never ``hooks/qemu``, which belongs
to the operator or another product.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Final

from kvmi_libvirt.datafiles import data_file
from kvmi_libvirt.errors import KvmiLibvirtError

HOOK_DIR: Final = Path("/etc/libvirt/hooks/qemu.d")
HOOK_NAME: Final = "50-kvmi-libvirt"
HOOKSCRIPT_NAME: Final = "kvmi-hookscript"

_MODE: Final = 0o755
_PYTHON_LINE: Final = b'PYTHON = ""\n'
_MARKS: Final = (b"kvmi_libvirt.hook", b"kvmi_libvirt.proxmox")
_DAEMON_PIDFILES: Final = (Path("/run/libvirtd.pid"), Path("/run/virtqemud.pid"))


def hook_text(python: str) -> bytes:
    """Return the hook script, made to run the package with the interpreter *python*."""
    return _script_text(f"hooks/qemu.d/{HOOK_NAME}", python)


def hookscript_text(python: str) -> bytes:
    """Return Proxmox VE's hookscript, made to run the package with *python*."""
    return _script_text(f"hooks/proxmox/{HOOKSCRIPT_NAME}", python)


def _script_text(name: str, python: str) -> bytes:
    text = data_file(name).read_bytes()
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
    # libvirt runs any executable in qemu.d: the new file gets its x bits, and its
    # name, only when it is complete.
    temporary = hook_dir.parent / f".{HOOK_NAME}.new"
    return _install(hook_dir / HOOK_NAME, hook_text(python), temporary)


def install_hookscript(directory: Path, *, python: str = sys.executable) -> bool:
    """Install Proxmox VE's hookscript into *directory*, a storage's snippets, atomically.

    Returns
        True when the file changed, False when it was in place already
    Raises
        KvmiLibvirtError  a file of that name is not ours, and is left alone; or there
                          is no such directory
    """
    if not directory.is_dir():
        raise KvmiLibvirtError(
            f"{directory} is no directory; name that of a storage's snippets, for example "
            "/var/lib/vz/snippets"
        )
    temporary = directory / f".{HOOKSCRIPT_NAME}.new"
    return _install(directory / HOOKSCRIPT_NAME, hookscript_text(python), temporary)


def _install(path: Path, text: bytes, temporary: Path) -> bool:
    present = _read(path)
    if present == text and stat.S_IMODE(path.stat().st_mode) == _MODE:
        return False
    _require_ours(path, present)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(text)
    temporary.chmod(_MODE)
    temporary.rename(path)
    return True


def uninstall_hook(*, hook_dir: Path = HOOK_DIR) -> bool:
    """Remove the hook. Returns whether it was there; running VMs stay as they are."""
    return _remove(hook_dir / HOOK_NAME)


def uninstall_hookscript(directory: Path) -> bool:
    """Remove Proxmox VE's hookscript. Returns whether it was there.

    A VM whose configuration still names it does not start then.
    """
    return _remove(directory / HOOKSCRIPT_NAME)


def _remove(path: Path) -> bool:
    present = _read(path)
    if present is None:
        return False
    _require_ours(path, present)
    path.unlink()
    return True


def reload_daemons() -> list[str]:
    """Make running libvirt daemons look for hooks again; return their pidfiles' names.

    A daemon that saw no qemu hook when it started will not run one until then.
    """
    reloaded = []
    for pidfile in _DAEMON_PIDFILES:
        try:
            pid = int(pidfile.read_text(encoding="ascii"))
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError, OverflowError):
            continue
        try:
            name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
            if name == pidfile.stem:
                signal.pidfd_send_signal(pidfd, signal.SIGHUP)
                reloaded.append(name)
        except OSError:
            continue
        finally:
            os.close(pidfd)
    return reloaded


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _require_ours(path: Path, present: bytes | None) -> None:
    if present is not None and not any(mark in present for mark in _MARKS):
        raise KvmiLibvirtError(f"{path} is not ours: move it away first")
