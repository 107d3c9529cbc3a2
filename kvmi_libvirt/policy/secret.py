# SPDX-License-Identifier: Apache-2.0
"""Secrets with which a tool proves itself. Their content never leaves this module's caller.

Imports errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvmi_libvirt.errors import PolicyRefused
from kvmi_libvirt.policy.model import SECRET_PATTERN
from kvmi_libvirt.policy.trusted import ROOT, read_trusted
from kvmi_libvirt.quoting import quoted

SECRETS_DIRECTORY: Final = Path("/etc/kvmi-libvirt/secrets")
MAX_SECRET_BYTES: Final = 4096


def read_secret(name: str, *, directory: Path = SECRETS_DIRECTORY, owner: int = ROOT) -> bytes:
    """Return the raw bytes of the secret called *name*, a newline at the end included.

    Raises
        PolicyRefused  there is none, it is empty or too long, *name* could lead out of
                       the directory, or others than root can read or write it.
    """
    if not SECRET_PATTERN.fullmatch(name):
        raise PolicyRefused(f"secret {quoted(name)} is no plain file name")
    path = directory / name
    content = read_trusted(path, limit=MAX_SECRET_BYTES, owner=owner, is_private=True)
    if content is None:
        text = f"there is no such secret; make it as root, mode 0600, in {directory}"
        raise PolicyRefused(text, source=str(path))
    if not content or len(content) > MAX_SECRET_BYTES:
        text = f"has {'no' if not content else 'too many'} bytes; 1 to {MAX_SECRET_BYTES} will do"
        raise PolicyRefused(text, source=str(path))
    return content
