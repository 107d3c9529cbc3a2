# SPDX-License-Identifier: Apache-2.0
"""The process that answers the notified ioctls and serves the tools' sockets.

One thread, one loop, nothing in it that waits; a turn costs the same however many VMs
there are. Lives as long as any task uses the filter. If it dies, every call it had or
would have got answers ENOSYS, and QEMU runs on.

Imports the rest of the emulator, ``linux`` and ``abi``. Source: seccomp_unotify(2).
"""

from __future__ import annotations

import select
import signal
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.emulator.calls import Calls
from kvmi_libvirt.emulator.faults import NO_FAULTS
from kvmi_libvirt.emulator.listener import Listener, unpack_call
from kvmi_libvirt.emulator.process import allow_many_fds
from kvmi_libvirt.emulator.registry import Registry
from kvmi_libvirt.emulator.revisions import kernel_for
from kvmi_libvirt.emulator.standby import OpenCalls

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.emulator.faults import Faults
    from kvmi_libvirt.emulator.process import Process
    from kvmi_libvirt.emulator.registry import Vm
    from kvmi_libvirt.emulator.trace import Trace
    from kvmi_libvirt.newtypes import LocalFd

LIVENESS_INTERVAL_S: Final = 0.25
"""How often hooked VMs are looked at: nothing tells when their last fd is closed.

So are callers that wait: nothing tells when one is killed either.
"""

LOOKS_A_TURN: Final = 64
"""How many of them at most; where there are more, each waits for its turn."""

TURN_LIMIT_S: Final = 20.0
"""Longer than any disk keeps the trace waiting, shorter than anybody waits for a QEMU."""

_CALM_S: Final = 0.05  # without anything to do, then no turn's time is taken
_QUIET_S: Final = 0.001  # without any call, then the trace is written
_FEW: Final = 128  # processes or hooked VMs that need no higher limit of descriptors


