# SPDX-License-Identifier: Apache-2.0
"""libvirt's own AppArmor profiles in a copy, with our abstractions beside them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest
from support import require_tool

ROOT: Final = Path(__file__).resolve().parents[2]
APPARMOR: Final = ROOT / "packaging" / "apparmor"
ABSTRACTIONS: Final = sorted(path.name for path in (APPARMOR / "abstractions").iterdir())
EMULATED: Final = "kvmi-emulated-qemu"
HOOK: Final = "kvmi-libvirt-hook"
PROFILE_OF_A_VM: Final = "libvirt/libvirt-6b766d69-7465-7374-8000-6b766d692d31"

_SYSTEM: Final = Path("/etc/apparmor.d")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run *command*, whatever it ends with."""
    return subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def system_profiles(directory: Path) -> Path:
    """Return a copy, in *directory*, of the system's profiles, one of a VM among them."""
    require_tool("apparmor_parser", "apparmor")
    if not (_SYSTEM / "usr.sbin.libvirtd").exists():
        pytest.skip("no profile of libvirtd (apt-get install libvirt-daemon-system)")
    copy = directory / "apparmor.d"
    shutil.copytree(_SYSTEM, copy)
    template = (copy / "libvirt" / "TEMPLATE.qemu").read_text()
    name = Path(PROFILE_OF_A_VM).name
    (copy / PROFILE_OF_A_VM).write_text(template.replace("LIBVIRT_TEMPLATE", name))
    for abstraction in ABSTRACTIONS:
        shutil.copy(APPARMOR / "abstractions" / abstraction, copy / "abstractions")
    return copy


def include(profiles: Path, abstraction: str, local: str) -> None:
    """Do what the README says: add an include line to a local file."""
    file = profiles / "local" / local
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.write(f"include if exists <abstractions/{abstraction}>\n")


def preprocessed(profiles: Path, profile: str) -> str:
    """Return the text of *profile* with all that it includes."""
    done = run("apparmor_parser", "--preprocess", "--base", profiles, profiles / profile)
    assert done.returncode == 0, done.stderr
    return done.stdout
