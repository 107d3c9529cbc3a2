# SPDX-License-Identifier: Apache-2.0
"""Which machines of Proxmox VE run, from the pidfiles that their QEMUs write."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import machines
from kvmi_libvirt.errors import StateError
from kvmi_libvirt.libvirtio import RunningDomain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmi_libvirt.agent.domains import Listener
    from kvmi_libvirt.agent.inotify import Directories
    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.proxmoxfiles import Places
    from kvmi_libvirt.state import StateDir

logger = logging.getLogger(__name__)

_RECORD: Final = ".json"
_AGAIN_S: Final = 1.0


class Machines:
    """The machines of a node. They have no XML: what a job needs of one it reads itself.

    Parameters
        places       of the node
        state        the state directory
        directories  for being told of changes
    """

    def __init__(self, places: Places, state: StateDir, directories: Directories) -> None:
        """Nothing is read yet."""
        self._places = places
        self._state = state
        self._directories = directories
        self._listener: Listener | None = None
        self._found: dict[int, Domain] = {}

    @property
    def is_there(self) -> bool:
        """Say whether this is a node that has run a machine since it was booted."""
        return self._places.run.is_dir()

    def start(self, listener: Listener) -> None:
        """Begin to watch the pidfiles."""
        self._listener = listener
        if not self._directories.watch(str(self._places.run), self._changed):
            logger.warning(
                "%s: no such directory; start the agent when it is there", self._places.run
            )
        # A hookscript leaves a record: a machine cannot be missed that has introspection.
        self._directories.watch(str(self._state.path), self._records_changed)
        asyncio.get_running_loop().call_soon(listener.all_changed)

    def _records_changed(self, _directory: str, names: frozenset[str] | None) -> None:
        if names is None:
            return  # the agent hears of that as well, and asks for everything
        known = {found.uuid for found in self._found.values()}
        new = {name.removesuffix(_RECORD) for name in names if name.endswith(_RECORD)} - known
        if not new:
            return
        self._found = machines.running(self._places)
        for found in self._found.values():
            if found.uuid in new and self._listener is not None:
                self._listener.changed(found.uuid)

    def _changed(self, _directory: str, names: frozenset[str] | None) -> None:
        listener = self._listener
        if listener is None:
            return
        if names is None:
            listener.all_changed()
            return
        for vmid in filter(None, map(machines.vmid_of, names)):
            if not self._look(vmid):
                # QEMU makes its pidfile, and then writes into it.
                asyncio.get_running_loop().call_later(_AGAIN_S, self._look, vmid)

    def _look(self, vmid: int) -> bool:
        # Says whether it runs.
        before = self._found.pop(vmid, None)
        found = machines.running_domain(vmid, self._places)
        if found is not None:
            self._found[vmid] = found
        for uuid in {one.uuid for one in (before, found) if one is not None}:
            if self._listener is not None:
                self._listener.changed(uuid)
        return found is not None

    async def running(self) -> list[RunningDomain]:
        """Return all running machines."""
        self._found = machines.running(self._places)
        by_uuid: dict[str, list[Domain]] = {}
        for found in self._found.values():
            by_uuid.setdefault(found.uuid, []).append(found)
        return [self._one_of(alike) for alike in by_uuid.values()]

    async def get(self, uuid: str) -> RunningDomain | None:
        """Return one machine."""
        alike = [found for found in self._found.values() if found.uuid == uuid]
        alike = [found for found in alike if self._runs(found)]
        return self._one_of(alike) if alike else None

    def _runs(self, found: Domain) -> bool:
        return found.vmid is not None and (
            machines.running_domain(found.vmid, self._places) is not None
        )

    def _one_of(self, alike: Sequence[Domain]) -> RunningDomain:
        # Several can have one SMBIOS UUID; only the first that was hooked is known by it.
        names = [found.name for found in alike]
        name, uuid = names[0], alike[0].uuid
        if len(names) > 1:
            try:
                recorded = self._state.load(uuid)
            except StateError:
                recorded = None
            if recorded is not None and recorded.domain in names:
                name = recorded.domain
            logger.warning(
                "VMs %s have one SMBIOS UUID: only %s is looked after", ", ".join(names), name
            )
        # In place of XML, of which a change is seen: who it is.
        return RunningDomain(name=name, uuid=uuid, xml=name.encode())

    async def close(self) -> None:
        """Report nothing any more."""
        self._listener = None
