# SPDX-License-Identifier: Apache-2.0
"""Keep every VM's introspection as its policy says.

Events only mark a VM as due; a job then compares what is wanted with what is, and
does what is needed. So it does not matter in which order events come, whether some
are lost, or what the agent did before it was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import early, introspect
from kvmi_libvirt import state as st
from kvmi_libvirt.agent import telling
from kvmi_libvirt.agent.channels import Channels, close_channel
from kvmi_libvirt.agent.decide import Step
from kvmi_libvirt.agent.pool import LOST, Lane
from kvmi_libvirt.agent.records import Records
from kvmi_libvirt.agent.retries import Retries
from kvmi_libvirt.agent.tracing import reach
from kvmi_libvirt.agent.vm import Vm, pack
from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from kvmi_libvirt.agent.domains import Domains
    from kvmi_libvirt.agent.inotify import Directories
    from kvmi_libvirt.agent.jobs import Outcome
    from kvmi_libvirt.agent.metrics import Metrics
    from kvmi_libvirt.agent.notify import Notifier
    from kvmi_libvirt.agent.pool import Pool
    from kvmi_libvirt.agent.settings import Settings
    from kvmi_libvirt.agent.watch import Watcher
    from kvmi_libvirt.libvirtio import RunningDomain

logger = logging.getLogger(__name__)

JOB_S: Final = 45.0
"""For one job: a handshake of at most 30 s, and visits to QEMU."""

_TURN_S: Final = 10.0
_LIST_AGAIN_S: Final = 5.0
EARLY_S: Final = early.APPEAR_S + early.READY_S + JOB_S


class Keeper:
    """All VMs, and what is done about them. Lives in the event loop.

    Parameters
        settings     how the agent runs
        domains      where VMs are found
        pool         runs jobs
        watcher      of channels and processes
        directories  of our own records and of libvirt's
        sockets      directories in which tools make their sockets
        notifier     keeps channels over a restart
        metrics      counts
    """

    def __init__(
        self,
        settings: Settings,
        *,
        domains: Domains,
        pool: Pool,
        watcher: Watcher,
        directories: Directories,
        sockets: Directories,
        notifier: Notifier,
        metrics: Metrics,
    ) -> None:
        """No VM is known yet."""
        self._settings = settings
        self._domains = domains
        self._pool = pool
        self._directories = directories
        self._metrics = metrics
        self._records = Records(settings.state_dir)
        self._vms: dict[str, Vm] = {}
        self._channels = Channels(
            watcher,
            notifier,
            self._vms.values,
            sweep_s=settings.sweep_s,
            left=self._tool_left,
            ended=self._forget,
            doubt=self.look,
        )
        self._retries = Retries(sockets, self._vms.values, self.look)
        self._lister: asyncio.TimerHandle | None = None
        self._listing: asyncio.Task[None] | None = None
        self._must_list = False
        self._is_closing = False
        self._pending: set[asyncio.Task[None]] = set()  # else they may be collected

    # -- life ------------------------------------------------------------------------

    def start(self) -> None:
        """Take over the channels kept for us, and look at every VM."""
        self._channels.start()
        self._directories.watch(str(self._settings.state_dir), self._records_changed)
        self._directories.watch(str(self._settings.run_dir), self._status_changed)
        self._domains.start(self)
        reach("started")

    async def close(self) -> None:
        """Stop working; every VM stays as it is, hooked or not."""
        self._is_closing = True
        self._channels.close()
        if self._lister is not None:
            self._lister.cancel()
        tasks = [self._listing, *self._pending, *(vm.task for vm in self._vms.values())]
        for task in tasks:
            if task is not None:
                task.cancel()
        for task in tasks:
            if task is not None:
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        for vm in self._vms.values():
            self._retries.stop(vm)

    @property
    def vms(self) -> dict[str, Vm]:
        """Return all VMs by uuid."""
        return self._vms

    @property
    def sees_domains(self) -> bool:
        """Say whether running domains can be asked for now."""
        return self._domains.is_there

    @property
    def busy(self) -> int:
        """Return how many VMs are due or being worked on."""
        return sum(vm.is_due or vm.turn.locked() for vm in self._vms.values())

    def status(self) -> list[dict[str, object]]:
        """Return what is known of every VM with a record, by name."""
        found = []
        for vm in sorted(self._vms.values(), key=lambda vm: (vm.name, vm.uuid)):
            if vm.record is not None:
                fields = introspect.public_fields(vm.record)
                fields["error"] = vm.error or fields["error"]
                found.append(fields)
        return found

    def policies_changed(self) -> None:
        """Look at every VM: the host's policy may say something else now."""
        for vm in self._vms.values():
            vm.tries = 0
            self.look(vm)
        self.all_changed()

    # -- what is reported ------------------------------------------------------------

    def changed(self, uuid: str) -> None:
        """Look at a domain again, its XML included."""
        self._spawn(self._fetch(uuid))

    def resumed(self, uuid: str) -> None:
        """Try at once: a hook that failed since no vCPU ran can succeed now."""
        vm = self._vms.get(uuid)
        if vm is not None and vm.retry is not None:
            self._retries.now(vm)

    def stopped(self, uuid: str) -> None:
        """Forget a domain whose process has ended."""
        vm = self._vms.get(uuid)
        if vm is not None and not self._runs(vm):
            self._forget(vm)

    def all_changed(self) -> None:
        """Look at everything."""
        self._must_list = True
        if self._lister is not None:
            self._lister.cancel()
            self._lister = None
        if self._listing is None or self._listing.done():
            self._listing = asyncio.create_task(self._list())

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
            seen = {domain.uuid for domain in running}
            for uuid, vm in tuple(self._vms.items()):
                if uuid not in seen and not self._runs(vm):
                    self._forget(vm)
            self._drop_dead_records(seen)

    def _list_again(self, error: KvmiLibvirtError) -> None:
        # A connection that has ended is made anew, and then all is listed. If it has
        # not, nothing else would say what was missed.
        logger.warning("%s", error)
        if self._domains.is_there and self._lister is None and not self._is_closing:
            loop = asyncio.get_running_loop()
            self._lister = loop.call_later(_LIST_AGAIN_S, self.all_changed)

    def _drop_dead_records(self, running: set[str]) -> None:
        # Of VMs that ended while neither libvirt's hook nor we looked.
        for record in self._records.all():
            is_known = record.uuid in running or record.uuid in self._vms
            if not is_known and not introspect.process_runs(record):
                self._records.remove_dead(record.uuid)
        self._channels.drop_strays(running)

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
        vm = self._vms.get(domain.uuid)
        packed = pack(domain.xml)
        if vm is None:
            vm = self._vms[domain.uuid] = Vm(domain.uuid, domain.name, packed)
        elif vm.packed != packed:
            vm.packed, vm.name, vm.tries = packed, domain.name, 0
        self.look(vm)

    def _records_changed(self, _directory: str, names: frozenset[str] | None) -> None:
        if names is None:
            self.all_changed()
            return
        for name in names:
            uuid, _, suffix = name.partition(".")
            vm = self._vms.get(uuid)
            if suffix == "json" and vm is not None:
                self._record_changed(vm)

    def _record_changed(self, vm: Vm) -> None:
        # Somebody else's work, or the echo of our own: then there is nothing to do.
        if vm.turn.locked():
            return
        if self._records.differs(vm):
            self.look(vm)

    def _status_changed(self, _directory: str, names: frozenset[str] | None) -> None:
        # libvirt wrote down a change of the VM: a vCPU may have come.
        for vm in self._vms.values():
            if names is None or f"{vm.name}.xml" in names:
                self._check_vcpus(vm)

    def _check_vcpus(self, vm: Vm) -> None:
        record = vm.record
        if record is None or record.state != st.HOOKED:
            return
        with contextlib.suppress(KvmiLibvirtError, OSError):
            seen = introspect.look_at(record)
            if seen is not None and seen.error and seen.error != vm.error:
                vm.error = seen.error
                telling.tell_vcpus(vm, seen.error)

    # -- one VM ----------------------------------------------------------------------

    def look(self, vm: Vm) -> None:
        """Compare what is wanted of *vm* with what is, soon, and do what is needed."""
        vm.is_due = True
        if (vm.task is None or vm.task.done()) and not self._is_closing:
            vm.task = asyncio.create_task(self._serve(vm))

    async def _serve(self, vm: Vm) -> None:
        while vm.is_due and self._knows(vm):
            outcome = await self._reconcile(vm)
            while outcome.leaving_s is not None and vm.record is not None:
                asked = str(vm.record.socket_inode)
                await self._see_off(vm, outcome.leaving_s)
                if not self._knows(vm):
                    return
                outcome = await self._reconcile(vm, asked=asked)

    async def _reconcile(self, vm: Vm, *, asked: str = "") -> Outcome:
        async with vm.turn:
            vm.is_due = False
            self._retries.stop(vm)
            reach("looked")
            is_hooked = vm.record is not None and vm.record.state == st.HOOKED
            outcome = await self._look(vm, asked, Lane.CHANGE if is_hooked else Lane.CALL)
            if outcome.must_call:
                outcome = await self._look(vm, asked, Lane.CALL)
            reach("job-done")
            self.take(vm, outcome)
        return outcome

    async def _look(self, vm: Vm, asked: str, lane: Lane) -> Outcome:
        argument = vm.argument(asked=asked, may_call="yes" if lane is Lane.CALL else "")
        return await self._pool.run("reconcile", argument, vm.xml, timeout_s=JOB_S, lane=lane)

    async def _see_off(self, vm: Vm, seconds: int) -> None:
        # The tool was asked to let go: its channel ends when it has. Meanwhile others
        # may have work to do with the VM, so it is nobody's turn.
        reach("leaving")
        telling.tell_asked(vm, seconds)
        await self._channels.wait_closed(vm, seconds)

    def _knows(self, vm: Vm) -> bool:
        return self._vms.get(vm.uuid) is vm

    def take(self, vm: Vm, outcome: Outcome) -> None:
        """Remember what a job did, watch what is to be watched, plan what comes next."""
        if outcome.is_gone:
            close_channel(outcome)
            if not self._runs(vm):
                self._forget(vm)
            return
        before = vm.record, vm.error
        vm.take(outcome)
        self._metrics.note(outcome)
        telling.tell_outcome(vm, *before, outcome)
        if outcome.channel is not None:
            self._retries.came(vm)
        if not self._channels.watch(vm, outcome):
            self._forget(vm)
        if outcome.retry_s is not None:
            self._metrics.retry_planned()
            self._retries.plan(vm, outcome.retry_s)
        elif outcome.error is None:
            vm.tries = 0
        is_off = outcome.step == Step.UNHOOK.value or (
            outcome.step == Step.LEAVE.value and outcome.leaving_s is None
        )
        if is_off and outcome.error is None:
            vm.is_due = True  # another tool may be wanted now

    def _tool_left(self, vm: Vm) -> None:
        self._metrics.tool_left()
        record = vm.record
        if self._records.note_departure(vm) and record is not None:
            telling.tell_departure(vm, record)
        self._retries.left(vm)

    def _runs(self, vm: Vm) -> bool:
        # Its process, not what libvirt says: an event may come late.
        return vm.record is not None and introspect.process_runs(vm.record)

    def _forget(self, vm: Vm) -> None:
        self._retries.stop(vm)
        self._channels.forget(vm)
        if self._knows(vm):
            del self._vms[vm.uuid]
        if vm.record is not None and not introspect.process_runs(vm.record):
            self._records.remove_dead(vm.uuid)
        reach("forgotten")

    # -- what libvirt's hook hands over ----------------------------------------------

    async def operation(self, name: str, uuid: str, operation: str, xml: bytes) -> str | None:
        """Do what libvirt's hook asks; return the reason of a veto, or None.

        libvirt holds the domain while it waits: only a start waits for what is being
        done about the VM, and not for long.

        Raises
            KvmiLibvirtError  the hook must do it by itself
        """
        if operation == "started":
            return await self._started(name, uuid, xml)
        outcome = await self._hand_over(name, uuid, operation, xml)
        if operation == "reconnect":
            vm = self._vms.setdefault(uuid, Vm(uuid, name, b""))
            vm.packed, vm.name = pack(xml), name
            self._later(vm)
        elif operation in ("stopped", "release"):
            ended = self._vms.get(uuid)
            if ended is not None:
                ended.record = None
                self._forget(ended)
        if outcome.early:
            self._spawn(self._watch_start(name, uuid, xml))
        return outcome.veto

    async def _started(self, name: str, uuid: str, xml: bytes) -> str | None:
        vm = self._vms.get(uuid) or Vm(uuid, name, pack(xml))
        turn = vm.turn
        try:
            await asyncio.wait_for(turn.acquire(), _TURN_S)
        except asyncio.TimeoutError:
            raise KvmiLibvirtError("the agent is at work on it") from None
        try:
            outcome = await self._hand_over(name, uuid, "started", xml)
            if outcome.veto is None:
                vm = self._vms.setdefault(uuid, vm)
                vm.packed, vm.name = pack(xml), name
                self.take(vm, outcome)
                if vm.record is None or vm.record.state != st.HOOKED:
                    self._later(vm)
        finally:
            turn.release()
        return outcome.veto

    async def _hand_over(self, name: str, uuid: str, operation: str, xml: bytes) -> Outcome:
        reach("handed-over")
        argument = {"name": name, "uuid": uuid, "operation": operation}
        outcome = await self._pool.run(
            "operation", argument, xml, timeout_s=JOB_S, lane=Lane.URGENT
        )
        if outcome.kind in LOST:
            raise KvmiLibvirtError(outcome.error or "no result")
        self._metrics.operation(operation, outcome)
        return outcome

    async def _watch_start(self, name: str, uuid: str, xml: bytes) -> None:
        argument = {"name": name, "uuid": uuid}
        outcome = await self._pool.run("early", argument, xml, timeout_s=EARLY_S, lane=Lane.START)
        if outcome.record is None or outcome.channel is None:
            close_channel(outcome)
            if outcome.error is not None:
                fields = {"domain": name, "uuid": uuid}
                logger.warning("domain %s: %s", name, outcome.error, extra=fields)
            return
        self.take(self._vms.setdefault(uuid, Vm(uuid, name, pack(xml))), outcome)

    def _later(self, vm: Vm) -> None:
        # After the hook's answer: libvirt holds the domain until then.
        asyncio.get_running_loop().call_soon(self.look, vm)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
