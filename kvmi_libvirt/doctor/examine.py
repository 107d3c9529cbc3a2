# SPDX-License-Identifier: Apache-2.0
"""Put it together: look at a host, and at a VM or all of them, and judge."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import __version__, libvirtio
from kvmi_libvirt.bounded import Unanswered
from kvmi_libvirt.doctor.check_files import check_agent, check_config, check_sockets, check_state
from kvmi_libvirt.doctor.check_hook import check_hook, check_libvirt, what_holds_it_up
from kvmi_libvirt.doctor.check_host import check_kernel, check_security
from kvmi_libvirt.doctor.check_vm import check_vm, summary
from kvmi_libvirt.doctor.facts import HostFacts
from kvmi_libvirt.doctor.look_agent import look_at_agent
from kvmi_libvirt.doctor.look_config import look_at_config, look_at_state
from kvmi_libvirt.doctor.look_hook import look_at_hook
from kvmi_libvirt.doctor.look_kernel import look_at_kernel, look_at_kvm
from kvmi_libvirt.doctor.look_libvirt import Told, all_domains, find_domain, look_at_libvirt
from kvmi_libvirt.doctor.look_logs import hook_ran_at
from kvmi_libvirt.doctor.look_process import Processes
from kvmi_libvirt.doctor.look_security import look_at_security
from kvmi_libvirt.doctor.look_sockets import Sockets
from kvmi_libvirt.doctor.look_vm import World, look_at_vm, runs_emulated
from kvmi_libvirt.doctor.report import Check
from kvmi_libvirt.errors import ExitCode, KvmiLibvirtError, PolicyError, TargetNotFound
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.doctor.facts import VmFacts
    from kvmi_libvirt.doctor.report import Line
    from kvmi_libvirt.libvirtio import DomainXml

_MAX_DOMAINS: Final = 1000
_DOMAINS_BUDGET_S: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked.

    Parameters
        domain       name, uuid or id of the one VM it is about; None: the host, and all VMs
        uri          of this host's libvirt
        is_emulated  VMs here are meant to run on the emulated KVMI kernel
        timeout_s    seconds libvirt gets for each answer
    """

    domain: str | None = None
    uri: str = libvirtio.DEFAULT_URI
    is_emulated: bool = False
    timeout_s: float = 10.0


def examine(question: Question) -> tuple[list[Line], VmFacts | None]:
    """Look at everything; return what there is to say, and all of the VM asked about.

    What can be put right here and now comes first, the kernel last, then the VMs.
    Nothing is changed, no VM is touched and no tool called.
    """
    state = StateDir()
    sockets = Sockets()
    host = _look_at_host(question, state, sockets)
    told, missing = _asked_for(question)
    domains: list[DomainXml] = []
    if question.domain is None and host.libvirt.version is not None:
        try:
            domains = all_domains(question.uri, timeout_s=question.timeout_s)
        except (Unanswered, KvmiLibvirtError, OSError) as error:
            missing = Check("domains", "the domains").fail(
                f"libvirt does not list them: {error}", what_holds_it_up(host.libvirt)
            )
    world = _world(host, state, sockets)
    vms: list[VmFacts] = []
    one = None if told is None else look_at_vm(told, world)
    doubts: list[Line] = []
    if one is None:
        vms, doubts = _look_at_all(domains, world)
    lines = [
        *([] if missing is None else [missing]),
        *_judge_host(host, question, _needed_by(host, vms)),
        *_judge_kernel(host, question, one, domains),
    ]
    if one is not None:
        lines += check_vm(one, host.kernel, host.agent, qemu_uid=host.sockets.qemu_uid)
    for vm in vms:
        about = list(check_vm(vm, host.kernel, host.agent, qemu_uid=host.sockets.qemu_uid))
        if (line := summary(vm, about)) is not None:
            lines.append(line)
    return lines + doubts, one


