# SPDX-License-Identifier: Apache-2.0
"""Which VMs run: listed when the agent starts, and looked at again when something is said of one.

Owns what is being asked of libvirt, or of its status files. What comes out goes to the
keeper: a VM to look at, or one to forget.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final, Protocol

from kvmi_libvirt import introspect
from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from kvmi_libvirt.agent.domains import Domains
    from kvmi_libvirt.agent.records import Records
    from kvmi_libvirt.agent.vm import Vm
    from kvmi_libvirt.agent.vms import Vms
    from kvmi_libvirt.libvirtio import RunningDomain

logger = logging.getLogger(__name__)

_AGAIN_S: Final = 5.0


class Interest(Protocol):
    """Who wants to know which VMs run."""

    def seen(self, vm: Vm, *, is_changed: bool) -> None:
        """A VM runs; its XML was changed, or something else was."""

    def resumed(self, vm: Vm) -> None:
        """The vCPUs of a VM run again."""

    def gone(self, vm: Vm) -> None:
        """A VM is said to have ended, and its process has."""

    def listed(self, running: set[str]) -> None:
        """The VMs with these uuids run, and no others."""


class Listing:
    """Finds VMs. Lives in the event loop; a :class:`domains.Listener`.

    Parameters
        domains   where VMs are found
        vms       what is found goes there
        records   of VMs that ended while nobody looked
        interest  is told
    """

    def __init__(self, domains: Domains, vms: Vms, records: Records, interest: Interest) -> None:
        """Nothing is asked yet."""
        self._domains = domains
        self._vms = vms
        self._records = records
        self._interest = interest
        self._again: asyncio.TimerHandle | None = None
        self._listing: asyncio.Task[None] | None = None
        self._must_list = False
        self._is_closing = False
        self._fetching: set[asyncio.Task[None]] = set()  # else they may be collected

    @property
    def is_possible(self) -> bool:
        """Say whether running VMs can be asked for now."""
        return self._domains.is_there

    def start(self) -> None:
        """List all VMs, and hear of changes from then on."""
        self._domains.start(self)

    async def close(self) -> None:
        """Ask nothing any more."""
        self._is_closing = True
        if self._again is not None:
            self._again.cancel()
        tasks = [*self._fetching] + ([] if self._listing is None else [self._listing])
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    # -- what is reported ------------------------------------------------------------

    def changed(self, uuid: str) -> None:
        """Look at a domain again, its XML included."""
        self._spawn(self._fetch(uuid))

    def resumed(self, uuid: str) -> None:
        """Say that the vCPUs of a domain run again."""
        vm = self._vms.get(uuid)
        if vm is not None:
            self._interest.resumed(vm)

    def stopped(self, uuid: str) -> None:
        """Forget a domain whose process has ended."""
        vm = self._vms.get(uuid)
        if vm is not None and not vm_runs(vm):
            self._interest.gone(vm)

    def all_changed(self) -> None:
        """Look at everything."""
        self._must_list = True
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if (self._listing is None or self._listing.done()) and not self._is_closing:
            self._listing = asyncio.create_task(self._list())

    # -- asking ----------------------------------------------------------------------

    async def _list(self) -> None:
        while self._must_list and not self._is_closing:
            self._must_list = False
            try:
                running = await self._domains.running()
            except KvmiLibvirtError as error:
                self._list_again(error)
                return
            for domain in running:
                self._see(domain)
            uuids = {domain.uuid for domain in running}
            for vm in self._vms:
                if vm.uuid not in uuids and not vm_runs(vm):
                    self._interest.gone(vm)
            self._drop_dead_records(uuids)
            self._interest.listed(uuids)

    def _list_again(self, error: KvmiLibvirtError) -> None:
        # A connection that has ended is made anew, and then all is listed. If it has
        # not, nothing else would say what was missed.
        logger.warning("%s", error)
        if self._domains.is_there and self._again is None and not self._is_closing:
            self._again = asyncio.get_running_loop().call_later(_AGAIN_S, self.all_changed)

    def _drop_dead_records(self, running: set[str]) -> None:
        # Of VMs that ended while neither libvirt's hook nor we looked.
        for record in self._records.all():
            is_known = record.uuid in running or self._vms.get(record.uuid) is not None
            if not is_known and not introspect.process_runs(record):
                self._records.remove_dead(record.uuid)

    async def _fetch(self, uuid: str) -> None:
        try:
            domain = await self._domains.get(uuid)
        except KvmiLibvirtError as error:
            self._list_again(error)
            return
        if domain is not None:
            self._see(domain)
        else:
            self.stopped(uuid)

    def _see(self, domain: RunningDomain) -> None:
        vm, is_changed = self._vms.see(domain.name, domain.uuid, domain.xml)
        self._interest.seen(vm, is_changed=is_changed)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._fetching.add(task)
        task.add_done_callback(self._fetching.discard)


def vm_runs(vm: Vm) -> bool:
    """Say whether the process of *vm* runs; an event of libvirt's may come late."""
    return vm.record is not None and introspect.process_runs(vm.record)
