# SPDX-License-Identifier: Apache-2.0
"""The VMs that the agent knows, by uuid and by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt.agent.vm import Vm, pack

if TYPE_CHECKING:
    from collections.abc import Iterator


class Vms:
    """All VMs. Whoever waited must ask whether one is still :meth:`known`."""

    def __init__(self) -> None:
        """None is known yet."""
        self._by_uuid: dict[str, Vm] = {}
        self._by_name: dict[str, Vm] = {}

    def __len__(self) -> int:
        """Return how many are known."""
        return len(self._by_uuid)

    def __iter__(self) -> Iterator[Vm]:
        """Go through a copy: VMs may come and go meanwhile."""
        return iter(tuple(self._by_uuid.values()))

    def get(self, uuid: str) -> Vm | None:
        """Return the VM of that uuid, or None."""
        return self._by_uuid.get(uuid)

    def named(self, name: str) -> Vm | None:
        """Return the VM of that name, or None."""
        return self._by_name.get(name)

    def known(self, vm: Vm) -> bool:
        """Say whether *vm* was not forgotten meanwhile."""
        return self._by_uuid.get(vm.uuid) is vm

    def see(self, name: str, uuid: str, xml: bytes) -> tuple[Vm, bool]:
        """Return the VM of that uuid, made if need be, as it is now.

        Returns
            also whether its XML is another than before
        """
        packed = pack(xml)
        vm = self._by_uuid.get(uuid)
        if vm is None:
            vm = self._by_uuid[uuid] = Vm(uuid, name, packed)
            self._by_name[name] = vm
            return vm, True
        if vm.name != name:
            self._unname(vm)
            vm.name = name
        self._by_name[name] = vm
        is_new = vm.packed != packed
        vm.packed = packed
        return vm, is_new

    def forget(self, vm: Vm) -> None:
        """Know *vm* no more; nothing if another is known by its uuid."""
        if self.known(vm):
            del self._by_uuid[vm.uuid]
            self._unname(vm)

    def _unname(self, vm: Vm) -> None:
        if self._by_name.get(vm.name) is vm:
            del self._by_name[vm.name]
