# SPDX-License-Identifier: Apache-2.0
"""Judge one VM: why it is not hooked, or would not be. The causes come first. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt.abi.probing import Outcome
from kvmi_libvirt.doctor.check_files import FORGET_RECORD, START_AGENT, socket_problem
from kvmi_libvirt.doctor.check_host import what_to_do
from kvmi_libvirt.doctor.report import Check, Line, Verdict
from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.policy.model import Mode
from kvmi_libvirt.quoting import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.doctor.facts import AgentFacts, KernelFacts, VmFacts
    from kvmi_libvirt.policy.model import Policy


def check_vm(
    vm: VmFacts, kernel: KernelFacts, agent: AgentFacts, *, qemu_uid: int | None
) -> Iterator[Line]:
    """Yield everything about *vm*, in the order in which one thing needs another.

    Parameters
        kernel, agent  of its host
        qemu_uid       as whom QEMU runs there, None if that is not known
    """
    yield _domain(vm)
    yield from _policy(vm)
    if vm.policy is not None:
        yield from _agent(vm, vm.policy, agent)
    yield from _emulator(vm)
    yield from _process(vm)
    if vm.journal:
        yield _check(vm, "journal", "for sessions that did not end").warn(
            vm.journal, f"kvmi-libvirt unhook {vm.name}"
        )
    if vm.policy is None:
        if vm.record is not None and vm.record.state == "hooked":
            yield from _record(vm)
        return
    yield from _kernel(vm, kernel)
    yield from _tool(vm, vm.policy, qemu_uid)
    yield from _record(vm)


def _check(vm: VmFacts, name: str, title: str) -> Check:
    return Check(name, title, domain=vm.name)


def _domain(vm: VmFacts) -> Line:
    found = _check(vm, "domain", "the domain")
    by = "" if vm.told_by is None else f", says {vm.told_by}"
    if vm.is_active:
        return found.passed(f"it runs{by}")
    told = f"it does not run{by}: what follows is about its next start"
    return found.warn(told, f"to start it: virsh start {vm.name}")


# -- what is wanted ------------------------------------------------------------------------


def _policy(vm: VmFacts) -> Iterator[Line]:
    found = _check(vm, "policy", "for a policy that can be used")
    policy = vm.policy
    if vm.policy_problem is not None:
        yield found.fail(
            vm.policy_problem,
            f"correct it: virsh edit {vm.name}, then: kvmi-libvirt explain {vm.name}",
            code=ExitCode.POLICY,
        )
    elif policy is None:
        yield found.warn(
            "it has no introspection element, and no assignment of the host fits: it is not meant "
            "to be hooked",
            f"to change that: kvmi-libvirt set {vm.name} FILE",
        )
    else:
        yield found.passed(
            f"{policy.mode.value}, {policy.source.describe()}, by {vm.policy_source}"
        )
    for warning in vm.warnings:
        yield _check(vm, "policy-warning", "the policy's wording").warn(
            warning, f"where that is: virsh dumpxml {vm.name} | kvmi-libvirt check -"
        )
    if vm.config_differs:
        yield _check(vm, "policy-config", "that its configuration is what runs").warn(
            "its next start has another policy than this run",
            f"to have that now: kvmi-libvirt set {vm.name} FILE --live",
        )
    if policy is not None and policy.secret is not None:
        secret = _check(vm, "secret", f"for the secret '{policy.secret}'")
        if vm.secret_problem is None:
            yield secret.passed()
        else:
            todo = "it is to be root's, mode 0600, with the bytes that the tool has too"
            yield secret.fail(vm.secret_problem, todo, code=ExitCode.POLICY)


def _agent(vm: VmFacts, policy: Policy, agent: AgentFacts) -> Iterator[Line]:
    if policy.reconnect_s is None or agent.pid is not None:
        return
    yield _check(vm, "agent", "for the agent its policy takes").fail(
        "its policy has the tool called again when it went away, which takes an agent, and none "
        "answers",
        START_AGENT,
    )


# -- what it runs on -----------------------------------------------------------------------


def _emulator(vm: VmFacts) -> Iterator[Line]:
    found = _check(vm, "emulator", "its emulator")
    if vm.emulator_problem is not None:
        yield found.fail(
            f"{vm.emulator_problem}: it cannot start (again)",
            f"install it, or correct <emulator>: virsh edit {vm.name}",
        )
    elif vm.emulator is not None:
        yield found.passed(vm.emulator)


def _process(vm: VmFacts) -> Iterator[Line]:
    process = vm.process
    found = _check(vm, "process", "for its QEMU process")
    if process.pidfile_problem is not None:
        if process.pid is not None:
            todo = f"its QEMU is process {process.pid}: echo {process.pid} >{process.pidfile}"
        elif vm.is_active:
            todo = "restart libvirtd, which then notices that the VM has ended"
        else:
            todo = f"rm {process.pidfile}"
        yield found.fail(
            f"the pidfile is stale: {process.pidfile_problem}", todo, code=ExitCode.TARGET
        )
    elif process.pid is not None:
        yield found.passed(f"process {process.pid}")
    if process.pid is None or not vm.is_active:
        return
    able = _check(vm, "process-fit", "that its QEMU can be hooked")
    if process.problem is not None:
        yield able.fail(process.problem, f"when that is over: kvmi-libvirt hook {vm.name}")
    elif process.vcpus is not None and process.vcpus < vm.vcpus:
        yield able.warn(f"only {process.vcpus} of its {vm.vcpus} vCPUs exist yet", "try again")
    elif process.vcpus is not None:
        yield able.passed(f"one VM, {counted(process.vcpus, 'vCPU')}")
    else:
        yield able.passed("one VM")
    if vm.newer_rules is not None:
        yield _check(vm, "apparmor", "for our AppArmor rules in its profile").warn(
            f"its profile was loaded before {vm.newer_rules} was changed: what is new there is not "
            "in force for it",
            "it is from its next start on",
        )


def _kernel(vm: VmFacts, kernel: KernelFacts) -> Iterator[Line]:
    found = _check(vm, "kvmi", "for KVMI in the kernel it runs on")
    if vm.is_emulated:
        if vm.is_active and vm.process.pid is not None and vm.process.supervisor is None:
            yield found.fail(
                "the KVMI emulator it runs on has ended: no introspection of it is possible "
                "any more, the VM itself runs on",
                f"restart the VM: virsh shutdown {vm.name}, then virsh start {vm.name}",
            )
            return
        revision = f" ({vm.emulated_abi})" if vm.emulated_abi else ""
        yield found.passed(f"an emulated one{revision}")
    elif kernel.outcome is Outcome.FOUND:
        yield found.passed(kernel.why)
    elif kernel.outcome is None:
        yield found.warn(f"{kernel.problem}, so the kernel cannot be asked", "run as root")
    else:
        yield found.fail(kernel.why, what_to_do(kernel.outcome))
    if vm.unsupported is not None:
        yield _check(vm, "kvmi-rights", "that the kernel knows all it demands").fail(
            vm.unsupported, 'take it out of the policy, or write optional="yes"'
        )


# -- the tool ------------------------------------------------------------------------------


def _tool(vm: VmFacts, policy: Policy, qemu_uid: int | None) -> Iterator[Line]:
    tool = vm.tool
    if tool is None:
        return
    found = _check(vm, "tool", "for its introspection tool")
    if tool.socket is not None:
        problem = socket_problem(tool.socket, qemu_uid=qemu_uid)
        if problem is not None:
            yield found.fail(*problem, code=ExitCode.HANDSHAKE)
            return
    is_hooked = vm.record is not None and vm.record.state == "hooked"
    if tool.listens:
        who = tool.socket.listener.who if tool.socket and tool.socket.listener else tool.where
        yield found.passed(who)
    elif is_hooked:
        yield found.passed("it is connected, though it takes no new VM")
    elif tool.listens is None:
        yield found.warn(
            f"{tool.where}: {tool.problem}, so it is only seen when it is called",
            f"to call it: kvmi-libvirt hook {vm.name}",
        )
    elif vm.is_active or policy.mode is Mode.REQUIRED:
        start = f"then: kvmi-libvirt hook {vm.name}" if vm.is_active else "then start the VM"
        yield found.fail(
            tool.problem or f"no tool listens on {tool.where}",
            f"start the tool, {start}",
            code=ExitCode.HANDSHAKE,
        )
    else:
        yield found.warn(
            tool.problem or f"no tool listens on {tool.where}", "start it before the VM"
        )


# -- what came of it -----------------------------------------------------------------------


def _record(vm: VmFacts) -> Iterator[Line]:
    found = _check(vm, "state", "that it is hooked")
    record = vm.record
    hook = f"kvmi-libvirt hook {vm.name}"
    if not vm.is_active:
        return
    if record is None:
        yield found.fail(
            "it runs, but nothing tells that it was ever hooked: it was started before its policy, "
            "or the hook, was in place",
            hook,
            code=ExitCode.FAILED,
        )
    elif record.state == "hooked":
        commands, events = counted(record.commands, "command"), counted(record.events, "event")
        rights = f"{commands}, {events}, since {record.since}"
        if record.error is not None:
            todo = f"all of it: kvmi-libvirt status {vm.name}"
            yield found.warn(f"{record.error} ({rights})", todo)
        elif vm.policy is None:
            yield found.warn(
                f"it is hooked by {record.source}, though no policy says so",
                f"kvmi-libvirt unhook {vm.name}",
            )
        else:
            yield found.passed(rights)
    elif record.state == "damaged":
        told = record.error or "its record is damaged"
        yield found.fail(told, FORGET_RECORD, code=ExitCode.FAILED)
    elif record.state == "waiting":
        told = f"the agent tries again: {record.error or 'it is not hooked yet'}"
        yield found.warn(told, "start the tool; to try at once: " + hook)
    else:
        why = record.error or f"it is {record.state}"
        yield found.fail(f"{why} (since {record.since})", hook, code=ExitCode.FAILED)


def summary(vm: VmFacts, lines: list[Line]) -> Line | None:
    """Return one line that says how *vm* is, from all the *lines* about it.

    None for a VM that nobody wants to introspect, and about which nothing is wrong.
    """
    found = Check("vm", f"domain '{vm.name}'")
    worst = [line for line in lines if line.verdict is Verdict.FAIL]
    if worst:
        first = worst[0]
        return found.fail(
            f"{first.reason}", f"all about it: kvmi-libvirt doctor {vm.name}", code=first.code
        )
    if vm.policy is None:
        return None
    doubts = [
        line
        for line in lines
        if line.verdict is Verdict.WARN and line.check not in ("domain", "policy-config")
    ]
    if doubts:
        return found.warn(f"{doubts[0].reason}", f"all about it: kvmi-libvirt doctor {vm.name}")
    if not vm.is_active:
        return found.passed("shut off; nothing stands in the way of its start")
    return found.passed("hooked")
