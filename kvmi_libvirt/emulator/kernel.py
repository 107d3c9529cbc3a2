# SPDX-License-Identifier: Apache-2.0
"""The kernel's side of the five introspection ioctls, as a pure state machine.

Given the state of one VM and a call whose argument was already copied, it says
what the kernel would answer, in the kernel's own order of checks. What needs a
system call (is this fd a socket? did the event go out?) is handed back as a
question, and the answer given to ``complete_*``. No file, socket or clock here.
Imports ``abi`` and ``emulator.faults`` only.

Source: what a kernel with the v11 layer was seen to answer, call by call (the
data is in tests/data/emulator-kernel-replay.jsonl); the patch series for the rest.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from kvmi_libvirt.abi.kvmi import ALL_IDS, Ioctl
from kvmi_libvirt.emulator.faults import NO_FAULTS

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.emulator.faults import Faults

_FEATURE: Final = struct.Struct("=Ii")  # struct kvm_introspection_feature: allow, id
_HOOK: Final = struct.Struct("=iI16s")  # struct kvm_introspection_hook: fd, padding, uuid

EVENT_UNHOOK: Final = 0
"""Id of the VM event that PREUNHOOK sends, the same in every revision."""

EXTENSION_VALUE: Final = 1
"""What KVM_CHECK_EXTENSION answers for the introspection capability."""


@dataclass(slots=True, kw_only=True)
class VmState:
    """What the kernel keeps for one VM. Masks are bitmaps indexed by id.

    ``connected`` follows the channel, ``hooked`` does not: a channel that died
    leaves the VM hooked until UNHOOK.

    ``introspected_vcpus`` is how many vCPUs there were at HOOK: those that come later
    have no introspection data.

    ``awaits_vcpus`` and the two counts belong to faults that are switched on: HOOK is
    refused while the vCPUs have not run, and so many times for no other reason.
    """

    hooked: bool = False
    connected: bool = False
    commands: int = 0
    events: int = 0
    subscribed: int = 0
    event_seq: int = 0
    cleanup_on_unhook: bool = True
    uuid: bytes = b""
    introspected_vcpus: int = 0
    awaits_vcpus: bool = False
    eexist_left: int = 0
    enomem_met: int = 0

    def allows_command(self, command_id: int) -> bool:
        """Say whether the tool may send the command with this id."""
        return bool(self.commands >> command_id & 1)

    def allows_event(self, event_id: int) -> bool:
        """Say whether the tool may be sent the event with this id."""
        return bool(self.events >> event_id & 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The end of a call: *errno* (0 is success) and *value*.

    With ``drop_channel`` the tool's socket must be shut down in both directions.
    """

    errno: int = 0
    value: int = 0
    drop_channel: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeSocket:
    """HOOK so far: take *fd* of the caller, then call :meth:`Kernel.complete_hook`."""

    fd: int
    uuid: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SendUnhookEvent:
    """PREUNHOOK so far: send it, then call :meth:`Kernel.complete_preunhook`."""

    seq: int


_DONE: Final = Answer()

Outcome: TypeAlias = Answer | TakeSocket | SendUnhookEvent


def argument_len(ioctl: Ioctl) -> int:
    """Return the length in bytes of the structure *ioctl* points to; 0 if it takes none."""
    if ioctl is Ioctl.HOOK:
        return _HOOK.size
    return _FEATURE.size if ioctl is Ioctl.COMMAND or ioctl is Ioctl.EVENT else 0


