# SPDX-License-Identifier: Apache-2.0
"""Keep every VM's introspection as its policy says.

Events only mark a VM as due; a job then compares what is wanted with what is, and
does what is needed. So it does not matter in which order events come, whether some
are lost, or what the agent did before it was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import early, introspect
from kvmi_libvirt import state as st
from kvmi_libvirt.agent.decide import Backoff, Step
from kvmi_libvirt.agent.pool import LOST, Lane
from kvmi_libvirt.agent.tracing import reach
from kvmi_libvirt.agent.vm import Vm, pack
from kvmi_libvirt.errors import KvmiLibvirtError, StateError
from kvmi_libvirt.sockdiag import open_unix_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

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

TOOL_LEFT: Final = "the tool has closed its channel"

_TURN_S: Final = 10.0
_ASK_S: Final = 0.5
_LIST_AGAIN_S: Final = 5.0
_CALL_AGAIN_S: Final = 1.0
_FLAP_S: Final = 10.0
_FLAP_BACKOFF: Final = Backoff(first_s=1.0, last_s=60.0)
EARLY_S: Final = early.LONGEST_S + JOB_S
_CHANNEL_PREFIX: Final = "channel-"


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
        self._watcher = watcher
        self._directories = directories
        self._sockets = sockets
        self._notifier = notifier
        self._metrics = metrics
        self._state = st.StateDir(settings.state_dir)
        self._vms: dict[str, Vm] = {}
        self._kept: dict[str, int] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._lister: asyncio.TimerHandle | None = None
        self._listing: asyncio.Task[None] | None = None
        self._must_list = False
        self._is_closing = False
        self._pending: set[asyncio.Task[None]] = set()  # else they may be collected

    # -- life ------------------------------------------------------------------------

    def start(self) -> None:
        """Take over the channels kept for us, and look at every VM."""
        for name, fd in self._notifier.kept().items():
            if name.startswith(_CHANNEL_PREFIX):
                self._kept[name.removeprefix(_CHANNEL_PREFIX)] = fd
            else:
                os.close(fd)
        self._directories.watch(str(self._settings.state_dir), self._records_changed)
        self._directories.watch(str(self._settings.run_dir), self._status_changed)
        self._domains.start(self)
        reach("started")

    async def close(self) -> None:
        """Stop working; every VM stays as it is, hooked or not."""
        self._is_closing = True
        for timer in (self._sweeper, self._lister):
            if timer is not None:
                timer.cancel()
        tasks = [self._listing, *self._pending, *(vm.task for vm in self._vms.values())]
        for task in tasks:
            if task is not None:
                task.cancel()
        for task in tasks:
            if task is not None:
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        for vm in self._vms.values():
            vm.stop_retry()

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
            self._retry_now(vm)

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
        for record in self._records():
            is_known = record.uuid in running or record.uuid in self._vms
            if not is_known and not introspect.process_runs(record):
                self._remove_record(record.uuid)
        for uuid in tuple(self._kept):
            if uuid not in running:
                os.close(self._kept.pop(uuid))
                self._notifier.drop(_CHANNEL_PREFIX + uuid)

    def _records(self) -> list[st.VmState]:
        try:
            return self._state.all(lambda problem: logger.warning("%s", problem))
        except StateError as error:
            logger.warning("%s", error)
            return []

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
        with contextlib.suppress(StateError):
            if self._state.load(vm.uuid) != vm.record:
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
                logger.error("domain %s: %s", vm.name, seen.error, extra=_fields(vm))

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
            vm.stop_retry()
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
        logger.info(
            "domain %s: its tool was asked to let go, and has %d s",
            vm.name,
            seconds,
            extra=_fields(vm),
        )
        vm.closed = asyncio.Event()
        waiting = vm.closed.wait() if vm.channel is not None else self._until_closed(vm)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(waiting, seconds)
        vm.closed = None

    async def _until_closed(self, vm: Vm) -> None:
        # No copy of the channel: all that can be done is to ask.
        while vm.record is not None and self._knows(vm):
            with contextlib.suppress(StateError):
                if not introspect.channel_is_open(vm.record):
                    return
            await asyncio.sleep(_ASK_S)

    def _knows(self, vm: Vm) -> bool:
        return self._vms.get(vm.uuid) is vm

    def take(self, vm: Vm, outcome: Outcome) -> None:
        """Remember what a job did, watch what is to be watched, plan what comes next."""
        if outcome.is_gone:
            self._close_channel(outcome)
            if not self._runs(vm):
                self._forget(vm)
            return
        before = vm.record, vm.error
        vm.take(outcome)
        self._metrics.note(outcome)
        self._tell(vm, *before, outcome)
        self._watch(vm, outcome)
        if outcome.retry_s is not None:
            self._plan_retry(vm, outcome.retry_s)
        elif outcome.error is None:
            vm.tries = 0
        is_off = outcome.step == Step.UNHOOK.value or (
            outcome.step == Step.LEAVE.value and outcome.leaving_s is None
        )
        if is_off and outcome.error is None:
            vm.is_due = True  # another tool may be wanted now

    def _tell(self, vm: Vm, before: st.VmState | None, error: str | None, outcome: Outcome) -> None:
        # One line an event: the tenth failure for the same reason is none.
        record = vm.record
        if outcome.stall_us:
            return  # hooked, and told with what it cost
        is_same = (before and before.state) == (record and record.state)
        if is_same and outcome.error in (None, error):
            return
        state = "not known" if record is None else record.state
        line = f"domain {vm.name}: {state}"
        problem = outcome.error
        if record is not None and record.state == st.HOOKED:
            line += f" by {record.source}, {len(record.commands)} commands"
            line += f" and {len(record.events)} events allowed"
        elif record is not None:
            problem = problem or record.error
        elif problem is None:
            return
        level = logging.INFO
        if problem is not None or state in (st.FAILED, st.WAITING):
            is_required = record is not None and record.mode == "required"
            level = logging.ERROR if is_required else logging.WARNING
        if problem is not None:
            line += f": {problem}"
        logger.log(level, "%s", line, extra={**_fields(vm), "event": state.replace(" ", "-")})

    def _watch(self, vm: Vm, outcome: Outcome) -> None:
        record = vm.record
        kept = self._kept_channel(vm)
        is_new = outcome.channel is not None
        if not is_new:
            outcome.channel = kept
        elif kept is not None:
            os.close(kept)
        if record is None:
            self._close_channel(outcome)
            return
        if not self._watch_process(vm, record):
            self._close_channel(outcome)
            self._forget(vm)
            return
        if not record.socket_inode:
            self._unwatch_channel(vm)
            self._close_channel(outcome)
            return
        if outcome.channel is not None:
            fd, outcome.channel = outcome.channel, None
            self._unwatch_channel(vm)
            self._notifier.keep(_CHANNEL_PREFIX + vm.uuid, fd)
            vm.channel = fd
            if is_new:
                vm.came_s = asyncio.get_running_loop().time()
            self._watcher.watch_channel(fd, lambda: self._channel_ended(vm))
        elif vm.channel is None:
            self._sweep_later()
        reach("watched")

    def _watch_process(self, vm: Vm, record: st.VmState) -> bool:
        process = record.pid, record.start_ticks
        if vm.pidfd is not None and vm.process == process:
            return True
        if vm.pidfd is not None:
            self._watcher.forget(vm.pidfd)
            vm.pidfd = None
        try:
            pidfd = os.pidfd_open(record.pid)
        except OSError:
            return False
        if not introspect.process_runs(record):  # another has its number now
            os.close(pidfd)
            return False
        vm.pidfd, vm.process = pidfd, process
        self._watcher.watch_process(pidfd, lambda: self._ended(vm))
        return True

    def _kept_channel(self, vm: Vm) -> int | None:
        # Kept by the service manager over our restart; it must still be the one.
        fd = self._kept.pop(vm.uuid, None)
        if fd is None:
            return None
        inode = 0 if vm.record is None else vm.record.socket_inode
        if vm.channel is None and os.fstat(fd).st_ino == inode:
            return fd
        os.close(fd)
        self._notifier.drop(_CHANNEL_PREFIX + vm.uuid)
        return None

    @staticmethod
    def _close_channel(outcome: Outcome) -> None:
        if outcome.channel is not None:
            os.close(outcome.channel)
            outcome.channel = None

    def _unwatch_channel(self, vm: Vm) -> None:
        if vm.channel is not None:
            self._watcher.forget(vm.channel)
            vm.channel = None
            self._notifier.drop(_CHANNEL_PREFIX + vm.uuid)

    def _channel_ended(self, vm: Vm) -> None:
        vm.channel = None
        self._notifier.drop(_CHANNEL_PREFIX + vm.uuid)
        if vm.closed is not None:
            vm.closed.set()
            return
        self._metrics.tool_left()
        vm.tries = 0
        self._note_departure(vm)
        loop = asyncio.get_running_loop()
        # A tool that comes and goes is not run after: each time it gets twice as long.
        is_flap = loop.time() - vm.came_s < _FLAP_S
        vm.flaps = vm.flaps + 1 if is_flap else 0
        if vm.flaps > 1:
            vm.stop_retry()
            vm.retry = loop.call_later(_FLAP_BACKOFF.delay_s(vm.flaps - 1), self._retry_now, vm)
        else:
            self.look(vm)

    def _note_departure(self, vm: Vm) -> None:
        # Nothing is in force any more, whatever the ioctls would say.
        record = vm.record
        if record is None or record.state != st.HOOKED:
            return
        vm.record = dataclasses.replace(
            record, state=st.WAITING, commands=(), events=(), all_ids=(), error=TOOL_LEFT
        )
        vm.error = TOOL_LEFT
        level = logging.ERROR if record.mode == "required" else logging.WARNING
        logger.log(
            level, "domain %s: %s", vm.name, TOOL_LEFT, extra={**_fields(vm), "event": "left"}
        )
        with contextlib.suppress(StateError), self._state.locked(vm.uuid, deadline=0.0):
            if self._state.load(vm.uuid) == record:
                self._state.save(vm.record)

    def _ended(self, vm: Vm) -> None:
        vm.pidfd = None
        self._forget(vm)

    def _runs(self, vm: Vm) -> bool:
        # Its process, not what libvirt says: an event may come late.
        return vm.record is not None and introspect.process_runs(vm.record)

    def _forget(self, vm: Vm) -> None:
        vm.stop_retry()
        if vm.closed is not None:
            vm.closed.set()
        self._unwatch_channel(vm)
        if vm.pidfd is not None:
            self._watcher.forget(vm.pidfd)
            vm.pidfd = None
        if self._knows(vm):
            del self._vms[vm.uuid]
        if vm.record is not None and not introspect.process_runs(vm.record):
            self._remove_record(vm.uuid)
        reach("forgotten")

    def _remove_record(self, uuid: str) -> None:
        # Never waits: whoever holds the lock is at work on it, or on its successor.
        try:
            with self._state.locked(uuid, deadline=0.0):
                record = self._state.load(uuid)
                if record is None or not introspect.process_runs(record):
                    self._state.remove(uuid)
        except StateError:
            return

    # -- trying again ----------------------------------------------------------------

    def _plan_retry(self, vm: Vm, at_most_s: float) -> None:
        vm.stop_retry()
        vm.tries += 1
        self._metrics.retry_planned()
        delay = Backoff(last_s=at_most_s).delay_s(vm.tries)
        delay *= random.uniform(0.8, 1.2)  # noqa: S311 - a thousand VMs must not try at once
        vm.retry = asyncio.get_running_loop().call_later(delay, self._retry_now, vm)
        if vm.record is not None and (vm.record.source or "").startswith("unix:"):
            # A tool that comes back makes its socket anew: no need to wait for the timer.
            directory = str(Path((vm.record.source or "").removeprefix("unix:")).parent)
            self._sockets.watch(directory, self._sockets_made)
        reach("retry-planned")

    def _retry_now(self, vm: Vm) -> None:
        vm.stop_retry()
        self.look(vm)

    def _sockets_made(self, directory: str, names: frozenset[str] | None) -> None:
        if names is None:
            return  # somebody makes very many: the timers are enough
        sources = {f"unix:{directory.rstrip('/')}/{name}" for name in names}
        loop = asyncio.get_running_loop()
        for vm in self._vms.values():
            record = vm.record
            if vm.retry is None or record is None or record.source not in sources:
                continue
            # Whoever may make that socket may make it all the time, and a tool that
            # comes and goes makes it each time.
            at = max(loop.time(), vm.called_s + _CALL_AGAIN_S)
            if vm.flaps > 1 or vm.retry.when() <= at:
                continue
            vm.called_s = at
            vm.tries = 0  # it is bound, and may not listen yet
            vm.stop_retry()
            vm.retry = loop.call_at(at, self._retry_now, vm)

    # -- channels that cannot be watched ---------------------------------------------

    def _sweep_later(self) -> None:
        if self._sweeper is None and not self._is_closing:
            loop = asyncio.get_running_loop()
            self._sweeper = loop.call_later(self._settings.sweep_s, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        unwatched = [
            vm
            for vm in self._vms.values()
            if vm.channel is None and vm.record is not None and vm.record.socket_inode
        ]
        if not unwatched:
            return
        try:
            alive = open_unix_streams()
        except OSError as error:
            logger.warning("cannot look at channels: %s", error)
            alive = set()
        for vm in unwatched:
            record = vm.record
            is_unix = record is not None and (record.source or "").startswith("unix:")
            is_open = is_unix and record is not None and record.socket_inode in alive
            if not is_open and vm.retry is None:
                self.look(vm)
        self._sweep_later()

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
            await self._begin_watch(name, uuid, xml)
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

    async def _begin_watch(self, name: str, uuid: str, xml: bytes) -> None:
        # The hook is told only when a worker has it: that one goes on without us.
        begun: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def tell(is_begun: bool) -> None:
            if not begun.done():
                begun.set_result(is_begun)

        self._spawn(self._watch_start(name, uuid, xml, tell))
        try:
            is_begun = await asyncio.wait_for(begun, _TURN_S)
        except asyncio.TimeoutError:
            is_begun = False
        if not is_begun:
            raise KvmiLibvirtError("no worker to watch its start")

    async def _watch_start(
        self, name: str, uuid: str, xml: bytes, tell: Callable[[bool], None]
    ) -> None:
        argument = {"name": name, "uuid": uuid}
        try:
            outcome = await self._pool.run(
                "early",
                argument,
                xml,
                timeout_s=EARLY_S,
                lane=Lane.START,
                on_sent=lambda: tell(True),
            )
        finally:
            tell(False)
        if outcome.record is None or outcome.channel is None:
            self._close_channel(outcome)
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


def _fields(vm: Vm) -> dict[str, str]:
    return {"domain": vm.name, "uuid": vm.uuid}
