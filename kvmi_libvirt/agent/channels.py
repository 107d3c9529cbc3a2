# SPDX-License-Identifier: Apache-2.0
"""The channels and processes of the VMs: taken over, watched, and let go.

Owns Vm.channel, Vm.pidfd, Vm.process and Vm.parting. A channel of which there is no copy,
since it was made by an agent that was killed or by somebody else, cannot be waited for:
the kernel is asked about all of those at once, now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import introspect
from kvmi_libvirt.agent.tracing import reach
from kvmi_libvirt.errors import StateError
from kvmi_libvirt.sockdiag import open_unix_streams

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.agent.jobs import Outcome
    from kvmi_libvirt.agent.notify import Notifier
    from kvmi_libvirt.agent.vm import Vm
    from kvmi_libvirt.agent.vms import Vms
    from kvmi_libvirt.agent.watch import Watcher
    from kvmi_libvirt.state import VmState

logger = logging.getLogger(__name__)

_ASK_S: Final = 0.5
_PREFIX: Final = "channel-"


class Channels:
    """Watches channels and processes. Lives in the event loop.

    Parameters
        watcher   waits for their ends
        notifier  keeps channels over a restart
        vms       all that are known
        sweep_s   seconds between looks at channels that cannot be waited for
        left      called when the tool of a VM has closed its channel
        ended     called when the process of a VM has ended
        doubt     called with a VM whose channel may have ended
    """

    def __init__(
        self,
        watcher: Watcher,
        notifier: Notifier,
        vms: Vms,
        *,
        sweep_s: float,
        left: Callable[[Vm], None],
        ended: Callable[[Vm], None],
        doubt: Callable[[Vm], None],
    ) -> None:
        """Watch nothing yet."""
        self._watcher = watcher
        self._notifier = notifier
        self._vms = vms
        self._sweep_s = sweep_s
        self._left = left
        self._ended = ended
        self._doubt = doubt
        self._kept: dict[str, int] = {}  # by uuid, until their VM is looked at
        self._sweeper: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Take over the channels that the service manager kept for us."""
        for name, fd in self._notifier.kept().items():
            if name.startswith(_PREFIX):
                self._kept[name.removeprefix(_PREFIX)] = fd
            else:
                os.close(fd)

    def close(self) -> None:
        """Look no more; what is watched is the watcher's to close."""
        if self._sweeper is not None:
            self._sweeper.cancel()

    def drop_strays(self, running: set[str]) -> None:
        """Close the channels that were kept of VMs that are not *running* any more."""
        for uuid in tuple(self._kept):
            if uuid not in running:
                os.close(self._kept.pop(uuid))
                self._notifier.drop(_PREFIX + uuid)

    # -- one VM ----------------------------------------------------------------------

    def watch(self, vm: Vm, outcome: Outcome) -> bool:
        """Watch what a job found of *vm*: its process, and the channel that came along.

        Takes the channel over, whatever is returned.

        Returns
            False when the process has ended: the VM is to be forgotten
        """
        record = vm.record
        kept = self._take_kept(vm)
        if outcome.channel is None:
            outcome.channel = kept
        elif kept is not None:
            os.close(kept)
        if record is None:
            close_channel(outcome)
            return True
        if not self._watch_process(vm, record):
            close_channel(outcome)
            return False
        if not record.socket_inode:
            self._unwatch(vm)
            close_channel(outcome)
            return True
        if outcome.channel is not None:
            fd, outcome.channel = outcome.channel, None
            self._unwatch(vm)
            self._notifier.keep(_PREFIX + vm.uuid, fd)
            vm.channel = fd
            self._watcher.watch_channel(fd, lambda: self._channel_ended(vm))
        elif vm.channel is None:
            self._sweep_later()
        reach("watched")
        return True

    def forget(self, vm: Vm) -> None:
        """Watch nothing of *vm* any more; who waits for its tool to leave waits no longer."""
        _settle(vm, is_over=True)
        self._unwatch(vm)
        self._unwatch_process(vm)

    async def wait_closed(self, vm: Vm, seconds: float) -> bool:
        """Wait until the channel of *vm* ends, or *vm* is forgotten, *seconds* at most.

        The channel's end is then not reported otherwise.

        Returns
            False when :meth:`wake` ended the wait before that
        """
        parting = vm.parting = asyncio.get_running_loop().create_future()
        asking = None if vm.channel is not None else asyncio.create_task(_ask_until_closed(vm))
        try:
            return await asyncio.wait_for(parting, max(0.0, seconds))
        except asyncio.TimeoutError:
            return True
        finally:
            vm.parting = None
            if asking is not None:
                asking.cancel()

    def wake(self, vm: Vm) -> None:
        """End the wait for the tool of *vm*, if there is one: something else changed."""
        _settle(vm, is_over=False)

    def _watch_process(self, vm: Vm, record: VmState) -> bool:
        process = record.pid, record.start_ticks
        if vm.pidfd is not None and vm.process == process:
            return True
        self._unwatch_process(vm)
        try:
            pidfd = os.pidfd_open(record.pid)
        except OSError:
            return False
        if not introspect.process_runs(record):  # another has its number now
            os.close(pidfd)
            return False
        vm.pidfd, vm.process = pidfd, process
        self._watcher.watch_process(pidfd, lambda: self._process_ended(vm))
        return True

    def _unwatch_process(self, vm: Vm) -> None:
        if vm.pidfd is not None:
            self._watcher.forget(vm.pidfd)
            vm.pidfd = None

    def _take_kept(self, vm: Vm) -> int | None:
        # Kept by the service manager over our restart; it must still be the one.
        fd = self._kept.pop(vm.uuid, None)
        if fd is None:
            return None
        inode = 0 if vm.record is None else vm.record.socket_inode
        if vm.channel is None and os.fstat(fd).st_ino == inode:
            return fd
        os.close(fd)
        self._notifier.drop(_PREFIX + vm.uuid)
        return None

    def _unwatch(self, vm: Vm) -> None:
        if vm.channel is not None:
            self._watcher.forget(vm.channel)
            vm.channel = None
            self._notifier.drop(_PREFIX + vm.uuid)

    # -- what ends -------------------------------------------------------------------

    def _channel_ended(self, vm: Vm) -> None:
        vm.channel = None
        self._notifier.drop(_PREFIX + vm.uuid)
        if vm.parting is not None:
            _settle(vm, is_over=True)
        else:
            self._left(vm)

    def _process_ended(self, vm: Vm) -> None:
        vm.pidfd = None
        self._ended(vm)

    # -- channels that cannot be watched ---------------------------------------------

    def _sweep_later(self) -> None:
        if self._sweeper is None:
            loop = asyncio.get_running_loop()
            self._sweeper = loop.call_later(self._sweep_s, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        unwatched = [
            (vm, vm.record)
            for vm in self._vms
            if vm.channel is None and vm.record is not None and vm.record.socket_inode
        ]
        if not unwatched:
            return
        try:
            alive = open_unix_streams()
        except OSError as error:
            logger.warning("cannot look at channels: %s", error)
            alive = set()
        for vm, record in unwatched:
            is_unix = (record.source or "").startswith("unix:")
            is_open = is_unix and record.socket_inode in alive
            if not is_open and vm.retry is None:
                self._doubt(vm)
        self._sweep_later()


async def _ask_until_closed(vm: Vm) -> None:
    # No copy of the channel: all that can be done is to ask.
    while vm.record is not None:
        with contextlib.suppress(StateError):
            if not introspect.channel_is_open(vm.record):
                break
        await asyncio.sleep(_ASK_S)
    _settle(vm, is_over=True)


def _settle(vm: Vm, *, is_over: bool) -> None:
    if vm.parting is not None and not vm.parting.done():
        vm.parting.set_result(is_over)


def close_channel(outcome: Outcome) -> None:
    """Close the channel that came along with a job's outcome, if one did."""
    if outcome.channel is not None:
        os.close(outcome.channel)
        outcome.channel = None
