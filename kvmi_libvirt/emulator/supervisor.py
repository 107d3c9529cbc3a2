# SPDX-License-Identifier: Apache-2.0
"""The process that answers the notified ioctls and serves the tools' sockets.

One thread, one loop, nothing in it that waits: an ioctl is answered from memory at
once, because its caller (and perhaps whoever traces it) stands still meanwhile. Only
a PREUNHOOK whose event the tool does not read stays open, as in the kernel, and with
it the later calls on that VM: the kernel holds a lock there.
Lives as long as any task uses the filter. If it dies, every call it had or would
have got answers ENOSYS, and QEMU runs on.

Imports the rest of the emulator, ``linux`` and ``abi``. Source: seccomp_unotify(2).
"""

from __future__ import annotations

import ctypes
import errno
import select
import signal
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux
from kvmi_libvirt.abi.kvmi import KVM_CHECK_EXTENSION, KVM_CREATE_VM, Ioctl
from kvmi_libvirt.abi.seccomp import SECCOMP_USER_NOTIF_FLAG_CONTINUE
from kvmi_libvirt.emulator.channel import Channel
from kvmi_libvirt.emulator.faults import NO_FAULTS
from kvmi_libvirt.emulator.filter import KVM_CREATE_VCPU, OBSERVED
from kvmi_libvirt.emulator.kernel import (
    Answer,
    SendUnhookEvent,
    TakeSocket,
    argument_len,
)
from kvmi_libvirt.emulator.memory import (
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    REGION_LEN,
)
from kvmi_libvirt.emulator.process import FdKind, read_argument
from kvmi_libvirt.emulator.registry import Registry
from kvmi_libvirt.emulator.revisions import kernel_for, service_for
from kvmi_libvirt.emulator.trace import traced_args
from kvmi_libvirt.newtypes import RemoteAddr, RemoteFd, Tid

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.abi.seccomp import seccomp_notif
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

_WORD: Final = 0xFFFFFFFF
_SET_REGION: Final = (KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2)