class Kernel:
    """The rules of the generic layer as v10, v11 and v12 have it.

    A revision with other rules (the downstream v7) is a subclass that overrides
    the checks it has in another order; nobody else looks at the revision.

    Parameters
        abi     the revision's table
        faults  what shall go wrong
    """

    def __init__(self, abi: KvmiAbi, *, faults: Faults = NO_FAULTS) -> None:
        self.abi = abi
        self.faults = faults
        self._always_allowed_ids = abi.always_allowed_ids
        self._always_allowed = sum(1 << command_id for command_id in self._always_allowed_ids)

    def check_extension(self, extension: int) -> int:
        """Return what KVM_CHECK_EXTENSION answers; 0 for all but ``abi.capability``."""
        is_there = extension == self.abi.capability and self._has_capability()
        return EXTENSION_VALUE if is_there else 0

    def refuse(self, ioctl: Ioctl, argument: bytes | None, *, same_mm: bool) -> Answer | None:
        """Return the refusal that needs no look at the VM's introspection, if there is one.

        The kernel makes these checks before it takes the lock behind which calls wait.
        Parameters as for :meth:`handle`.
        """
        if not same_mm:
            return Answer(errno=errno.EIO)
        if self._is_gated(ioctl) and self.faults.introspection_off:
            return Answer(errno=errno.EPERM)
        if not argument_len(ioctl):
            return None
        if argument is None:
            return Answer(errno=errno.EFAULT)
        code = self._argument_error(ioctl, argument)
        return Answer(errno=code) if code else None

    def handle(
        self, vm: VmState, ioctl: Ioctl, argument: bytes | None, *, same_mm: bool
    ) -> Outcome:
        """Say what becomes of one ioctl on the fd of *vm*.

        A refused call changes nothing in *vm*.

        Parameters
            argument  the structure the call points to; None when it cannot be read;
                      ignored for UNHOOK and PREUNHOOK
            same_mm   the caller has the address space that created the VM
        """
        refusal = self.refuse(ioctl, argument, same_mm=same_mm)
        return refusal or self.carry_out(vm, ioctl, argument)

    def carry_out(self, vm: VmState, ioctl: Ioctl, argument: bytes | None) -> Outcome:
        """Say what becomes of an ioctl that was not refused, as :meth:`handle` does."""
        if ioctl is Ioctl.UNHOOK:
            return self._unhook(vm)
        if ioctl is Ioctl.PREUNHOOK:
            return self._preunhook(vm)
        assert argument is not None
        return (self._hook if ioctl is Ioctl.HOOK else self._feature)(vm, ioctl, argument)

    def complete_hook(
        self, vm: VmState, hook: TakeSocket, *, is_socket: bool, vcpu_count: int
    ) -> Answer:
        """End the HOOK that asked for a socket; on success *vm* starts afresh."""
        if not is_socket:
            return Answer(errno=errno.EINVAL)
        self._reset(vm)
        vm.hooked = vm.connected = True
        vm.commands = self._always_allowed
        vm.uuid = hook.uuid
        vm.introspected_vcpus = vcpu_count
        return Answer()

    def complete_preunhook(self, *, sent: bool) -> Answer:
        """End the PREUNHOOK that asked for the event to be sent."""
        return Answer() if sent else Answer(errno=errno.ENOENT)

    def channel_died(self, vm: VmState) -> None:
        """Take note that the tool is gone. The VM stays hooked, as it does in the kernel."""
        vm.connected = False

    def forget_hook(self, vm: VmState) -> None:
        """Undo a HOOK whose caller was interrupted and will make the call again."""
        self._reset(vm)

    def vcpus_ran(self, vm: VmState) -> None:
        """Take note that every vCPU has been in KVM_RUN since UNHOOK."""
        vm.awaits_vcpus = False

    def _has_capability(self) -> bool:
        return not self.faults.introspection_off

    def _is_gated(self, _ioctl: Ioctl) -> bool:
        # By the module parameter.
        return True

    def _argument_error(self, ioctl: Ioctl, argument: bytes) -> int:
        if ioctl is Ioctl.HOOK:
            return _padding_error(argument)
        allow, feature_id = _FEATURE.unpack(argument)
        if not ALL_IDS <= feature_id < self._slots(ioctl) or allow > 1:
            return errno.EINVAL
        return 0

    def _hook(self, vm: VmState, _ioctl: Ioctl, argument: bytes) -> Outcome:
        fd, _, uuid = _HOOK.unpack(argument)
        if vm.hooked or vm.awaits_vcpus:
            return Answer(errno=errno.EEXIST)
        if vm.eexist_left:
            vm.eexist_left -= 1
            return Answer(errno=errno.EEXIST)
        count = self.faults.enomem_count
        if self.faults.enomem and (count is None or vm.enomem_met < count):
            vm.enomem_met += 1
            return Answer(errno=errno.ENOMEM)
        return TakeSocket(fd=fd, uuid=uuid)

    def _unhook(self, vm: VmState) -> Answer:
        was_hooked = vm.hooked
        self._reset(vm)
        if was_hooked and self.faults.eexist_after_unhook:
            count = self.faults.eexist_count
            vm.awaits_vcpus, vm.eexist_left = count is None, count or 0
        return Answer(drop_channel=was_hooked)

    def _preunhook(self, vm: VmState) -> Outcome:
        if not vm.hooked:
            return Answer(errno=errno.EFAULT)
        # Only the subscription counts: an event disallowed meanwhile is still sent,
        # and to a tool that is gone, too.
        if not vm.subscribed >> EVENT_UNHOOK & 1:
            return Answer(errno=errno.ENOENT)
        vm.event_seq += 1
        return SendUnhookEvent(seq=vm.event_seq)

    def _feature(self, vm: VmState, ioctl: Ioctl, argument: bytes) -> Answer:
        if not vm.hooked:
            return Answer(errno=errno.EFAULT)
        allow, feature_id = _FEATURE.unpack(argument)
        if self._is_protected(ioctl, allow, feature_id):
            return Answer(errno=errno.EPERM)
        # Any other bit is ignored where a revision does not refuse it.
        allow = bool(allow & 1)
        selected = self._selected(ioctl, feature_id)
        if ioctl is Ioctl.COMMAND:
            vm.commands = _changed(vm.commands, selected, allow=allow)
            vm.commands |= self._always_allowed
        else:
            vm.events = _changed(vm.events, selected, allow=allow)
        return _DONE

    def _slots(self, ioctl: Ioctl) -> int:
        return self.abi.command_slots if ioctl is Ioctl.COMMAND else self.abi.event_slots

    def _selected(self, ioctl: Ioctl, feature_id: int) -> int:
        # An id that is nothing is a bit all the same.
        return (1 << self._slots(ioctl)) - 1 if feature_id == ALL_IDS else 1 << feature_id

    def _is_protected(self, ioctl: Ioctl, allow: int, feature_id: int) -> bool:
        return ioctl is Ioctl.COMMAND and not allow & 1 and feature_id in self._always_allowed_ids

    @staticmethod
    def _reset(vm: VmState) -> None:
        vm.hooked = vm.connected = False
        vm.commands = vm.events = vm.subscribed = vm.event_seq = 0
        vm.introspected_vcpus = 0
        vm.cleanup_on_unhook = True
        vm.uuid = b""


