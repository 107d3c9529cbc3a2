# SPDX-License-Identifier: Apache-2.0
"""KVMI v12 (October 2021), the last revision posted and the canonical set of names.

Even ids are VM messages, odd ids are answered by a vCPU. The bitmaps have 30
and 20 slots; an id below that which is no command is accepted by the ioctl all
the same (a real kernel was seen to do so).

Source: patches 30, 36, 70 and 72 of 77; capability 206 from the KVM-VMI QEMU
branch of the same revision (the kernel header itself was not seen).
"""

from typing import Final

from kvmi_libvirt.abi.kvmi import Command, Event, KvmiAbi, Numbers, Scope

_COMMANDS: Final = (
    Command(
        id=2,
        name="KVMI_GET_VERSION",
        kernel_name="KVMI_GET_VERSION",
        scope=Scope.VM,
        meaning="protocol version plus hardware feature flags (v10+: also the payload limit)",
        always_allowed=True,
    ),
    Command(
        id=3,
        name="KVMI_VCPU_GET_INFO",
        kernel_name="KVMI_VCPU_GET_INFO",
        scope=Scope.VCPU,
        meaning="TSC frequency of a vCPU (0 if unknown)",
    ),
    Command(
        id=4,
        name="KVMI_VM_CHECK_COMMAND",
        kernel_name="KVMI_VM_CHECK_COMMAND",
        scope=Scope.VM,
        meaning="asks whether one command id exists and is permitted",
        always_allowed=True,
    ),
    Command(
        id=5,
        name="KVMI_VCPU_CONTROL_EVENTS",
        kernel_name="KVMI_VCPU_CONTROL_EVENTS",
        scope=Scope.VCPU,
        meaning="turn per-vCPU notifications on/off",
    ),
    Command(
        id=6,
        name="KVMI_VM_CHECK_EVENT",
        kernel_name="KVMI_VM_CHECK_EVENT",
        scope=Scope.VM,
        meaning="asks whether one event id exists and is permitted",
        always_allowed=True,
    ),
    Command(
        id=7,
        name="KVMI_VCPU_GET_REGISTERS",
        kernel_name="KVMI_VCPU_GET_REGISTERS",
        scope=Scope.VCPU,
        meaning="read general/special registers, chosen MSRs and CPU mode",
    ),
    Command(
        id=8,
        name="KVMI_VM_GET_INFO",
        kernel_name="KVMI_VM_GET_INFO",
        scope=Scope.VM,
        meaning="number of online vCPUs",
    ),
    Command(
        id=9,
        name="KVMI_VCPU_SET_REGISTERS",
        kernel_name="KVMI_VCPU_SET_REGISTERS",
        scope=Scope.VCPU,
        meaning="replace general registers (applied when the pending event is answered)",
    ),
    Command(
        id=10,
        name="KVMI_VM_CONTROL_EVENTS",
        kernel_name="KVMI_VM_CONTROL_EVENTS",
        scope=Scope.VM,
        meaning="turn VM-wide notifications on/off",
    ),
    Command(
        id=11,
        name="KVMI_VCPU_GET_CPUID",
        kernel_name="KVMI_VCPU_GET_CPUID",
        scope=Scope.VCPU,
        meaning="read one CPUID leaf as the guest sees it",
    ),
    Command(
        id=12,
        name="KVMI_VM_READ_PHYSICAL",
        kernel_name="KVMI_VM_READ_PHYSICAL",
        scope=Scope.VM,
        meaning="read guest RAM inside one page",
    ),
    Command(
        id=13,
        name="KVMI_VCPU_CONTROL_CR",
        kernel_name="KVMI_VCPU_CONTROL_CR",
        scope=Scope.VCPU,
        meaning="choose which of CR0/CR3/CR4 writes are reported",
    ),
    Command(
        id=14,
        name="KVMI_VM_WRITE_PHYSICAL",
        kernel_name="KVMI_VM_WRITE_PHYSICAL",
        scope=Scope.VM,
        meaning="write guest RAM inside one page",
    ),
    Command(
        id=15,
        name="KVMI_VCPU_INJECT_EXCEPTION",
        kernel_name="KVMI_VCPU_INJECT_EXCEPTION",
        scope=Scope.VCPU,
        meaning="inject an exception into a vCPU",
    ),
    Command(
        id=16,
        name="KVMI_VM_PAUSE_VCPU",
        kernel_name="KVMI_VM_PAUSE_VCPU",
        scope=Scope.VM,
        meaning="kick a vCPU out of the guest; it then emits one PAUSE notification",
    ),
    Command(
        id=17,
        name="KVMI_VCPU_GET_XCR",
        kernel_name="KVMI_VCPU_GET_XCR",
        scope=Scope.VCPU,
        meaning="read an extended control register (only XCR0)",
    ),
    Command(
        id=18,
        name="KVMI_VM_CONTROL_CLEANUP",
        kernel_name="KVMI_VM_CONTROL_CLEANUP",
        scope=Scope.VM,
        meaning="choose whether interception state is restored when unhooking (default: yes)",
    ),
    Command(
        id=19,
        name="KVMI_VCPU_GET_XSAVE",
        kernel_name="KVMI_VCPU_GET_XSAVE",
        scope=Scope.VCPU,
        meaning="read the XSAVE area",
    ),
    Command(
        id=20,
        name="KVMI_VM_SET_PAGE_ACCESS",
        kernel_name="KVMI_VM_SET_PAGE_ACCESS",
        scope=Scope.VM,
        meaning="set r/w/x permission of a list of guest pages",
    ),
    Command(
        id=21,
        name="KVMI_VCPU_SET_XSAVE",
        kernel_name="KVMI_VCPU_SET_XSAVE",
        scope=Scope.VCPU,
        meaning="replace the XSAVE area",
    ),
    Command(
        id=23,
        name="KVMI_VCPU_GET_MTRR_TYPE",
        kernel_name="KVMI_VCPU_GET_MTRR_TYPE",
        scope=Scope.VCPU,
        meaning="memory type of a guest physical address",
    ),
    Command(
        id=25,
        name="KVMI_VCPU_CONTROL_MSR",
        kernel_name="KVMI_VCPU_CONTROL_MSR",
        scope=Scope.VCPU,
        meaning="choose which MSR writes are reported",
    ),
    Command(
        id=27,
        name="KVMI_VCPU_CONTROL_SINGLESTEP",
        kernel_name="KVMI_VCPU_CONTROL_SINGLESTEP",
        scope=Scope.VCPU,
        meaning="start/stop single stepping a vCPU",
    ),
    Command(
        id=29,
        name="KVMI_VCPU_TRANSLATE_GVA",
        kernel_name="KVMI_VCPU_TRANSLATE_GVA",
        scope=Scope.VCPU,
        meaning="guest virtual to guest physical translation (all ones if unmapped)",
    ),
)