class _CallIsGone(Exception):
    """The caller was interrupted or killed; its notification needs no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """What is sent back for one notification, and what the trace says about it.

    ``undo`` is called when the caller turns out to be gone: it will make the call
    again, or never.
    """

    errno: int = 0
    value: int = 0
    let_through: bool = False
    line: Callable[[Trace], None] | None = None
    undo: Callable[[], None] | None = None


_LET_THROUGH: Final = _Reply(let_through=True)


@dataclass(slots=True, kw_only=True, eq=False)
class _Call:
    # One introspection ioctl, its argument copied.
    notification: seccomp_notif
    vm: Vm
    process: Process
    ioctl: Ioctl
    argument: bytes | None
    same_mm: bool

    @property
    def tid(self) -> Tid:
        return Tid(self.notification.pid)


@dataclass(slots=True, kw_only=True, eq=False)
class _Lock:
    # A PREUNHOOK under way, with its channel, and the calls behind it.
    holder: _Call
    channel: Channel
    waiting: deque[_Call] = field(default_factory=deque)


class Supervisor:
    """Serves one seccomp listener. Use it with ``with``, then :meth:`run` it.

    Parameters
        listener  borrowed
        abi       the revision that is emulated
        trace     borrowed
        stand_in  accept the stand-in's memfds as VM and vCPU fds
        faults    what shall go wrong
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
    ) -> None:
        self._listener = listener
        self._trace = trace
        self._kernel = kernel_for(abi, faults=faults)
        self._locks: list[_Lock] = []
        self._registry = Registry(stand_in=stand_in)
        self._ioctls = {abi.request(ioctl): ioctl for ioctl in Ioctl}
        self._buffer = ctypes.create_string_buffer(linux.seccomp_notif_sizes().seccomp_notif)
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)
        self._pidfds: dict[int, Process] = {}
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

    def run(self) -> None:
        """Serve until no task uses the filter any more. Blocks in epoll_wait(2) only."""
        while self._serve_once():
            pass

    def _serve_once(self) -> bool:
        # A turn costs the same however many VMs there are: only who is ready counts.
        ready = dict(self._epoll.poll(self._timeout_s()))
        listener = ready.pop(self._listener, 0)
        # First of all, so that a process number that was reused is not mistaken.
        for pidfd in ready.keys() & self._pidfds.keys():
            self._process_ended(pidfd)
            del ready[pidfd]
        if listener & select.EPOLLIN:
            self._serve_notification()
        elif listener:
            return False
        for fd, mask in ready.items():
            self._serve_channel(fd, mask)
        if self._deadlines:
            now = time.monotonic()
            for fd in [fd for fd, at in self._deadlines.items() if at <= now]:
                self._serve_channel(fd, 0)
        if self._hooked or self._locks:
            self._look_after_vms()
        for lock in list(self._locks):
            self._settle(lock)
        return True

    def _timeout_s(self) -> float | None:
        if not self._hooked and not self._locks:
            return None
        wanted = min(self._deadlines.values(), default=self._next_look)
        return max(0.0, min(wanted, self._next_look) - time.monotonic())

    def _process_ended(self, pidfd: int) -> None:
        self._epoll.unregister(pidfd)
        self._registry.process_ended(self._pidfds.pop(pidfd))

    def _look_after_vms(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LIVENESS_INTERVAL_S
        if not self._to_look_at:
            self._to_look_at = list(self._hooked)
        looked_at = self._to_look_at[-LOOKS_A_TURN:]
        del self._to_look_at[-LOOKS_A_TURN:]
        self._registry.prune([self._hooked[fd] for fd in looked_at if fd in self._hooked])
        for lock in self._locks:
            if not self._is_waiting(lock.holder.notification):
                lock.channel.close()

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
        self._note_death(vm)
        self._watch(vm)

    def _note_death(self, vm: Vm) -> None:
        if vm.channel is not None and not vm.channel.is_open:
            vm.channel = None
            self._kernel.channel_died(vm.state)

    def _watch(self, vm: Vm) -> None:
        # To be called whenever something was done to the channel.
        channel = vm.channel
        if channel is None or not channel.is_open:
            return
        fd, interest, deadline = channel.fd, channel.interest, channel.deadline
        if fd not in self._hooked:
            self._epoll.register(fd, interest)
        elif interest != self._interests[fd]:
            self._epoll.modify(fd, interest)
        self._hooked[fd] = vm
        self._interests[fd] = interest
        if deadline is not None:
            self._deadlines[fd] = deadline
        else:
            self._deadlines.pop(fd, None)

    def _forget_channel(self, fd: int) -> None:
        # The file lives on in QEMU: closing our copy does not take it out of the epoll.
        if self._hooked.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            self._interests.pop(fd)
            self._deadlines.pop(fd, None)

    # -- the ioctls --------------------------------------------------------------------

    def _serve_notification(self) -> None:
        try:
            notification = linux.seccomp_notif_recv(self._listener, self._buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # the caller is gone already
                return
            raise
        try:
            reply = self._reply_to(notification)
        except _CallIsGone:
            return
        except Exception as error:  # exactly one answer, always
            if not self._is_waiting(notification):
                return
            reply = self._failed(notification, error)
        if reply is not None:
            self._send(notification, reply)

    def _send(self, notification: seccomp_notif, reply: _Reply) -> None:
        try:
            linux.seccomp_notif_send(
                self._listener,
                notification.id,
                val=reply.value,
                error=reply.errno,
                flags=SECCOMP_USER_NOTIF_FLAG_CONTINUE if reply.let_through else 0,
            )
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            if reply.undo is not None:
                reply.undo()
            return
        if reply.line is not None:
            reply.line(self._trace)

    def _is_waiting(self, notification: seccomp_notif) -> bool:
        return linux.seccomp_notif_id_valid(self._listener, notification.id)

    def _require_waiting(self, notification: seccomp_notif) -> None:
        # Only now is it sure that what was read under this thread id was the caller's.
        if not self._is_waiting(notification):
            raise _CallIsGone

    def _failed(self, notification: seccomp_notif, error: Exception) -> _Reply:
        request = notification.data.args[1] & _WORD
        # What is only observed must never fail because of the observer.
        code = 0 if request in OBSERVED else errno.EIO
        return _Reply(
            errno=code,
            let_through=not code,
            line=lambda trace: trace.failure(f"{request:#x} of {notification.pid}: {error!r}"),
        )

    def _reply_to(self, notification: seccomp_notif) -> _Reply | None:
        tid = Tid(notification.pid)
        request = notification.data.args[1] & _WORD
        fd = RemoteFd(notification.data.args[0] & _WORD)
        process = self._registry.process_of(tid)
        if process.pidfd not in self._pidfds:
            self._pidfds[process.pidfd] = process
            self._epoll.register(process.pidfd, select.EPOLLIN)
        kind = FdKind.VM if self._registry.known(tid, fd) else process.kind_of(tid, fd)
        if kind is FdKind.OTHER:
            self._require_waiting(notification)
            return _LET_THROUGH
        if request in OBSERVED:
            self._observe(notification, process, kind, fd)
            return _LET_THROUGH
        if request == KVM_CHECK_EXTENSION:
            return self._check_extension(notification, process, kind, fd)
        return self._introspection(notification, process, kind, fd)

    def _observe(
        self, notification: seccomp_notif, process: Process, kind: FdKind, fd: RemoteFd
    ) -> None:
        request = notification.data.args[1] & _WORD
        if request == KVM_CREATE_VM and kind is FdKind.SYSTEM:
            self._require_waiting(notification)
            self._registry.creating(process)
        elif request == KVM_CREATE_VCPU and kind is FdKind.VM:
            vm = self._registry.find(process, Tid(notification.pid), fd)
            self._require_waiting(notification)
            vm.vcpu_ids.add(notification.data.args[2])
        elif request in _SET_REGION and kind is FdKind.VM:
            tid = Tid(notification.pid)
            region = read_argument(tid, RemoteAddr(notification.data.args[2]), REGION_LEN)
            vm = self._registry.find(process, tid, fd)
            same_mm = vm.is_owned_by(tid)
            self._require_waiting(notification)
            if region is not None and same_mm:
                vm.memory.set_region(region)

    def _check_extension(
        self, notification: seccomp_notif, process: Process, kind: FdKind, fd: RemoteFd
    ) -> _Reply:
        if kind is FdKind.VCPU:  # no such ioctl there: the kernel says so itself
            self._require_waiting(notification)
            return _LET_THROUGH
        tid = Tid(notification.pid)
        vm = self._registry.find(process, tid, fd) if kind is FdKind.VM else None
        code = 0 if vm is None or vm.is_owned_by(tid) else errno.EIO
        self._require_waiting(notification)
        value = 0 if code else self._kernel.check_extension(notification.data.args[2])
        args = {"extension": notification.data.args[2]}
        extra = {"ret": -1 if code else value}
        return _Reply(
            errno=code,
            value=value,
            line=lambda trace: trace.ioctl(
                tid, "KVM_CHECK_EXTENSION", KVM_CHECK_EXTENSION, args, errno=code, extra=extra
            ),
        )

    def _introspection(
        self, notification: seccomp_notif, process: Process, kind: FdKind, fd: RemoteFd
    ) -> _Reply | None:
        tid = Tid(notification.pid)
        ioctl = self._ioctls[notification.data.args[1] & _WORD]
        address = notification.data.args[2]
        argument = read_argument(tid, RemoteAddr(address), argument_len(ioctl))
        if kind is not FdKind.VM:
            self._require_waiting(notification)
            return self._answered(notification, ioctl, argument, Answer(errno=errno.EINVAL))
        vm = self._registry.find(process, tid, fd)
        same_mm = vm.is_owned_by(tid)
        self._require_waiting(notification)
        refusal = self._kernel.refuse(ioctl, argument, same_mm=same_mm)
        if refusal is not None:
            return self._answered(notification, ioctl, argument, refusal)
        call = _Call(
            notification=notification,
            vm=vm,
            process=process,
            ioctl=ioctl,
            argument=argument,
            same_mm=same_mm,
        )
        lock = next((lock for lock in self._locks if lock.holder.vm is vm), None)
        if lock is not None:
            lock.waiting.append(call)
            return None
        return self._carry_out(call)

    def _answered(
        self,
        notification: seccomp_notif,
        ioctl: Ioctl,
        argument: bytes | None,
        answer: Answer,
        undo: Callable[[], None] | None = None,
    ) -> _Reply:
        request, address = notification.data.args[1] & _WORD, notification.data.args[2]
        args = traced_args(ioctl, argument, address)
        tid = Tid(notification.pid)
        return _Reply(
            errno=answer.errno,
            value=answer.value,
            undo=undo,
            line=lambda trace: trace.ioctl(
                tid, ioctl.value, request, args, errno=answer.errno, extra={}
            ),
        )

    def _carry_out(self, call: _Call) -> _Reply | None:
        answer = self._decide(call)
        if answer is None:
            return None
        undo = None
        if call.ioctl is Ioctl.HOOK and not answer.errno:
            undo = self._undo_of_hook(call.vm)
        return self._answered(call.notification, call.ioctl, call.argument, answer, undo)

    def _decide(self, call: _Call) -> Answer | None:
        # None: the PREUNHOOK is under way, and holds the VM's lock.
        vm = call.vm
        if call.ioctl is Ioctl.HOOK and vm.state.awaits_vcpus and vm.vcpus_run():
            self._kernel.vcpus_ran(vm.state)
        outcome = self._kernel.handle(vm.state, call.ioctl, call.argument, same_mm=call.same_mm)
        if isinstance(outcome, TakeSocket):
            channel = self._take_socket(vm, call.process, call.tid, RemoteFd(outcome.fd))
            answer = self._kernel.complete_hook(vm.state, outcome, is_socket=channel is not None)
            vm.channel = channel
            self._watch(vm)
            return answer
        if isinstance(outcome, SendUnhookEvent):
            return self._preunhook(call, outcome.seq)
        if outcome.drop_channel:
            vm.close_channel()
        return outcome

    # -- PREUNHOOK, and who waits behind it ----------------------------------------------

    def _preunhook(self, call: _Call, seq: int) -> Answer | None:
        channel = call.vm.channel
        if channel is not None:
            channel.send_event(seq)
            self._watch(call.vm)
            if channel.event_sent is None:
                self._locks.append(_Lock(holder=call, channel=channel))
                return None
        return self._end_preunhook(call, channel)

    def _end_preunhook(self, call: _Call, channel: Channel | None) -> Answer:
        sent = channel is not None and bool(channel.event_sent)
        if not sent and (channel is None or not channel.is_open):
            # The kernel sends without MSG_NOSIGNAL, from its caller's thread.
            try:
                linux.tgkill(call.process.pid, call.tid, signal.SIGPIPE)
            except ProcessLookupError:
                pass
        self._note_death(call.vm)
        return self._kernel.complete_preunhook(sent=sent)

    def _settle(self, lock: _Lock) -> None:
        if lock.channel.event_sent is None:
            return
        self._locks.remove(lock)
        call = lock.holder
        if self._is_waiting(call.notification):
            answer = self._end_preunhook(call, lock.channel)
            reply = self._answered(call.notification, call.ioctl, call.argument, answer)
            self._send(call.notification, reply)
        while lock.waiting:
            waiting = lock.waiting.popleft()
            if not self._is_waiting(waiting.notification):
                continue
            next_reply = self._carry_out(waiting)
            if next_reply is None:  # again a PREUNHOOK that has to wait
                self._locks[-1].waiting.extend(lock.waiting)
                return
            self._send(waiting.notification, next_reply)

    def _take_socket(self, vm: Vm, process: Process, tid: Tid, fd: RemoteFd) -> Channel | None:
        try:
            copy = process.copy_fd(tid, fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                return None
            raise
        try:
            service = service_for(self._kernel.abi, vm.state, vm)
            return Channel(copy, service, released=self._forget_channel)
        except OSError:
            return None

    def _undo_of_hook(self, vm: Vm) -> Callable[[], None]:
        def undo() -> None:
            # Without a shutdown: the caller will hook this very socket again.
            if vm.channel is not None:
                vm.channel.release()
                vm.channel = None
            self._kernel.forget_hook(vm.state)

        return undo
