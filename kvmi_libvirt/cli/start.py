# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt start DOMAIN``: start paused, hook, then let the guest run."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.cli.status import summary
from kvmi_libvirt.cli.target import state_dir
from kvmi_libvirt.errors import ExitCode, KvmiLibvirtError, TargetError, UsageError
from kvmi_libvirt.introspect import hook_vm, is_same_process, public_fields, verified
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.policy.model import Mode
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.qemu.process import open_domain
from kvmi_libvirt.state import HOOKED

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.libvirtio import PausedDomain
    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.state import VmState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("domain", metavar="DOMAIN", help="name or uuid")
    parser.add_argument(
        "-c", "--connect", metavar="URI", default=libvirtio.DEFAULT_URI, help="libvirt to ask"
    )
    parser.add_argument("--json", action="store_true", help="print the state as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Start the VM; not one of its instructions runs before its introspection is in force.

    If that fails a VM that requires introspection is destroyed; any other one runs, and
    that it does so without is said.
    """
    if not libvirtio.is_local(args.connect):
        raise UsageError(f"{args.connect} is not this host, on which VMs are hooked")
    with contextlib.ExitStack() as started:
        with progress.shown(f"starting {args.domain}"):
            paused = libvirtio.started_paused(args.domain, uri=args.connect)
            domain = started.enter_context(paused)
        try:
            with progress.shown(f"hooking {domain.name}"):
                state = _hooked(domain)
        except (KvmiLibvirtError, OSError) as error:
            return _judge(domain, error)
        domain.resume()
    if state is None:
        print(
            f"kvmi-libvirt: {domain.name} has no introspection: no element in its XML, and no "
            f"assignment of the host fits; next: kvmi-libvirt set {shlex.quote(domain.name)} FILE",
            file=sys.stderr,
        )
    elif args.json:
        print_json(public_fields(state))
    else:
        print(summary(state))
    return ExitCode.OK


def _hooked(running: PausedDomain) -> VmState | None:
    # libvirt's hook has done it already where it is installed: then this only verifies.
    domain, policy = _policy(running)
    if policy is None:
        return None
    states = state_dir()
    with open_domain(running.name, running.uuid) as process:
        recorded = states.load(running.uuid)
        if recorded is not None and is_same_process(recorded, process):
            seen = verified(recorded)
            if seen.state == HOOKED:
                return seen
        return hook_vm(process, domain, policy, state=states)


def _policy(running: PausedDomain) -> tuple[Domain, Policy | None]:
    return decide(running.xml, load_host_policy(), source=f"XML of domain '{running.name}'")


def _judge(running: PausedDomain, error: Exception) -> ExitCode:
    code = getattr(error, "exit_code", ExitCode.FAILED)
    if _is_required(running):
        running.destroy()
        if isinstance(error, KvmiLibvirtError):
            raise error
        raise TargetError(f"{running.name} was not started: {error}", pid=0) from error
    running.resume()
    print(
        f"kvmi-libvirt: {running.name} runs without introspection: {error}; "
        f"next: kvmi-libvirt doctor {shlex.quote(running.name)}",
        file=sys.stderr,
    )
    return ExitCode(code)


def _is_required(running: PausedDomain) -> bool:
    try:
        policy = _policy(running)[1]
    except KvmiLibvirtError:
        return True  # what it would say if it could be read is not known
    return policy is not None and policy.mode is Mode.REQUIRED
