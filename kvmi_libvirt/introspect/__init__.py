# SPDX-License-Identifier: Apache-2.0
"""Hook, verify, change and unhook one running VM, from its policy to the recorded state.

May import everything below the hook, the agent and the command line.
"""

from __future__ import annotations

from kvmi_libvirt.introspect.changing import change_vm, follow_policy, lower_vm
from kvmi_libvirt.introspect.hooking import (
    ALREADY_HOOKED,
    OnHooked,
    ensure_hooked,
    hook_vm,
    record_failure,
)
from kvmi_libvirt.introspect.probing import SESSION_S, probe_revision
from kvmi_libvirt.introspect.records import OVERTAKEN, abi_of, is_same_process
from kvmi_libvirt.introspect.seeing import (
    channel_is_open,
    interrupted,
    look_at,
    process_runs,
    public_fields,
    unwatched_vcpus,
    verified,
)
from kvmi_libvirt.introspect.unhooking import (
    ask_to_leave,
    clean_up,
    take_leave,
    unhook_unrecorded,
    unhook_vm,
)

__all__ = [
    "ALREADY_HOOKED",
    "OVERTAKEN",
    "SESSION_S",
    "OnHooked",
    "abi_of",
    "ask_to_leave",
    "change_vm",
    "channel_is_open",
    "clean_up",
    "ensure_hooked",
    "follow_policy",
    "hook_vm",
    "interrupted",
    "is_same_process",
    "look_at",
    "lower_vm",
    "probe_revision",
    "process_runs",
    "public_fields",
    "record_failure",
    "take_leave",
    "unhook_unrecorded",
    "unhook_vm",
    "unwatched_vcpus",
    "verified",
]
