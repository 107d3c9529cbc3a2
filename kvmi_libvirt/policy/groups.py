# SPDX-License-Identifier: Apache-2.0
"""Groups: commands and events that give away the same kind of thing.

Every command of every revision is in exactly one group, and so is every event: what
a rule with a group means never depends on which rule comes first. A group holds the
names of all revisions; those that a kernel lacks are left out without complaint.
Pure; imports abi.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One group.

    Parameters
        threat    what a compromised tool could do with it, in one line
        commands  canonical names
        events    canonical names; empty for a group that has none
    """

    threat: str
    commands: frozenset[str]
    events: frozenset[str] = frozenset()


GROUPS: Final[Mapping[str, Group]] = MappingProxyType(
    {
        "query": Group(
            threat="learn size, CPU model and memory layout of the machine",
            commands=frozenset(
                {
                    "KVMI_GET_VERSION",
                    "KVMI_VM_CHECK_COMMAND",
                    "KVMI_VM_CHECK_EVENT",
                    "KVMI_VM_GET_INFO",
                    "KVMI_VCPU_GET_INFO",
                    "KVMI_VM_GET_MAX_GFN",
                    "KVMI_VCPU_GET_CPUID",
                    "KVMI_VCPU_GET_MTRR_TYPE",
                }
            ),
            events=frozenset(
                {"KVMI_VM_EVENT_UNHOOK", "KVMI_EVENT_CREATE_VCPU", "KVMI_EVENT_CMD_ERROR"}
            ),
        ),
        "memory-read": Group(
            threat="steal every secret in the guest's memory",
            commands=frozenset(
                {"KVMI_VM_READ_PHYSICAL", "KVMI_VCPU_TRANSLATE_GVA", "KVMI_VCPU_GET_EPT_VIEW"}
            ),
        ),
        "memory-write": Group(
            threat="take over the guest completely",
            commands=frozenset(
                {"KVMI_VM_WRITE_PHYSICAL", "KVMI_VM_GET_MAP_TOKEN", "KVMI_VCPU_CHANGE_GFN"}
            ),
        ),
        "memory-protect": Group(
            threat="hang or crash the guest; with the PF event, follow and steer what it executes",
            commands=frozenset(
                {
                    "KVMI_VM_SET_PAGE_ACCESS",
                    "KVMI_VM_CONTROL_SPP",
                    "KVMI_VM_SET_PAGE_SVE",
                    "KVMI_VCPU_SET_VE_INFO",
                    "KVMI_VCPU_DISABLE_VE",
                    "KVMI_VCPU_SET_EPT_VIEW",
                    "KVMI_VCPU_CONTROL_EPT_VIEW",
                }
            ),
            events=frozenset({"KVMI_VCPU_EVENT_PF"}),
        ),
        "registers-read": Group(
            threat="steal keys held in registers; find the guest's kernel in memory",
            commands=frozenset(
                {"KVMI_VCPU_GET_REGISTERS", "KVMI_VCPU_GET_XCR", "KVMI_VCPU_GET_XSAVE"}
            ),
        ),
        "registers-write": Group(
            threat="take over the guest completely",
            commands=frozenset({"KVMI_VCPU_SET_REGISTERS", "KVMI_VCPU_SET_XSAVE"}),
            events=frozenset(
                {
                    "KVMI_VCPU_EVENT_CR",
                    "KVMI_VCPU_EVENT_MSR",
                    "KVMI_VCPU_EVENT_XSETBV",
                    "KVMI_VCPU_EVENT_DESCRIPTOR",
                    "KVMI_EVENT_CPUID",
                }
            ),
        ),
        "events-control": Group(
            threat="slow the guest down; be told of what the events allow",
            commands=frozenset(
                {
                    "KVMI_VM_CONTROL_EVENTS",
                    "KVMI_VCPU_CONTROL_EVENTS",
                    "KVMI_VCPU_CONTROL_CR",
                    "KVMI_VCPU_CONTROL_MSR",
                    "KVMI_VM_CONTROL_CLEANUP",
                    "KVMI_VM_CONTROL_CMD_RESPONSE",
                }
            ),
        ),
        "vcpu-control": Group(
            threat="stop the guest for as long as it likes, crash it, follow every instruction",
            commands=frozenset(
                {
                    "KVMI_VM_PAUSE_VCPU",
                    "KVMI_VCPU_INJECT_EXCEPTION",
                    "KVMI_VCPU_CONTROL_SINGLESTEP",
                }
            ),
            events=frozenset(
                {
                    "KVMI_VCPU_EVENT_PAUSE",
                    "KVMI_VCPU_EVENT_HYPERCALL",
                    "KVMI_VCPU_EVENT_BREAKPOINT",
                    "KVMI_VCPU_EVENT_TRAP",
                    "KVMI_VCPU_EVENT_SINGLESTEP",
                }
            ),
        ),
    }
)
