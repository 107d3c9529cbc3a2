# SPDX-License-Identifier: Apache-2.0
"""Keep every VM's introspection as its policy says.

Events only mark a VM as due; a job then compares what is wanted with what is, and
does what is needed. So it does not matter in which order events come, whether some
are lost, or what the agent did before it was killed.

The keeper decides when a VM is looked at and what follows. Beside it: ``listing`` finds
VMs, ``handover`` does what libvirt's hook asks, ``channels`` watches, ``retries`` plans,
``records`` and ``telling`` write down. Each owns its part of a :class:`vm.Vm`.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from kvmi_libvirt import introspect
from kvmi_libvirt import state as st
from kvmi_libvirt.agent import telling
from kvmi_libvirt.agent.channels import Channels, close_channel
from kvmi_libvirt.agent.decide import Step
from kvmi_libvirt.agent.handover import HandOver
from kvmi_libvirt.agent.listing import Listing, vm_runs
from kvmi_libvirt.agent.pool import JOB_S, Lane
from kvmi_libvirt.agent.records import Records
from kvmi_libvirt.agent.retries import Retries
from kvmi_libvirt.agent.tracing import reach
from kvmi_libvirt.agent.vms import Vms

if TYPE_CHECKING:
    from kvmi_libvirt.agent.domains import Domains
    from kvmi_libvirt.agent.inotify import Directories
    from kvmi_libvirt.agent.jobs import Outcome
    from kvmi_libvirt.agent.metrics import Metrics
    from kvmi_libvirt.agent.notify import Notifier
    from kvmi_libvirt.agent.pool import Pool
    from kvmi_libvirt.agent.settings import Settings
    from kvmi_libvirt.agent.vm import Vm
    from kvmi_libvirt.agent.watch import Watcher


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
        self._pool = pool
        self._directories = directories
        self._metrics = metrics
        self._is_closing = False
        self.vms = Vms()
        self._records = Records(settings.state_dir)
        self._listing = Listing(domains, self.vms, self._records, self)
        self._retries = Retries(sockets, self.vms, self.look)
        self._channels = Channels(
            watcher,
            notifier,
            self.vms,
            sweep_s=settings.sweep_s,
            left=self._tool_left,
            ended=self.gone,
            doubt=self.look,
        )
        self.hand_over = HandOver(
            pool, self.vms, metrics, take=self.take, look=self.look, forget=self.gone
        )

    # -- life ------------------------------------------------------------------------

    def start(self) -> None:
        """Take over the channels kept for us, and look at every VM."""
        self._channels.start()
        self._directories.watch(str(self._settings.state_dir), self._records_changed)
        self._directories.watch(str(self._settings.run_dir), self._status_changed)
        self._listing.start()
        reach("started")

    async def close(self) -> None:
        """Stop working; every VM stays as it is, hooked or not."""
        self._is_closing = True
        self._channels.close()
        await self._listing.close()
        await self.hand_over.close()
        tasks = [vm.task for vm in self.vms if vm.task is not None]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        for vm in self.vms:
            self._retries.stop(vm)

    @property
    def sees_domains(self) -> bool:
        """Say whether running domains can be asked for now."""
        return self._listing.is_possible

    @property
    def busy(self) -> int:
        """Return how many VMs are due or being worked on."""
        return sum(vm.is_due or vm.turn.locked() for vm in self.vms)

    def status(self) -> list[dict[str, object]]:
        """Return what is known of every VM with a record, by name.

        What is not "watched" may have lost its tool since it was last looked at.
        """
        found = []
        for vm in sorted(self.vms, key=lambda vm: (vm.name, vm.uuid)):
            if vm.record is not None:
                fields = introspect.public_fields(vm.record)
                fields["error"] = vm.error or vm.warning or fields["error"]
                fields["watched"] = vm.channel is not None
                found.append(fields)
        return found

    def policies_changed(self) -> None:
        """Look at every VM: the host's policy may say something else now."""
        for vm in self.vms:
            self._retries.begin_anew(vm)
            self.look(vm)
        self._listing.all_changed()

    # -- what is reported ------------------------------------------------------------

    def seen(self, vm: Vm, *, is_changed: bool) -> None:
        """Look at a VM that runs."""
        if is_changed:
            self._retries.begin_anew(vm)
        self.look(vm)

    def resumed(self, vm: Vm) -> None:
        """Try at once: a hook that failed since no vCPU ran can succeed now."""
        if vm.retry is not None:
            self._retries.now(vm)

    def listed(self, running: set[str]) -> None:
        """Keep nothing for VMs that do not run."""
        self._channels.drop_strays(running)

    def _records_changed(self, _directory: str, names: frozenset[str] | None) -> None:
        if names is None:
            self._listing.all_changed()
            return
        for name in names:
            uuid, _, suffix = name.partition(".")
            vm = self.vms.get(uuid)
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
        found = self.vms if names is None else map(self.vms.named, map(_domain_of, names))
        for vm in found:
            if vm is not None:
                self._check_vcpus(vm)

    def _check_vcpus(self, vm: Vm) -> None:
        record = vm.record
        if record is not None and record.state == st.HOOKED:
            self._warn(vm, introspect.unwatched_vcpus(record))

    @staticmethod
    def _warn(vm: Vm, warning: str | None) -> None:
        if warning is not None and warning != vm.warning:
            telling.tell_vcpus(vm, warning)
        vm.warning = warning

    # -- one VM ----------------------------------------------------------------------

    def look(self, vm: Vm) -> None:
        """Compare what is wanted of *vm* with what is, soon, and do what is needed."""
        vm.is_due = True
        self._channels.wake(vm)
        if (vm.task is None or vm.task.done()) and not self._is_closing:
            vm.task = asyncio.create_task(self._serve(vm))

    async def _serve(self, vm: Vm) -> None:
        while vm.is_due and self.vms.known(vm):
            outcome = await self._reconcile(vm)
            if outcome.leaving_s is not None:
                await self._see_off(vm, outcome.leaving_s)

    async def _see_off(self, vm: Vm, seconds: int) -> None:
        # The tool was asked to let go: its channel ends when it has. Meanwhile others
        # may have work to do with the VM, so it is nobody's turn; and the policy may
        # change, which may mean that the tool can stay.
        reach("leaving")
        telling.tell_asked(vm, seconds)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        is_leaving = True
        while is_leaving and vm.record is not None and self.vms.known(vm):
            asked = str(vm.record.socket_inode)
            is_over = not vm.is_due and await self._channels.wait_closed(vm, deadline - loop.time())
            if not self.vms.known(vm):
                return
            has_time = not is_over and loop.time() < deadline
            outcome = await self._reconcile(vm, asked=asked, has_time="yes" if has_time else "")
            is_leaving = outcome.leaving_s is not None

    async def _reconcile(self, vm: Vm, **argument: str) -> Outcome:
        async with vm.turn:
            vm.is_due = False
            self._retries.stop(vm)
            reach("looked")
            is_hooked = vm.record is not None and vm.record.state == st.HOOKED
            outcome = await self._look(vm, Lane.CHANGE if is_hooked else Lane.CALL, argument)
            if outcome.must_call:
                outcome = await self._look(vm, Lane.CALL, argument)
            reach("job-done")
            self.take(vm, outcome)
        return outcome

    async def _look(self, vm: Vm, lane: Lane, more: dict[str, str]) -> Outcome:
        may_call = "yes" if lane is Lane.CALL else ""
        argument = vm.argument(**{"asked": "", "may_call": may_call, **more})
        return await self._pool.run("reconcile", argument, vm.xml, timeout_s=JOB_S, lane=lane)

    def take(self, vm: Vm, outcome: Outcome) -> None:
        """Remember what a job did, watch what is to be watched, plan what comes next."""
        if outcome.is_gone or not self.vms.known(vm):
            close_channel(outcome)
            if not vm_runs(vm):
                self.gone(vm)
            return
        before = vm.record, vm.error
        self._note_left(vm, outcome.left)
        vm.take(outcome)
        self._metrics.note(outcome, is_again=vm.has_left)
        if vm.record is None or vm.record.state == st.HOOKED:
            vm.has_left = False
        telling.tell_outcome(vm, *before, outcome)
        self._warn(vm, outcome.warning)
        if outcome.channel is not None:
            self._retries.came(vm)
        if not self._channels.watch(vm, outcome):
            self.gone(vm)
            return
        if outcome.retry_s is not None:
            self._metrics.retry_planned()
            self._retries.plan(vm, outcome.retry_s)
        elif outcome.error is None:
            self._retries.begin_anew(vm)
        ended, vm.ended = vm.ended, 0
        if ended and vm.record is not None and vm.record.socket_inode == ended:
            self._departed(vm)
        is_off = outcome.step == Step.UNHOOK.value or (
            outcome.step == Step.LEAVE.value and outcome.leaving_s is None
        )
        if is_off and outcome.error is None:
            vm.is_due = True  # another tool may be wanted now

    def _tool_left(self, vm: Vm) -> None:
        if vm.turn.locked():
            # Perhaps it is the job that ends the channel: its outcome will tell.
            vm.ended = 0 if vm.record is None else vm.record.socket_inode
        else:
            self._departed(vm)

    def _departed(self, vm: Vm) -> None:
        record = vm.record
        if record is not None and not record.leaving:
            self._note_left(vm, record.socket_inode)
        self._records.note_departure(vm)
        self._retries.call_again(vm)

    def _note_left(self, vm: Vm, inode: int) -> None:
        # Once for each channel, whether the watcher saw its end first or a job did.
        if not inode or inode == vm.departed:
            return
        vm.departed = inode
        vm.has_left = True
        self._metrics.tool_left()
        if vm.record is not None and vm.record.state == st.HOOKED:
            telling.tell_departure(vm, vm.record)
        self._retries.left(vm)

    def gone(self, vm: Vm) -> None:
        """Forget *vm*, which has ended."""
        self._retries.stop(vm)
        self._channels.forget(vm)
        self.vms.forget(vm)
        if vm.record is not None and not introspect.process_runs(vm.record):
            self._records.remove_dead(vm.uuid)
        reach("forgotten")


def _domain_of(file_name: str) -> str:
    return file_name.removesuffix(".xml")
