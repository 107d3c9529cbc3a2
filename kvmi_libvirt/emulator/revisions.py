# SPDX-License-Identifier: Apache-2.0
"""Which rules and which messages belong to which KVMI revision.

The only place that chooses by revision. Pure; imports ``abi``, ``errors`` and the
emulator's pure modules.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.faults import NO_FAULTS
from kvmi_libvirt.emulator.kernel import Kernel, KernelV7
from kvmi_libvirt.emulator.protocol import Service
from kvmi_libvirt.emulator.protocol_v7 import ServiceV7
from kvmi_libvirt.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.emulator.faults import Faults
    from kvmi_libvirt.emulator.kernel import VmState
    from kvmi_libvirt.emulator.protocol import Guest

EMULATED: Final = (V12, V11, V7)
"""The revisions whose rules are here, newest first."""

_KERNELS: Final[Mapping[str, type[Kernel]]] = MappingProxyType(
    {V12.name: Kernel, V11.name: Kernel, V7.name: KernelV7}
)
_SERVICES: Final[Mapping[str, type[Service]]] = MappingProxyType(
    {V12.name: Service, V11.name: Service, V7.name: ServiceV7}
)


def kernel_for(abi: KvmiAbi, *, faults: Faults = NO_FAULTS) -> Kernel:
    """Return the rules of *abi*; EmulatorError for a revision that is not emulated."""
    if abi.name not in _KERNELS:
        names = ", ".join(known.name for known in EMULATED)
        raise EmulatorError(f"the emulator does not know KVMI {abi.name}, only {names}")
    return _KERNELS[abi.name](abi, faults=faults)


def service_for(abi: KvmiAbi, vm: VmState, guest: Guest) -> Service:
    """Return what answers a tool's messages; KeyError for a revision that is not emulated."""
    return _SERVICES[abi.name](abi, vm, guest)