def _look_at_host(question: Question, state: StateDir, sockets: Sockets) -> HostFacts:
    return HostFacts(
        hook=look_at_hook(),
        libvirt=look_at_libvirt(
            question.uri, timeout_s=question.timeout_s, hook_ran_at=hook_ran_at()
        ),
        kernel=look_at_kernel(),
        kvm=look_at_kvm(),
        security=look_at_security(),
        config=look_at_config(),
        state=look_at_state(state),
        sockets=sockets.look_at_directory(),
        agent=look_at_agent(),
    )


def _asked_for(question: Question) -> tuple[Told | None, Line | None]:
    if question.domain is None:
        return None, None
    try:
        found = find_domain(question.domain, question.uri, timeout_s=question.timeout_s)
    except TargetNotFound as error:
        line = Check("domain", "the domain", domain=question.domain).fail(
            str(error), "virsh list --all names those there are", code=ExitCode.TARGET
        )
        return None, line
    return found, None


def _world(host: HostFacts, state: StateDir, sockets: Sockets) -> World:
    policy, problem = None, None
    try:
        policy = load_host_policy()
    except (PolicyError, KvmiLibvirtError) as error:
        problem = str(error)
    return World(
        host=policy,
        host_problem=problem,
        kernel_abi=host.kernel.abi,
        state=state,
        processes=Processes(),
        sockets=sockets,
    )


def _look_at_all(domains: list[DomainXml], world: World) -> tuple[list[VmFacts], list[Line]]:
    found: list[VmFacts] = []
    deadline = time.monotonic() + _DOMAINS_BUDGET_S
    for domain in sorted(domains, key=lambda domain: domain.name)[:_MAX_DOMAINS]:
        if time.monotonic() > deadline:
            break
        told = Told(domain.name, domain.uuid, domain.is_active, domain.xml, None)
        found.append(look_at_vm(told, world, with_log=False))
    left = len(domains) - len(found)
    if not left:
        return found, []
    told_why = f"{left} of {len(domains)} were not looked at, to end in time"
    return found, [
        Check("domains", "the domains").warn(told_why, "ask about one: kvmi-libvirt doctor DOMAIN")
    ]


def _needed_by(host: HostFacts, vms: list[VmFacts]) -> str | None:
    # What makes an agent's absence a fault.
    if host.state.waiting:
        return f"domain '{host.state.waiting[0]}' waits to be hooked by it"
    wanting = [vm.name for vm in vms if vm.policy and vm.policy.reconnect_s is not None]
    if wanting:
        return f"the policy of domain '{wanting[0]}' takes one (<reconnect>)"
    if host.config.reconnecting:
        return "an assignment of the host policy takes one (<reconnect>)"
    return None


def _judge_host(host: HostFacts, question: Question, needed_by: str | None) -> Iterator[Line]:
    yield from check_hook(host.hook, host.libvirt, host.security, own_version=__version__)
    yield from check_libvirt(host.libvirt, is_needed=question.domain is not None)
    yield from check_config(host.config)
    yield from check_state(host.state)
    yield from check_sockets(host.sockets)
    yield from check_agent(host.agent, needed_by=needed_by)
    yield from check_security(host.security, host.libvirt)


def _judge_kernel(
    host: HostFacts, question: Question, one: VmFacts | None, domains: list[DomainXml]
) -> Iterator[Line]:
    excuse = None
    emulated = [domain.name for domain in domains if runs_emulated(domain.xml)]
    if question.is_emulated:
        excuse = "VMs here run on the emulated one, as --emulated says"
    elif one is not None and one.is_emulated:
        excuse = f"domain '{one.name}' runs on the emulated one"
    elif one is not None:
        excuse = "what that means for the domain is said below"
    elif len(emulated) == 1:
        excuse = f"domain '{emulated[0]}' runs on the emulated one"
    elif emulated:
        excuse = f"domain '{emulated[0]}' and {len(emulated) - 1} more run on the emulated one"
    yield from check_kernel(host.kernel, host.kvm, excuse=excuse)
