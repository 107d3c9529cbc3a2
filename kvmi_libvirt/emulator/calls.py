# SPDX-License-Identifier: Apache-2.0
"""What each notified ioctl is answered, and what it does to the VM it is about.

An ioctl is answered from memory at once, because its caller (and perhaps whoever
traces it) stands still meanwhile. Only a PREUNHOOK whose event the tool does not read
stays open, as in the kernel, and with it the later calls on that VM: the kernel holds
a lock there.

Imports the rest of the emulator but ``supervisor``, ``linux`` and ``abi``.
"""

from __future__ import annotations

import errno
import signal
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from kvmi_libvirt import linux
from kvmi_libvirt.abi.kvmi import KVM_CHECK_EXTENSION, KVM_CREATE_VM, Ioctl
from kvmi_libvirt.emulator.channel import Channel
from kvmi_libvirt.emulator.filter import KVM_CREATE_VCPU, OBSERVED
from kvmi_libvirt.emulator.kernel import Answer, SendUnhookEvent, TakeSocket, argument_len
from kvmi_libvirt.emulator.memory import (
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    REGION_LEN,
)
from kvmi_libvirt.emulator.process import FdKind, read_argument
from kvmi_libvirt.emulator.revisions import service_for
from kvmi_libvirt.emulator.trace import traced_args
from kvmi_libvirt.newtypes import RemoteAddr, RemoteFd, Tid

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.emulator.kernel import Kernel, VmState
    from kvmi_libvirt.emulator.listener import Call, Listener
    from kvmi_libvirt.emulator.process import Process
    from kvmi_libvirt.emulator.registry import Registry, Vm
    from kvmi_libvirt.emulator.standby import OpenCalls
    from kvmi_libvirt.emulator.trace import Trace

_FEATURES: Final = (Ioctl.COMMAND, Ioctl.EVENT)
_SET_REGION: Final = (KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2)


class _CallIsGone(Exception):
    """The caller was interrupted or killed; it needs no answer."""


class _LetThrough:
    """The answer that the kernel shall carry the call out."""


_LET_THROUGH: Final = _LetThrough()
_Reply: TypeAlias = Answer | _LetThrough | None
# None: not yet, a PREUNHOOK is under way and holds the VM's lock.


@dataclass(slots=True, kw_only=True, eq=False)
class _Introspection:
    # One introspection ioctl on a VM, its argument copied, not refused.
    call: Call
    vm: Vm
    process: Process
    ioctl: Ioctl
    argument: bytes | None


@dataclass(slots=True, kw_only=True, eq=False)
class _Lock:
    # A PREUNHOOK under way, with its channel, and the calls behind it.
    holder: _Introspection
    channel: Channel
    waiting: deque[_Introspection] = field(default_factory=deque)


