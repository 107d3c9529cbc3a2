# SPDX-License-Identifier: Apache-2.0
"""The trace file: one JSON line for each ioctl the emulator answered.

``{"t": .., "tid": .., "ioctl": .., "request": .., "args": {..}, "errno": ..}``: *t*
is seconds since the epoch, *errno* 0 is success. The line is written after the
answer, so that a slow disk never holds QEMU up; each is one write(2). A disk that
is full loses lines and nothing else. Imports ``abi`` and ``newtypes`` only.
"""

from __future__ import annotations

import os
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi.kvmi import (
    Ioctl,
    kvm_introspection_feature,
    kvm_introspection_hook,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmi_libvirt.newtypes import Tid

_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_MODE: Final = 0o640


class Trace:
    """Owner of the trace file. Use it with ``with`` or close it.

    Parameters
        path  None for no trace
        lazy  create the file with the first line, from nothing, and do without it
              where that is not permitted; otherwise open it now and append
    Raises
        OSError  the file cannot be opened; never with *lazy*.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, lazy: bool = False) -> None:
        self._lazy_path = path if lazy else None
        self._fd = os.open(path, _FLAGS, _MODE) if path is not None and not lazy else -1

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """Return the file's fd (borrowed), or -1 when none is open."""
        return self._fd

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lazy_path = None

    def ioctl(
        self,
        tid: Tid,
        name: str,
        request: int,
        args: Mapping[str, object],
        *,
        errno: int,
        extra: Mapping[str, object],
    ) -> None:
        """Write the line of one ioctl; *extra* fields come last."""
        self._write(
            {
                "tid": tid,
                "ioctl": name,
                "request": hex(request),
                "args": args,
                "errno": errno,
                **extra,
            }
        )

    def failure(self, text: str) -> None:
        """Write a line that says what went wrong inside the emulator."""
        self._write({"error": text})

    def _write(self, fields: Mapping[str, object]) -> None:
        if self._lazy_path is not None:
            try:
                # Left by an older process of the same number: not ours to add to.
                flags = _FLAGS | os.O_TRUNC | os.O_NOFOLLOW
                self._fd = os.open(self._lazy_path, flags, _MODE)
            except OSError:
                pass
            self._lazy_path = None
        if self._fd < 0:
            return
        import json  # here: nothing of a start waits for it

        line = json.dumps({"t": round(time.time(), 6), **fields}) + "\n"
        try:
            os.write(self._fd, line.encode())
        except OSError:
            pass


def traced_args(ioctl: Ioctl, argument: bytes | None, address: int) -> dict[str, object]:
    """Return the *args* of a line: what the caller passed, decoded.

    Parameters
        argument  the structure, or None when it could not be read
        address   what the caller gave as its address
    """
    if ioctl in (Ioctl.UNHOOK, Ioctl.PREUNHOOK):
        return {}
    if argument is None:
        return {"pointer": hex(address)}
    if ioctl is Ioctl.HOOK:
        hook = kvm_introspection_hook.from_buffer_copy(argument)
        return {"fd": hook.fd, "padding": hook.padding, "uuid": _uuid_text(bytes(hook.uuid))}
    feature = kvm_introspection_feature.from_buffer_copy(argument)
    return {"allow": feature.allow, "id": feature.id}


def _uuid_text(raw: bytes) -> str:
    digits = raw.hex()
    cuts = (0, 8, 12, 16, 20, 32)
    return "-".join(digits[start:end] for start, end in pairwise(cuts))
