# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt explain``: which policy applies, and which rule decided what."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from kvmi_libvirt import libvirtio
from kvmi_libvirt.abi.revisions import REVISIONS, by_name, pinned
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.output import print_json, print_table
from kvmi_libvirt.cli.target import machine_here
from kvmi_libvirt.errors import ExitCode, StateError, UnsupportedByKernel
from kvmi_libvirt.kernel import NO_KVMI, running_abi
from kvmi_libvirt.machines import running_domain
from kvmi_libvirt.plan import make_plan
from kvmi_libvirt.policy.document import parse, read_file
from kvmi_libvirt.policy.element import domain_of, parse_document
from kvmi_libvirt.policy.explain import ALLOWED, Decision, explain, notes
from kvmi_libvirt.policy.facts import Identity
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.policy.model import Reason
from kvmi_libvirt.policy.resolve import decide, permit
from kvmi_libvirt.proxmoxfiles import Files, Places
from kvmi_libvirt.quoting import printable
from kvmi_libvirt.state import HOOKED, StateDir

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.policy.host import HostPolicy
    from kvmi_libvirt.policy.model import Policy


class Subject(NamedTuple):
    """What is explained: a name for it, its policy, and whether the host assigned that."""

    name: str
    policy: Policy | None
    is_assigned: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "subject",
        metavar="FILE|DOMAIN",
        help="domain XML or an element by itself, - for standard input; or a libvirt domain, or "
        "Proxmox VE's VMID. What is a file, or has a / in it, is taken for one",
    )
    parser.add_argument(
        "-c", "--connect", metavar="URI", default=libvirtio.DEFAULT_URI, help="libvirt to ask"
    )
    parser.add_argument(
        "--abi",
        choices=[abi.name for abi in REVISIONS],
        help="the kernel's KVMI revision (default: that of the domain's hook, or this kernel's)",
    )
    parser.add_argument("--allowed", action="store_true", help="leave out what is denied")
    parser.add_argument("--json", action="store_true", help="print the explanation as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Explain what would be in force at the next start, or hook."""
    machine = _machine(args)
    host = load_host_policy() if machine is None else machine.host()
    recorded = None
    if machine is not None:
        subject, recorded = _of_machine(machine, host)
    elif args.subject == "-" or "/" in args.subject or os.path.exists(args.subject):
        subject = _of_document(read_file(args.subject), host, source=printable(args.subject))
    else:
        with progress.shown(f"asking libvirt at {args.connect}"):
            found = libvirtio.domain_xml(args.subject, uri=args.connect)
        subject = _of_document(found.xml, host, source=f"XML of domain '{found.name}'")
        if found.is_active and libvirtio.is_local(args.connect):
            recorded = _recorded_abi(found.uuid)
    if subject.policy is None:
        print(f"{subject.name}: {_nothing(host)}", file=sys.stderr)
        if args.json:
            print_json({"domain": subject.name, "policy": None, "commands": [], "events": []})
        return ExitCode.OK
    abi, kernel = _kernel(args.abi, recorded, subject.policy.kernel_abi)
    commands, events = explain(subject.policy, abi)
    if kernel == NO_KVMI:
        commands, events = (
            [dataclasses.replace(decision, in_kernel=False) for decision in kind]
            for kind in (commands, events)
        )
    if args.allowed:
        commands, events = (
            [decision for decision in kind if decision.verdict == ALLOWED]
            for kind in (commands, events)
        )
    if args.json:
        print_json(_as_json(subject, subject.policy, abi, commands, events))
        return ExitCode.OK
    for line in _summary(subject, subject.policy, kernel, _problem(subject.policy, abi)):
        print(line)
    _print_decisions("COMMAND", commands, subject.policy.commands.everything)
    _print_decisions("EVENT", events, subject.policy.events.everything)
    if abi is not None and _has_doubts(subject.policy, commands):
        print("\n?  the kernel does not tell which id this has, so it is not granted")
    told = [f"note: {note}" for note in notes(subject.policy)]
    if told:
        print("", *told, sep="\n")
    return ExitCode.OK


def _machine(args: argparse.Namespace) -> Files | None:
    vmid = None if os.path.exists(args.subject) else machine_here(args, args.subject)
    return None if vmid is None else Files(vmid, Places())


def _of_machine(machine: Files, host: HostPolicy) -> tuple[Subject, str | None]:
    # Returns the revision its hook was made with, too.
    name = str(machine.vmid)
    is_assigned = host.assignment(Identity(name=name, vmid=machine.vmid)) is not None
    subject = Subject(f"VM {name}", machine.policy(host), is_assigned)
    running = running_domain(machine.vmid, Places())
    return subject, None if running is None else _recorded_abi(running.uuid)


def _of_document(xml: bytes, host: HostPolicy, *, source: str) -> Subject:
    if domain_of(parse(xml, source=source)) is None:
        policy = parse_document(xml, source=source)
        return Subject(source, policy and permit(policy, host, source=source), is_assigned=False)
    domain, policy = decide(xml, host, source=source)
    return Subject(printable(domain.name) or source, policy, host.assignment(domain) is not None)


def _recorded_abi(uuid: str) -> str | None:
    try:
        recorded = StateDir().load(uuid)
    except StateError:
        return None
    return recorded.abi if recorded is not None and recorded.state == HOOKED else None


def _kernel(
    wanted: str | None, recorded: str | None, pin: str | None
) -> tuple[KvmiAbi | None, str]:
    if wanted is not None:
        return by_name(wanted), f"{by_name(wanted).title}, as asked for"
    if recorded is not None:
        return by_name(recorded), f"{by_name(recorded).title}, as found when it was hooked"
    found, told = running_abi()
    abi = None if found is None else pinned(found, pin)
    if abi is None or abi is found:
        wrong = f"; the host policy says {pin}, with which nothing is hooked" if found else ""
        return abi, f"{told}{wrong if abi is None else ''}"
    if abi.name == pin:
        return abi, f"{abi.title}, as the host policy says"
    return abi, f"{told}, but the host policy says {pin}: what differs is not granted"


def _problem(policy: Policy, abi: KvmiAbi | None) -> str | None:
    # Why a hook on this kernel would fail, as far as it depends on the policy.
    if abi is None:
        return None
    try:
        make_plan(policy, abi, None)
    except UnsupportedByKernel as error:
        return str(error)
    return None


def _nothing(host: HostPolicy) -> str:
    if not host.assignments:
        return "no introspection: it has no element, and the host assigns none"
    count = len(host.assignments)
    many = f"none of the {count} assignments" if count > 1 else "the assignment"
    not_fits = "fits" if count > 1 else "does not fit"
    return f"no introspection: it has no element, and {many} in {host.path} {not_fits}"


def _summary(subject: Subject, policy: Policy, kernel: str, problem: str | None) -> list[str]:
    place = Reason(rule="", source=policy.origin, line=policy.line).place()
    by = "assigned by the host" if subject.is_assigned else "by its own element"
    rows = [
        ("domain", subject.name),
        ("policy", f"{by}, {place}" if place else by),
        ("profile", policy.profile or "-"),
        ("mode", policy.mode.value),
        ("source", policy.source.describe()),
        ("secret", policy.secret or "-"),
        ("handshake", f"{policy.handshake_timeout_s:g} s"),
        ("unhook", f"{policy.unhook_timeout_s:g} s"),
        ("early", "yes" if policy.early else "no"),
        ("reconnect", "no" if policy.reconnect_s is None else f"every {policy.reconnect_s:g} s"),
        ("kernel", kernel),
        *([("problem", problem)] if problem else []),
    ]
    return [f"{name + ':':10} {value}" for name, value in rows]


def _has_doubts(policy: Policy, commands: list[Decision]) -> bool:
    # v11 and v12 have the same events. Granting all at once needs no ids.
    if policy.commands.everything:
        return False
    return any(d.verdict == ALLOWED and d.in_kernel is None for d in commands)


_KERNEL = {True: "yes", False: "no", None: "?"}


def _print_decisions(title: str, decisions: list[Decision], everything: bool) -> None:
    print()
    rows = [
        (
            decision.name,
            f"{decision.verdict} (optional)" if decision.optional else decision.verdict,
            _KERNEL[decision.in_kernel],
            f"{decision.reason.place()} {decision.reason.rule}".strip(),
        )
        for decision in decisions
    ]
    if everything:
        rows.append(("(all others)", ALLOWED, "?", "nothing at all is denied"))
    print_table((title, "VERDICT", "KERNEL", "DECIDED BY"), rows)


def _as_json(
    subject: Subject,
    policy: Policy,
    abi: KvmiAbi | None,
    commands: list[Decision],
    events: list[Decision],
) -> dict[str, object]:
    return {
        "domain": subject.name,
        "policy": {
            "from": "assignment" if subject.is_assigned else "element",
            "file": policy.origin,
            "line": policy.line,
            "profile": policy.profile,
            "mode": policy.mode.value,
            "source": policy.source.describe(),
            "secret": policy.secret,
            "handshake_timeout": policy.handshake_timeout_s,
            "unhook_timeout": policy.unhook_timeout_s,
            "reconnect": policy.reconnect_s,
            "early": policy.early,
        },
        "abi": None if abi is None else abi.name,
        "problem": _problem(policy, abi),
        "notes": notes(policy),
        "commands": [_decision_as_json(decision) for decision in commands],
        "events": [_decision_as_json(decision) for decision in events],
    }


def _decision_as_json(decision: Decision) -> dict[str, object]:
    return {
        "name": decision.name,
        "verdict": decision.verdict,
        "optional": decision.optional,
        "rule": decision.reason.rule,
        "file": decision.reason.source,
        "line": decision.reason.line,
        "in_kernel": decision.in_kernel,
    }
