# SPDX-License-Identifier: Apache-2.0
"""The introspection protocol as the downstream v7 speaks it, where it differs.

Pure; imports ``abi`` and the emulator's pure modules only. Source: KVM-VMI kernel
branch kvmi-v7 and libkvmi (not run).
"""

from __future__ import annotations

import struct
from typing import Final

from kvmi_libvirt.emulator.protocol import (
    CHECK,
    CONTROL_EVENTS,
    KVM_EINVAL,
    KVM_ENOSYS,
    KVM_EOPNOTSUPP,
    KVM_EPERM,
    KVMI_VERSION,
    VCPU_HEADER,
    ChannelBroken,
    Refused,
    Service,
    unpack,
)

_HEADER: Final = struct.Struct("<HHI")  # id, payload size, seq
_VERSION: Final = struct.Struct("<II8s")  # version, padding, features
_PHYSICAL: Final = struct.Struct("<QQ")  # gpa, size

_EVENT_MESSAGE: Final = 1  # kernel to tool, for every event
_EVENT_REPLY: Final = 0  # the tool's answer to it
_EVENT_LEN: Final = 544  # struct kvmi_event on x86-64, registers included
_EVENT: Final = struct.Struct(f"<HHB3x{_EVENT_LEN - 8}x")  # size, vcpu, event id

# A command with a handler but without a bit in the kernel's mask: known, never allowed.
_NEVER_ALLOWED: Final = 26  # KVMI_VM_SET_PAGE_WRITE_BITMAP

# UNHOOK, CREATE_VCPU and CMD_ERROR: what VM_CONTROL_EVENTS takes.
_VM_EVENTS: Final = frozenset({0, 9, 12})


class ServiceV7(Service):
    """Answers messages with the rights of one VM, as the downstream v7 does.

    An id below the mask's width that names nothing is "denied", not "unknown"; what
    later revisions answer with EINVAL for a vCPU's header ends the channel here.
    """

    vcpu_event_id = _EVENT_REPLY
    physical = _PHYSICAL

    def unhook_event(self, seq: int) -> bytes:
        """Return the event by which PREUNHOOK asks the tool to let go."""
        header = _HEADER.pack(_EVENT_MESSAGE, _EVENT_LEN, seq)
        return header + _EVENT.pack(_EVENT_LEN, 0, 0)

    def _code_of_unknown(self, message_id: int) -> int:
        return KVM_EPERM if message_id == _NEVER_ALLOWED else KVM_ENOSYS

    def _check_vcpu(self, payload: bytes) -> None:
        index, *padding = unpack(VCPU_HEADER, payload)
        if any(padding):
            raise ChannelBroken("padding in the vCPU's header")
        self._require_vcpu(index)

    def _get_version(self, _payload: bytes) -> bytes:
        return _VERSION.pack(KVMI_VERSION, 0, bytes(8))

    def _check_command(self, payload: bytes) -> bytes:
        command_id, *padding = unpack(CHECK, payload)
        if any(padding) or command_id >= self._abi.command_slots:
            raise Refused(KVM_EINVAL)
        if not self._vm.allows_command(command_id):
            raise Refused(KVM_EPERM)
        return b""

    def _check_event(self, payload: bytes) -> bytes:
        event_id, *padding = unpack(CHECK, payload)
        if any(padding) or event_id >= self._abi.event_slots:
            raise Refused(KVM_EINVAL)
        if not self._vm.allows_event(event_id):
            raise Refused(KVM_EPERM)
        return b""

    def _control_events(self, payload: bytes) -> bytes:
        event_id, enable, *padding = unpack(CONTROL_EVENTS, payload)
        if any(padding) or event_id not in _VM_EVENTS:
            raise Refused(KVM_EINVAL)
        if not self._vm.allows_event(event_id):
            raise Refused(KVM_EPERM)
        return self._subscribe(event_id, enable=bool(enable))

    def _pause_vcpu(self, payload: bytes) -> bytes:
        # Served by the receiving thread, so a bad header is answered here.
        if not self._vm.allows_event(self._pause_event_id):
            raise ChannelBroken("PAUSE_VCPU without the PAUSE event")
        index, *padding = unpack(VCPU_HEADER, payload)
        if any(padding) or index >= self._guest.vcpu_count():
            raise Refused(KVM_EINVAL)
        raise Refused(KVM_EOPNOTSUPP)