class Supervisor:
    """Serves one seccomp listener. Use it with ``with``, then :meth:`run` it.

    Parameters
        listener  borrowed
        abi       the revision that is emulated
        trace     borrowed
        stand_in  accept the stand-in's memfds as VM and vCPU fds
        faults    what shall go wrong
        open_calls  where who stands by finds what has not been answered
    Raises
        EmulatorError  the revision is not emulated.
    """

    def __init__(
        self,
        listener: LocalFd,
        abi: KvmiAbi,
        trace: Trace,
        *,
        stand_in: bool,
        faults: Faults = NO_FAULTS,
        open_calls: OpenCalls | None = None,
    ) -> None:
        self._trace = trace
        open_calls = open_calls or OpenCalls()
        kernel = kernel_for(abi, faults=faults)
        self._listener = Listener(listener, open_calls.received)
        self._listener.wake_in_place()
        self._registry = Registry(stand_in=stand_in, appeared=self._process_appeared)
        self._calls = Calls(
            *(self._listener, self._registry, kernel, trace, open_calls),
            watch=self._watch,
            unwatch=self._unwatch,
        )
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)
        self._processes: dict[int, Process] = {}
        # Of each channel, by its fd: whose it is, what it waits for, and until when.
        self._hooked: dict[int, Vm] = {}
        self._interests: dict[int, int] = {}
        self._deadlines: dict[int, float] = {}
        self._next_look = 0.0
        self._to_look_at: list[int] = []

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self._registry.close()
        self._epoll.close()

    def run(self, *, limit_s: float = TURN_LIMIT_S) -> None:
        """Serve until no task uses the filter any more. Blocks in epoll_wait(2) only.

        Whatever else it should hang in, a page of guest memory that nobody brings for
        example: after *limit_s* SIGALRM ends this process, and QEMU goes on.
        """
        is_used = True
        with _Limit(limit_s) as limit:
            while is_used:
                ready = self._wait(_CALM_S if limit.is_on else None)
                is_quiet = not ready
                limit.begin_turn()
                is_used = self._serve(ready)
                if is_quiet:
                    limit.end()
        self._trace.flush()

    def serve_once(self) -> bool:
        """Wait for something to do and do it; False when no task uses the filter any more."""
        return self._serve(self._wait())

    def _wait(self, at_most_s: float | None = None) -> dict[int, int]:
        timeout_s = self._timeout_s()
        if at_most_s is not None and (timeout_s is None or timeout_s > at_most_s):
            timeout_s = at_most_s
        return dict(self._epoll.poll(timeout_s))

    def _serve(self, ready: dict[int, int]) -> bool:
        # With a tool that floods there is never nothing to do.
        if not ready or self._trace.is_overdue:
            self._trace.flush()
        listener = ready.pop(self._listener.fd, 0)
        # First of all, so that a process number that was reused is not mistaken.
        for pidfd in ready.keys() & self._processes.keys() if ready else ():
            self._process_ended(pidfd)
            del ready[pidfd]
        if listener & select.EPOLLIN:
            call = self._listener.receive()
            if call is not None:
                self._calls.serve(call)
        elif listener:
            return False
        for fd, mask in ready.items():
            self._serve_channel(fd, mask)
        self._do_what_is_due()
        return True

    def serve_received(self, notification: bytes) -> None:
        """Answer a call somebody else has received on the listener and not answered.

        Parameters
            notification  the ``struct seccomp_notif``
        """
        self._calls.serve(unpack_call(notification))

    def remember(self, notification: bytes, region: bytes) -> None:
        """Take note of an observed call that somebody else let through.

        Parameters
            notification  the ``struct seccomp_notif``
            region        what it pointed to, where the call sets a memory region
        """
        self._calls.remember(unpack_call(notification), region)

    def _timeout_s(self) -> float | None:
        wanted = min(self._deadlines.values(), default=None) if self._deadlines else None
        if self._hooked or self._calls.are_waiting:
            wanted = self._next_look if wanted is None else min(wanted, self._next_look)
        timeout_s = None if wanted is None else max(0.0, wanted - time.monotonic())
        if self._trace.has_kept:
            return _QUIET_S if timeout_s is None else min(timeout_s, _QUIET_S)
        return timeout_s

    def _do_what_is_due(self) -> None:
        if not (self._hooked or self._calls.are_waiting):
            return
        now = time.monotonic()
        if self._deadlines:
            for fd in [fd for fd, at in self._deadlines.items() if at <= now]:
                self._serve_channel(fd, 0)
        if now >= self._next_look:
            self._next_look = now + LIVENESS_INTERVAL_S
            self._look_after_vms()
            self._calls.drop_the_dead()
        if self._calls.are_waiting:
            self._calls.settle()

    # -- processes and their VMs ---------------------------------------------------------

    def _process_appeared(self, process: Process) -> None:
        self._processes[process.pidfd] = process
        self._epoll.register(process.pidfd, select.EPOLLIN)
        if len(self._processes) > _FEW:
            allow_many_fds()

    def _process_ended(self, pidfd: int) -> None:
        self._epoll.unregister(pidfd)
        self._registry.process_ended(self._processes.pop(pidfd))

    def _look_after_vms(self) -> None:
        if not self._to_look_at:
            self._to_look_at = list(self._hooked)
        looked_at = self._to_look_at[-LOOKS_A_TURN:]
        del self._to_look_at[-LOOKS_A_TURN:]
        self._registry.prune([self._hooked[fd] for fd in looked_at if fd in self._hooked])

    # -- the tools ---------------------------------------------------------------------

    def _serve_channel(self, fd: int, ready: int) -> None:
        vm = self._hooked.get(fd)
        if vm is None or vm.channel is None:  # unhooked, or pruned, a moment ago
            return
        try:
            vm.channel.turn(ready)
        except Exception as error:
            self._trace.failure(f"channel closed: {error!r}")
            vm.channel.close()
        self._calls.note_death(vm)
        self._watch(vm)

    def _watch(self, vm: Vm) -> None:
        # To be called whenever something was done to the channel.
        channel = vm.channel
        if channel is None or not channel.is_open:
            return
        fd, interest, deadline = channel.fd, channel.interest, channel.deadline
        if fd not in self._hooked:
            self._epoll.register(fd, interest)
            if len(self._hooked) > _FEW:
                allow_many_fds()
        elif interest != self._interests[fd]:
            self._epoll.modify(fd, interest)
        self._hooked[fd] = vm
        self._interests[fd] = interest
        if deadline is not None:
            self._deadlines[fd] = deadline
        else:
            self._deadlines.pop(fd, None)

    def _unwatch(self, fd: int) -> None:
        # The file lives on in QEMU: closing our copy does not take it out of the epoll.
        if self._hooked.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            del self._interests[fd]
            self._deadlines.pop(fd, None)


class _Limit:
    # How long a turn may take, by a timer that ends the process. It runs on while one call
    # follows another: to start and stop it for each is a good part of what a call costs. So
    # is a timer that is due before the kernel's next tick, as a wait of a millisecond has it.
    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._renew_at = 0.0
        self.is_on = False

    def __enter__(self) -> _Limit:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin_turn(self) -> None:
        # A turn has at least 9 tenths of the limit.
        now = time.monotonic()
        if not self.is_on or now >= self._renew_at:
            signal.setitimer(signal.ITIMER_REAL, self._limit_s)
            self._renew_at = now + self._limit_s / 10
            self.is_on = True

    def end(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.is_on = False
