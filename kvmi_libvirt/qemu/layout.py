# SPDX-License-Identifier: Apache-2.0
"""Where guest memory ends, computed as QEMU's x86 machine types lay it out. Pure.

The v12 handshake tells the tool the end of the highest RAM range. KVM does not
say it and the process does not show it, so it is derived from the memory size.

Source: QEMU hw/i386/pc_q35.c and pc_piix.c (split of RAM below and above 4 GiB).
"""

from __future__ import annotations

from typing import Final

_GIB: Final = 1 << 30
_FOUR_GIB: Final = 4 * _GIB
_Q35_SPLIT: Final = 0xB0000000
_Q35_LOW: Final = 0x80000000
_PC_SPLIT: Final = 0xE0000000
_PC_LOW: Final = 0xC0000000


def highest_ram_end(machine: str, memory_bytes: int) -> int:
    """Return the guest physical address just above the highest RAM range.

    Parameters
        machine       machine type as in the domain XML, such as "pc-q35-7.2"
        memory_bytes  boot memory; hot-plugged DIMMs are not counted
    Returns
        bytes; an upper bound for machine types other than q35 and i440fx
    """
    if "q35" in machine:
        split, low = _Q35_SPLIT, _Q35_LOW
    elif machine.startswith("pc"):
        split, low = _PC_SPLIT, _PC_LOW
    else:
        split, low = _Q35_LOW, _Q35_LOW
    if memory_bytes < split:
        return memory_bytes
    return _FOUR_GIB + memory_bytes - low
