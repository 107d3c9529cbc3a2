# SPDX-License-Identifier: Apache-2.0
"""ioctl request numbers, computed as <asm-generic/ioctl.h> computes them.

Valid for x86-64 (and every architecture with the generic encoding).
"""

from __future__ import annotations

import ctypes
from typing import Final

_NRSHIFT: Final = 0
_TYPESHIFT: Final = 8
_SIZESHIFT: Final = 16
_DIRSHIFT: Final = 30

_NONE: Final = 0
_WRITE: Final = 1
_READ: Final = 2


def _ioc(direction: int, type_: int, nr: int, size: int) -> int:
    return direction << _DIRSHIFT | size << _SIZESHIFT | type_ << _TYPESHIFT | nr << _NRSHIFT


def io(type_: int, nr: int) -> int:
    """Return ``_IO(type, nr)``: a request without an argument structure."""
    return _ioc(_NONE, type_, nr, 0)


def iow(type_: int, nr: int, struct: type[ctypes.Structure]) -> int:
    """Return ``_IOW(type, nr, struct)``: user space writes *struct* to the kernel."""
    return _ioc(_WRITE, type_, nr, ctypes.sizeof(struct))


def ior(type_: int, nr: int, struct: type[ctypes.Structure]) -> int:
    """Return ``_IOR(type, nr, struct)``."""
    return _ioc(_READ, type_, nr, ctypes.sizeof(struct))


def iowr(type_: int, nr: int, struct: type[ctypes.Structure]) -> int:
    """Return ``_IOWR(type, nr, struct)``."""
    return _ioc(_READ | _WRITE, type_, nr, ctypes.sizeof(struct))


def nr(request: int) -> int:
    """Return the command number of *request*, without size and direction."""
    return request & 0xFF