class Calls:
    """Answers the calls of one listener.

    Parameters
        listener, registry, kernel, trace, open_calls  borrowed
        watch  called with a VM whenever something was done to its channel
        unwatch  called with a channel's fd just before it is closed
    """

    def __init__(
        self,
        listener: Listener,
        registry: Registry,
        kernel: Kernel,
        trace: Trace,
        open_calls: OpenCalls,
        *,
        watch: Callable[[Vm], None],
        unwatch: Callable[[int], None],
    ) -> None:
        self._listener = listener
        self._registry = registry
        self._kernel = kernel
        self._trace = trace
        self._open_calls = open_calls
        self._watch = watch
        self._unwatch = unwatch
        self._locks: list[_Lock] = []
        self._ioctls = {kernel.abi.request(ioctl): ioctl for ioctl in Ioctl}

    def serve(self, call: Call) -> None:
        """Answer *call*, or keep it until it can be: exactly one answer, always."""
        try:
            reply = self._reply_to(call)
            if reply is _LET_THROUGH:
                self._listener.let_through(call)
        except _CallIsGone:
            return
        except Exception as error:
            if self._listener.is_waiting(call):
                self._fail(call, error)

    def remember(self, call: Call, region: bytes) -> None:
        """Take note of an observed call that was let through before, with its argument.

        Never raises for what has ended or was closed meanwhile.

        Parameters
            region  of KVM_SET_USER_MEMORY_REGION; else of no meaning
        """
        try:
            process = self._registry.process_of(call.tid)
            kind = process.kind_of(call.tid, call.fd)
            self._note(call, process, kind, region[:REGION_LEN])
        except OSError as error:
            self._trace.failure(f"{call.request:#x} of {call.tid}: {error!r}")

    def note_death(self, vm: Vm) -> None:
        """Take note of the end of *vm*'s channel, if it has come."""
        if vm.channel is not None and not vm.channel.is_open:
            vm.channel = None
            self._kernel.channel_died(vm.state)

    def settle(self) -> None:
        """Answer what waited for a PREUNHOOK whose event has gone out, or could not."""
        for lock in list(self._locks):
            if lock.channel.event_sent is not None:
                self._unlock(lock)

    def drop_the_dead(self) -> None:
        """End each PREUNHOOK whose caller has been killed; nothing else tells of it."""
        for lock in self._locks:
            if not self._listener.is_waiting(lock.holder.call):
                lock.channel.close()

    @property
    def are_waiting(self) -> bool:
        """Say whether calls are kept."""
        return bool(self._locks)

    def _require_waiting(self, call: Call) -> None:
        # Only now is it sure that what was read under this thread id was the caller's.
        if not self._listener.is_waiting(call):
            raise _CallIsGone

    def _fail(self, call: Call, error: Exception) -> None:
        if call.request in OBSERVED:
            # What is only observed must never fail because of the observer.
            self._listener.let_through(call)
        else:
            self._listener.answer(call, error=errno.EIO)
        self._trace.failure(f"{call.request:#x} of {call.tid}: {error!r}")

    def _reply_to(self, call: Call) -> _Reply:
        process = self._registry.process_of(call.tid)
        vm = self._registry.known(call.tid, call.fd)
        kind = process.kind_of(call.tid, call.fd) if vm is None else FdKind.VM
        if kind is FdKind.OTHER:
            self._require_waiting(call)
            return _LET_THROUGH
        ioctl = self._ioctls.get(call.request)
        if ioctl is not None:
            return self._introspection(call, process, kind, ioctl, vm)
        if call.request == KVM_CHECK_EXTENSION:
            return self._check_extension(call, process, kind)
        region = None
        if call.request in _SET_REGION:
            region = read_argument(call.tid, RemoteAddr(call.argument), REGION_LEN)
        self._note(call, process, kind, region, still=self._require_waiting)
        return _LET_THROUGH

    def _note(
        self,
        call: Call,
        process: Process,
        kind: FdKind,
        region: bytes | None,
        *,
        still: Callable[[Call], None] = lambda _: None,
    ) -> None:
        # *still* raises when what was read until then must not be believed.
        if call.request == KVM_CREATE_VM and kind is FdKind.SYSTEM:
            still(call)
            self._registry.creating(process)
        elif call.request == KVM_CREATE_VCPU and kind is FdKind.VM:
            vm = self._registry.find(process, call.tid, call.fd)
            same_mm = vm.is_owned_by(call.tid)
            still(call)
            if same_mm:
                vm.vcpu_ids.add(call.argument)
        elif call.request in _SET_REGION and kind is FdKind.VM:
            vm = self._registry.find(process, call.tid, call.fd)
            same_mm = vm.is_owned_by(call.tid)
            still(call)
            if region is not None and same_mm:
                vm.memory.set_region(region)

    def _check_extension(self, call: Call, process: Process, kind: FdKind) -> _Reply:
        if kind is FdKind.VCPU:  # no such ioctl there: the kernel says so itself
            self._require_waiting(call)
            return _LET_THROUGH
        vm = self._registry.find(process, call.tid, call.fd) if kind is FdKind.VM else None
        code = 0 if vm is None or vm.is_owned_by(call.tid) else errno.EIO
        self._require_waiting(call)
        value = 0 if code else self._kernel.check_extension(call.argument)
        if self._listener.answer(call, value=value, error=code):
            args = {"extension": call.argument}
            self._trace.ioctl(
                *(call.tid, "KVM_CHECK_EXTENSION", call.request, lambda: args),
                errno=code,
                ret=-1 if code else value,
            )
        return Answer(errno=code, value=value)

    def _introspection(
        self, call: Call, process: Process, kind: FdKind, ioctl: Ioctl, known: Vm | None
    ) -> _Reply:
        argument = read_argument(call.tid, RemoteAddr(call.argument), argument_len(ioctl))
        if kind is not FdKind.VM:
            self._require_waiting(call)
            return self._answer(call, ioctl, argument, Answer(errno=errno.EINVAL))
        vm = known or self._registry.find(process, call.tid, call.fd)
        same_mm = vm.is_owned_by(call.tid)
        if ioctl in _FEATURES and not self._locks:
            return self._feature(call, vm, ioctl, argument, same_mm=same_mm)
        self._require_waiting(call)
        refusal = self._kernel.refuse(ioctl, argument, same_mm=same_mm)
        if refusal is not None:
            return self._answer(call, ioctl, argument, refusal)
        made = _Introspection(call=call, vm=vm, process=process, ioctl=ioctl, argument=argument)
        for lock in self._locks:
            if lock.holder.vm is vm:
                self._open_calls.keep(call)
                lock.waiting.append(made)
                return None
        return self._carry_out(made)

    def _feature(
        self, call: Call, vm: Vm, ioctl: Ioctl, argument: bytes | None, *, same_mm: bool
    ) -> Answer:
        # A tracer makes dozens of these while QEMU stands still. That the answer finds the
        # caller waiting is as good as having asked before; where it does not, nothing was done.
        state = vm.state
        undo = partial(_set_masks, state, state.commands, state.events)
        answer = self._kernel.handle(state, ioctl, argument, same_mm=same_mm)
        assert isinstance(answer, Answer)
        return self._answer(call, ioctl, argument, answer, undo)

    def _carry_out(self, made: _Introspection) -> Answer | None:
        answer = self._decide(made)
        if answer is None:
            return None
        undo = None
        if made.ioctl is Ioctl.HOOK and not answer.errno:
            undo = partial(self._undo_hook, made.vm)
        return self._answer(made.call, made.ioctl, made.argument, answer, undo)

    def _answer(
        self,
        call: Call,
        ioctl: Ioctl,
        argument: bytes | None,
        answer: Answer,
        undo: Callable[[], None] | None = None,
    ) -> Answer:
        is_answered = False
        try:
            is_answered = self._listener.answer(call, value=answer.value, error=answer.errno)
        finally:
            if undo is not None and not is_answered:
                undo()
        if is_answered:
            args = partial(traced_args, ioctl, argument, call.argument)
            self._trace.ioctl(call.tid, ioctl.value, call.request, args, errno=answer.errno)
        return answer

    def _decide(self, made: _Introspection) -> Answer | None:
        # None: the PREUNHOOK is under way, and holds the VM's lock.
        vm = made.vm
        if made.ioctl is Ioctl.HOOK and vm.state.awaits_vcpus and vm.vcpus_run():
            self._kernel.vcpus_ran(vm.state)
        outcome = self._kernel.carry_out(vm.state, made.ioctl, made.argument)
        if isinstance(outcome, TakeSocket):
            channel = self._take_socket(made, RemoteFd(outcome.fd))
            answer = self._kernel.complete_hook(
                vm.state, outcome, is_socket=channel is not None, vcpu_count=vm.vcpu_count()
            )
            vm.channel = channel
            self._watch(vm)
            return answer
        if isinstance(outcome, SendUnhookEvent):
            return self._preunhook(made, outcome.seq)
        if outcome.drop_channel:
            vm.close_channel()
        return outcome

    def _take_socket(self, made: _Introspection, fd: RemoteFd) -> Channel | None:
        try:
            copy = made.process.copy_fd(made.call.tid, fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                return None
            raise
        service = service_for(self._kernel.abi, made.vm.state, made.vm)
        try:
            return Channel(copy, service, released=self._unwatch)
        except OSError:
            return None

    def _undo_hook(self, vm: Vm) -> None:
        # Without a shutdown: the caller will hook this very socket again.
        if vm.channel is not None:
            vm.channel.release()
            vm.channel = None
        self._kernel.forget_hook(vm.state)

    # -- PREUNHOOK, and who waits behind it ----------------------------------------------

    def _preunhook(self, made: _Introspection, seq: int) -> Answer | None:
        channel = made.vm.channel
        if channel is not None:
            channel.send_event(seq)
            self._watch(made.vm)
            if channel.event_sent is None:
                self._open_calls.keep(made.call)
                self._locks.append(_Lock(holder=made, channel=channel))
                return None
        return self._end_preunhook(made, channel)

    def _end_preunhook(self, made: _Introspection, channel: Channel | None) -> Answer:
        sent = channel is not None and bool(channel.event_sent)
        if not sent and (channel is None or not channel.is_open):
            # The kernel sends without MSG_NOSIGNAL, from its caller's thread.
            try:
                linux.tgkill(made.process.pid, Tid(made.call.tid), signal.SIGPIPE)
            except ProcessLookupError:
                pass
        self.note_death(made.vm)
        return self._kernel.complete_preunhook(sent=sent)

    def _unlock(self, lock: _Lock) -> None:
        self._locks.remove(lock)
        holder = lock.holder
        if self._listener.is_waiting(holder.call):
            answer = self._end_preunhook(holder, lock.channel)
            self._answer(holder.call, holder.ioctl, holder.argument, answer)
        self._open_calls.drop(holder.call)
        while lock.waiting:
            waiting = lock.waiting.popleft()
            if self._listener.is_waiting(waiting.call) and self._carry_out(waiting) is None:
                # Again a PREUNHOOK that has to wait.
                self._locks[-1].waiting.extend(lock.waiting)
                return
            self._open_calls.drop(waiting.call)


def _set_masks(state: VmState, commands: int, events: int) -> None:
    state.commands, state.events = commands, events