_EVENTS: Final = (
    Event(
        id=0,
        name="KVMI_VM_EVENT_UNHOOK",
        kernel_name="KVMI_VM_EVENT_UNHOOK",
        scope=Scope.VM,
        meaning="the VM is about to pause, migrate or stop: the tool should undo its changes",
    ),
    Event(
        id=1,
        name="KVMI_VCPU_EVENT_PAUSE",
        kernel_name="KVMI_VCPU_EVENT_PAUSE",
        scope=Scope.VCPU,
        meaning="vCPU stopped as a result of the pause command",
    ),
    Event(
        id=3,
        name="KVMI_VCPU_EVENT_HYPERCALL",
        kernel_name="KVMI_VCPU_EVENT_HYPERCALL",
        scope=Scope.VCPU,
        meaning="guest executed the introspection hypercall",
    ),
    Event(
        id=5,
        name="KVMI_VCPU_EVENT_BREAKPOINT",
        kernel_name="KVMI_VCPU_EVENT_BREAKPOINT",
        scope=Scope.VCPU,
        meaning="guest hit a software breakpoint",
    ),
    Event(
        id=7,
        name="KVMI_VCPU_EVENT_CR",
        kernel_name="KVMI_VCPU_EVENT_CR",
        scope=Scope.VCPU,
        meaning="guest wrote a monitored control register",
    ),
    Event(
        id=9,
        name="KVMI_VCPU_EVENT_TRAP",
        kernel_name="KVMI_VCPU_EVENT_TRAP",
        scope=Scope.VCPU,
        meaning="an injected exception was (or was not) delivered",
    ),
    Event(
        id=11,
        name="KVMI_VCPU_EVENT_XSETBV",
        kernel_name="KVMI_VCPU_EVENT_XSETBV",
        scope=Scope.VCPU,
        meaning="guest wrote XCR0 via XSETBV",
    ),
    Event(
        id=13,
        name="KVMI_VCPU_EVENT_DESCRIPTOR",
        kernel_name="KVMI_VCPU_EVENT_DESCRIPTOR",
        scope=Scope.VCPU,
        meaning="guest accessed IDTR/GDTR/LDTR/TR",
    ),
    Event(
        id=15,
        name="KVMI_VCPU_EVENT_MSR",
        kernel_name="KVMI_VCPU_EVENT_MSR",
        scope=Scope.VCPU,
        meaning="guest wrote a monitored MSR",
    ),
    Event(
        id=17,
        name="KVMI_VCPU_EVENT_PF",
        kernel_name="KVMI_VCPU_EVENT_PF",
        scope=Scope.VCPU,
        meaning="guest access denied by page permissions set by the tool",
    ),
    Event(
        id=19,
        name="KVMI_VCPU_EVENT_SINGLESTEP",
        kernel_name="KVMI_VCPU_EVENT_SINGLESTEP",
        scope=Scope.VCPU,
        meaning="one instruction was single stepped (or stepping failed)",
    ),
)

V12: Final = KvmiAbi(
    name="v12",
    title="KVMI v12 (October 2021)",
    capability=206,
    numbers=Numbers(hook=0xC8, unhook=0xC9, command=0xCA, event=0xCB, preunhook=0xCC),
    command_slots=30,
    event_slots=20,
    handshake_size=104,
    commands=_COMMANDS,
    events=_EVENTS,
)
