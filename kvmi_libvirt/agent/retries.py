# SPDX-License-Identifier: Apache-2.0
"""When a tool that was not there, or has gone, is called again.

Owns Vm.retry, Vm.tries, Vm.flaps, Vm.came_s and Vm.called_s: one timer a VM, with longer
and longer waits. A tool that makes its socket is called at once; one that comes and goes
is not run after.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.agent.decide import Backoff
from kvmi_libvirt.agent.tracing import reach

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.agent.inotify import Directories
    from kvmi_libvirt.agent.vm import Vm
    from kvmi_libvirt.agent.vms import Vms

_UNIX: Final = "unix:"
_CALL_AGAIN_S: Final = 1.0
_FLAP_S: Final = 10.0
_FLAP_BACKOFF: Final = Backoff(first_s=1.0, last_s=60.0)


class Retries:
    """Plans attempts. Lives in the event loop.

    Parameters
        sockets  directories in which tools make their sockets
        vms      all that are known
        look     makes an attempt
    """

    def __init__(
        self,
        sockets: Directories,
        vms: Vms,
        look: Callable[[Vm], None],
    ) -> None:
        """Nothing is planned yet."""
        self._sockets = sockets
        self._vms = vms
        self._look = look

    def plan(self, vm: Vm, at_most_s: float) -> None:
        """Plan an attempt, since one failed; at most *at_most_s* seconds from now."""
        self.stop(vm)
        vm.tries += 1
        delay = Backoff(last_s=at_most_s).delay_s(vm.tries)
        delay *= random.uniform(0.8, 1.2)  # noqa: S311 - a thousand VMs must not try at once
        vm.retry = asyncio.get_running_loop().call_later(delay, self.now, vm)
        source = "" if vm.record is None else vm.record.source or ""
        if source.startswith(_UNIX):
            # A tool that comes back makes its socket anew: no need to wait for the timer.
            directory = str(Path(source.removeprefix(_UNIX)).parent)
            self._sockets.watch(directory, self._sockets_made)
        reach("retry-planned")

    def stop(self, vm: Vm) -> None:
        """Plan nothing for *vm*."""
        if vm.retry is not None:
            vm.retry.cancel()
            vm.retry = None

    def begin_anew(self, vm: Vm) -> None:
        """Count its failures from now on: something changed."""
        vm.tries = 0

    def now(self, vm: Vm) -> None:
        """Make the attempt that is planned, or another, now."""
        self.stop(vm)
        self._look(vm)

    def came(self, vm: Vm) -> None:
        """Note that the tool of *vm* has come."""
        vm.came_s = asyncio.get_running_loop().time()

    def left(self, vm: Vm) -> None:
        """Note that the tool of *vm* has gone."""
        vm.tries = 0
        is_flap = asyncio.get_running_loop().time() - vm.came_s < _FLAP_S
        vm.flaps = vm.flaps + 1 if is_flap else 0

    def call_again(self, vm: Vm) -> None:
        """Call the tool of *vm*, which has gone: at once, or later if it goes often."""
        # A tool that comes and goes is not run after: each time it gets twice as long.
        if vm.flaps > 1:
            loop = asyncio.get_running_loop()
            self.stop(vm)
            vm.retry = loop.call_later(_FLAP_BACKOFF.delay_s(vm.flaps - 1), self.now, vm)
        else:
            self._look(vm)

    def _sockets_made(self, directory: str, names: frozenset[str] | None) -> None:
        if names is None:
            return  # somebody makes very many: the timers are enough
        sources = {f"{_UNIX}{directory.rstrip('/')}/{name}" for name in names}
        loop = asyncio.get_running_loop()
        for vm in self._vms:
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
            self.stop(vm)
            vm.retry = loop.call_at(at, self.now, vm)
