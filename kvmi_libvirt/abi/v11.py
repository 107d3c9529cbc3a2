# SPDX-License-Identifier: Apache-2.0
"""KVMI v11 (December 2020): as v12, but for what ids 20 and 22 mean.

v11 and v12 share every ioctl number, so a probe cannot tell them apart by
itself; only the capability number does. For a kernel that leaves it in doubt
there is :data:`V11_OR_V12`, which names neither of the two ids.

Source: patches 34, 37 and 74 of 81; a running kernel with the v11 layer.
"""

import dataclasses
from typing import Final

from kvmi_libvirt.abi.kvmi import Command, Scope
from kvmi_libvirt.abi.v12 import V12

_SET_PAGE_ACCESS: Final = V12.commands_by_name["KVMI_VM_SET_PAGE_ACCESS"]
_COMMON: Final = tuple(command for command in V12.commands if command is not _SET_PAGE_ACCESS)
_MOVED: Final = (
    Command(
        id=20,
        name="KVMI_VM_GET_MAX_GFN",
        kernel_name="KVMI_VM_GET_MAX_GFN",
        scope=Scope.VM,
        meaning="one past the highest guest frame number",
    ),
    dataclasses.replace(_SET_PAGE_ACCESS, id=22),
)

V11: Final = dataclasses.replace(
    V12,
    name="v11",
    title="KVMI v11 (December 2020)",
    capability=193,
    commands=tuple(sorted((*_COMMON, *_MOVED), key=lambda command: command.id)),
)

V11_OR_V12: Final = dataclasses.replace(
    V12,
    name="v11-or-v12",
    title="KVMI v11 or v12 (the kernel does not tell which)",
    commands=_COMMON,
)
