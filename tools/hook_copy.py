# SPDX-License-Identifier: Apache-2.0
"""libvirt's hook script with other paths: as libvirt runs it, on a host of a test's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

SCRIPT: Final = Path(__file__).resolve().parents[1] / "hooks" / "qemu.d" / "50-kvmi-libvirt"


def hook_copy(directory: Path, **constants: object) -> Path:
    """Return a copy of the hook script in *directory*, with some of its constants replaced."""
    text = SCRIPT.read_text(encoding="utf-8")
    for name, value in constants.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", text)
        assert count == 1, name
    path = directory / SCRIPT.name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path