def _changed(mask: int, selected: int, *, allow: bool) -> int:
    return mask | selected if allow else mask & ~selected


def _padding_error(argument: bytes) -> int:
    _, padding, _ = _HOOK.unpack(argument)
    return errno.EINVAL if padding else 0


class KernelV7(Kernel):
    """The rules of the downstream v7, where they are others.

    The module parameter gates HOOK only; a permission that cannot be taken away is
    refused before it is known whether the VM is hooked; any odd *allow* allows; an id
    that names nothing is accepted and ignored.

    Source: KVM-VMI kernel branch kvmi-v7 (not run).
    """

    def _has_capability(self) -> bool:
        # Built with introspection, whether it is on or off.
        return True

    def _is_gated(self, ioctl: Ioctl) -> bool:
        return ioctl is Ioctl.HOOK

    def _argument_error(self, ioctl: Ioctl, argument: bytes) -> int:
        if ioctl is Ioctl.HOOK:
            return _padding_error(argument)
        allow, feature_id = _FEATURE.unpack(argument)
        if feature_id < ALL_IDS:
            return errno.EINVAL
        return errno.EPERM if self._is_protected(ioctl, allow, feature_id) else 0

    def _selected(self, ioctl: Ioctl, feature_id: int) -> int:
        entries = self.abi.commands if ioctl is Ioctl.COMMAND else self.abi.events
        known = sum(1 << entry.id for entry in entries)
        return known if feature_id == ALL_IDS else known & 1 << min(feature_id, self._slots(ioctl))
