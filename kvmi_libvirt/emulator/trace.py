# SPDX-License-Identifier: Apache-2.0
"""The trace file: one JSON line for each ioctl the emulator answered.

``{"t": .., "tid": .., "ioctl": .., "request": .., "args": {..}, "errno": ..}``: *t*
is seconds since the epoch, *errno* 0 is success. Lines are kept until nobody waits for
an answer, so that neither a slow disk nor their making holds QEMU up. A disk that
is full loses lines and nothing else. Imports ``abi`` and ``newtypes`` only.
"""

from __future__ import annotations

import json
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
    from collections.abc import Callable, Mapping

    from kvmi_libvirt.newtypes import Tid

_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_MODE: Final = 0o640
_KEPT_MAX: Final = 1000
_KEPT_S: Final = 0.1


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
        self._kept: list[tuple[float, Callable[[], Mapping[str, object]]]] = []

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """Return the file's fd (borrowed), or -1 when none is open."""
        return self._fd

    def close(self) -> None:
        """Write what is kept and close the file. Idempotent."""
        self.flush()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lazy_path = None

    def ioctl(
        self,
        tid: Tid,
        name: str,
        request: int,
        args: Callable[[], Mapping[str, object]],
        *,
        errno: int,
        ret: int | None = None,
    ) -> None:
        """Keep the line of one ioctl; *args* is called when it is written."""

        def fields() -> Mapping[str, object]:
            line = {"tid": tid, "ioctl": name, "request": hex(request), "args": args()}
            return {**line, "errno": errno, **({} if ret is None else {"ret": ret})}

        self._keep(fields)

    def failure(self, text: str) -> None:
        """Keep a line that says what went wrong inside the emulator."""
        self._keep(lambda: {"error": text})

    @property
    def has_kept(self) -> bool:
        """Say whether there is anything to write."""
        return bool(self._kept)

    @property
    def is_overdue(self) -> bool:
        """Say whether lines have been kept for too long, or too many, and somebody should wait."""
        if not self._kept:
            return False
        return len(self._kept) >= _KEPT_MAX or time.time() > self._kept[0][0] + _KEPT_S

    def flush(self) -> None:
        """Write what is kept."""
        if not self._kept:
            return
        kept, self._kept = self._kept, []
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
        lines = [json.dumps({"t": round(at, 6), **fields()}) + "\n" for at, fields in kept]
        try:
            os.write(self._fd, "".join(lines).encode())
        except OSError:
            pass

    def _keep(self, fields: Callable[[], Mapping[str, object]]) -> None:
        if self._fd >= 0 or self._lazy_path is not None:
            self._kept.append((time.time(), fields))


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
