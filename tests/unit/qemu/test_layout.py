# SPDX-License-Identifier: Apache-2.0
"""The end of guest RAM, against addresses read off QEMU's own memory maps."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmi_libvirt.qemu.layout import highest_ram_end

MIB: Final = 1 << 20
GIB: Final = 1 << 30
QUICK: Final = settings(max_examples=50, deadline=None, derandomize=True)
MACHINES: Final = ("pc-q35-7.2", "q35", "pc-i440fx-7.2", "pc", "microvm", "")


@pytest.mark.parametrize(
    ("machine", "memory", "end"),
    [
        # q35: below 2.75 GiB all of it is low, from there on 2 GiB is.
        ("pc-q35-7.2", 512 * MIB, 512 * MIB),
        ("pc-q35-7.2", 2816 * MIB - 4096, 2816 * MIB - 4096),
        ("pc-q35-7.2", 2816 * MIB, 4 * GIB + 768 * MIB),
        ("pc-q35-7.2", 4 * GIB, 6 * GIB),
        ("q35", 16 * GIB, 18 * GIB),
        # i440fx: below 3.5 GiB all of it is low, from there on 3 GiB is.
        ("pc-i440fx-7.2", 512 * MIB, 512 * MIB),
        ("pc-i440fx-7.2", 3 * GIB, 3 * GIB),
        ("pc-i440fx-7.2", 3584 * MIB - 4096, 3584 * MIB - 4096),
        ("pc-i440fx-7.2", 3584 * MIB, 4 * GIB + 512 * MIB),
        ("pc", 4 * GIB, 5 * GIB),
    ],
)
def test_the_end_is_where_qemu_puts_it(machine: str, memory: int, end: int) -> None:
    assert highest_ram_end(machine, memory) == end


@QUICK
@given(machine=st.sampled_from(MACHINES), memory=st.integers(0, 1 << 42))
def test_no_ram_lies_above_the_end(machine: str, memory: int) -> None:
    end = highest_ram_end(machine, memory)

    assert end >= memory
    assert end <= memory or end > 4 * GIB - 1  # never inside the hole below 4 GiB
    assert highest_ram_end(machine, memory + 4096) > end


@QUICK
@given(memory=st.integers(0, 1 << 42))
def test_an_unknown_machine_gets_an_upper_bound(memory: int) -> None:
    known = max(highest_ram_end(machine, memory) for machine in ("q35", "pc"))

    assert highest_ram_end("s390-ccw-virtio", memory) >= known
