# SPDX-License-Identifier: Apache-2.0
"""What libvirt's hook hands over: done at once, before everything else.

libvirt holds the domain while its hook waits. Only a start waits for what is being done
about the VM, and not for long; whatever comes of an operation goes to the keeper.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import early
from kvmi_libvirt import state as st
from kvmi_libvirt.agent.channels import close_channel
from kvmi_libvirt.agent.pool import JOB_S, LOST, Lane
from kvmi_libvirt.agent.tracing import reach
from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.agent.jobs import Outcome
    from kvmi_libvirt.agent.metrics import Metrics
    from kvmi_libvirt.agent.pool import Pool
    from kvmi_libvirt.agent.vm import Vm
    from kvmi_libvirt.agent.vms import Vms

logger = logging.getLogger(__name__)

_TURN_S: Final = 10.0
_EARLY_S: Final = early.LONGEST_S + JOB_S


class HandOver:
    """Does what the hook asks. Lives in the event loop.

    Parameters
        pool     runs jobs
        vms      a VM that starts goes there
        metrics  counts
        take     is given what became of a VM, and plans what comes next
        look     looks at a VM, soon
        forget   forgets a VM that has ended
    """

    def __init__(
        self,
        pool: Pool,
        vms: Vms,
        metrics: Metrics,
        *,
        take: Callable[[Vm, Outcome], None],
        look: Callable[[Vm], None],
        forget: Callable[[Vm], None],
    ) -> None:
        """Nothing was asked yet."""
        self._pool = pool
        self._vms = vms
        self._metrics = metrics
        self._take = take
        self._look = look
        self._forget = forget
        self._starts: set[asyncio.Task[None]] = set()  # else they may be collected

    async def close(self) -> None:
        """Watch no start any more; the workers end what they do."""
        for task in tuple(self._starts):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def operation(self, name: str, uuid: str, operation: str, xml: bytes) -> str | None:
        """Do *operation*; return the reason of a veto, or None.

        Raises
            KvmiLibvirtError  the hook must do it by itself
        """
        if operation == "started":
            return await self._started(name, uuid, xml)
        outcome = await self._run(name, uuid, operation, xml)
        if operation == "reconnect":
            self._look_later(self._vms.see(name, uuid, xml)[0])
        elif operation in ("stopped", "release"):
            ended = self._vms.get(uuid)
            if ended is not None:
                ended.record = None
                self._forget(ended)
        if outcome.early:
            await self._begin_watch(name, uuid, xml)
        return outcome.veto

    async def _started(self, name: str, uuid: str, xml: bytes) -> str | None:
        was_known = self._vms.get(uuid) is not None
        vm = self._vms.see(name, uuid, xml)[0]  # whoever finds it now has to wait for us
        try:
            await asyncio.wait_for(vm.turn.acquire(), _TURN_S)
        except asyncio.TimeoutError:
            raise KvmiLibvirtError("the agent is at work on it") from None
        try:
            outcome = await self._run(name, uuid, "started", xml)
            if outcome.veto is None:
                self._take_start(name, uuid, xml, outcome)
            elif not was_known:
                self._forget(vm)
        finally:
            vm.turn.release()
        return outcome.veto

    def _take_start(self, name: str, uuid: str, xml: bytes, outcome: Outcome) -> None:
        # Who lists VMs may not have found it yet, and forgotten it.
        vm = self._vms.see(name, uuid, xml)[0]
        self._take(vm, outcome)
        if vm.record is None or vm.record.state != st.HOOKED:
            self._look_later(vm)

    async def _run(self, name: str, uuid: str, operation: str, xml: bytes) -> Outcome:
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

        task = asyncio.create_task(self._watch_start(name, uuid, xml, tell))
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)
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
                timeout_s=_EARLY_S,
                lane=Lane.START,
                on_sent=lambda: tell(True),
            )
        finally:
            tell(False)
        if outcome.record is None or outcome.channel is None:
            close_channel(outcome)
            if outcome.error is not None:
                fields = {"domain": name, "uuid": uuid}
                logger.warning("domain %s: %s", name, outcome.error, extra=fields)
            return
        self._take(self._vms.see(name, uuid, xml)[0], outcome)

    def _look_later(self, vm: Vm) -> None:
        # After the hook's answer: libvirt holds the domain until then.
        asyncio.get_running_loop().call_soon(self._look, vm)
