# SPDX-License-Identifier: Apache-2.0
"""Look at what may keep us from a QEMU: capabilities, Yama, AppArmor, SELinux.

Whether AppArmor has loaded our rules is inferred from times: the kernel shows when it
took a profile last, and a rule in a file that was changed after that is not in it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from kvmi_libvirt.datafiles import data_files
from kvmi_libvirt.doctor.facts import SecurityFacts
from kvmi_libvirt.doctor.look_kernel import read_text
from kvmi_libvirt.doctor.look_libvirt import CAP_SYS_PTRACE, has_capability
from kvmi_libvirt.doctor.look_logs import refusals
from kvmi_libvirt.qemu.process import yama_scope

POLICY_MARK: Final = b"kvmi_libvirt_helper"
"""A name of our SELinux module, which is in the kernel's policy where that is loaded."""

_APPARMOR: Final = Path("/sys/module/apparmor/parameters/enabled")
_APPARMOR_FILES: Final = Path("/etc/apparmor.d")
_APPARMOR_PLACES: Final = (
    *("local/*libvirt*", "local/*virtqemud*", "local/abstractions/*"),
    *("abstractions/*.d/*", "*/*.d/*kvmi*"),
)
_APPARMOR_LOADED: Final = Path("/sys/kernel/security/apparmor/policy/profiles")
_SELINUX: Final = Path("/sys/fs/selinux")
_SELINUX_MODULES: Final = Path("/var/lib/selinux")
_DOC: Final = Path("/usr/share/doc")
_DAEMONS: Final = ("libvirtd", "virtqemud")
_OUR_MARK: Final = b"kvmi"
_COMMENT: Final = re.compile(rb"\s*#(?!include)")  # "#include" is one of AppArmor's rules
_MAX_LEN: Final = 1 << 20
_MAX_POLICY_LEN: Final = 1 << 28
_CHUNK_LEN: Final = 1 << 20


def look_at_security() -> SecurityFacts:
    """Find out what Yama, AppArmor and SELinux may forbid."""
    has_apparmor = (read_text(_APPARMOR) or "").strip() == "Y"
    selinux = _selinux_mode()
    rules = apparmor_rules(_APPARMOR_FILES)
    return SecurityFacts(
        is_root=os.geteuid() == 0,
        has_ptrace=has_capability(os.getpid(), CAP_SYS_PTRACE),
        yama=yama_scope(),
        apparmor=has_apparmor,
        apparmor_rules=tuple(map(str, rules)),
        apparmor_unloaded=_unloaded(rules) if has_apparmor else (),
        selinux=selinux,
        selinux_module=_selinux_module(_SELINUX_MODULES),
        selinux_loaded=_has_mark(_SELINUX / "policy") if selinux else None,
        hooks_unconfined=_boolean("virt_hooks_unconfined"),
        deny_ptrace=_boolean("deny_ptrace") is True,
        refusals=refusals() if has_apparmor or selinux else (),
        apparmor_readme=_readme("packaging/apparmor", _DOC / "kvmi-libvirt/apparmor.md"),
        selinux_readme=_readme("packaging/selinux", _DOC / "kvmi-libvirt-selinux/README.md"),
    )


def _readme(directory: str, packaged: Path) -> str:
    # A distribution's package has it among its documents, or in a package of its own.
    if packaged.is_file():
        return str(packaged)
    found = data_files(directory, "README.md")
    return str(found[0]) if found else f"{directory}/README.md in the source"


# -- AppArmor ------------------------------------------------------------------------------


def apparmor_rules(directory: Path = _APPARMOR_FILES) -> list[Path]:
    """Return the files of libvirt's profiles that have rules of ours.

    Administrators and packages add to the profiles in these places.
    """
    found = {path for pattern in _APPARMOR_PLACES for path in directory.glob(pattern)}
    return sorted(path for path in found if _mentions_us(path))


def _mentions_us(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            lines = file.read(_MAX_LEN).splitlines()
    except OSError:
        return False
    return any(_OUR_MARK in line for line in lines if not _COMMENT.match(line))


def loaded_at(profile: str) -> float | None:
    """Return when the kernel took a profile last, seconds since the epoch; None: it has none."""
    # Its directory is named after it, with a number behind, and without slashes.
    for found in _APPARMOR_LOADED.glob(f"*{profile.rpartition('/')[2]}.*"):
        if (read_text(found / "name") or "").strip() == profile:
            try:
                return found.stat().st_mtime
            except OSError:
                return None
    return None


def changed_since(moment: float, rules: list[Path]) -> Path | None:
    """Return a file of *rules* that was changed after *moment*, or None."""
    for path in rules:
        try:
            if path.stat().st_mtime > moment:
                return path
        except OSError:
            continue
    return None


def is_for_daemon(path: Path) -> bool:
    """Say whether rules in *path* are for the profile of a libvirt daemon, not of VMs."""
    return path.name.rpartition(".")[2] in _DAEMONS


def _unloaded(rules: list[Path]) -> tuple[tuple[str, str], ...]:
    found = []
    for path in filter(is_for_daemon, rules):
        name = path.name.rpartition(".")[2]
        for profile in (name, f"/usr/sbin/{name}"):
            moment = loaded_at(profile)
            if moment is not None and changed_since(moment, [path]) is not None:
                found.append((profile, str(path)))
    return tuple(found)


# -- SELinux -------------------------------------------------------------------------------


def _selinux_mode() -> str | None:
    enforce = read_text(_SELINUX / "enforce")
    if enforce is None:
        return None
    return "enforcing" if enforce.strip() == "1" else "permissive"


def _boolean(name: str) -> bool | None:
    # "1 1": what holds, and what would after a commit.
    text = read_text(_SELINUX / "booleans" / name)
    return None if text is None else text.startswith("1")


def _selinux_module(directory: Path) -> bool | None:
    if not _SELINUX.is_dir():
        return None
    try:
        stores = list(directory.glob("*/active/modules/*"))
    except OSError:
        return None
    if not stores or not all(os.access(store, os.R_OK | os.X_OK) for store in stores):
        return None
    return any(entry.name == "kvmi-libvirt" for store in stores for entry in store.iterdir())


def _has_mark(path: Path) -> bool | None:
    """Say whether the kernel's policy has our module, None where it cannot be read."""
    before = b""
    try:
        with open(path, "rb") as file:
            for _ in range(_MAX_POLICY_LEN // _CHUNK_LEN):
                chunk = file.read(_CHUNK_LEN)
                if POLICY_MARK in before + chunk:
                    return True
                if not chunk:
                    return False
                before = chunk[-len(POLICY_MARK) :]
    except OSError:
        pass
    return None
