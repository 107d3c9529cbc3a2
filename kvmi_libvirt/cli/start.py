# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt start DOMAIN``: start paused, hook, then let the guest run."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.interrupts import Interrupts
from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.cli.status import summary
from kvmi_libvirt.cli.target import state_dir
from kvmi_libvirt.errors import (
    ExitCode,
    KvmiLibvirtError,
    PolicyError,
    SessionError,
    StateError,
    UsageError,
)
from kvmi_libvirt.introspect import ensure_hooked, is_same_process, public_fields, verified
from kvmi_libvirt.policy.host import HOST_POLICY_PATH, load_host_policy
from kvmi_libvirt.policy.required import demands
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.qemu.process import open_domain
from kvmi_libvirt.state import HOOKED

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.libvirtio import NewDomain
    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.state import VmState

_INTERRUPTED: Final = 130  # as for every verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("domain", metavar="DOMAIN", help="name or uuid")
    parser.add_argument(
        "-c", "--connect", metavar="URI", default=libvirtio.DEFAULT_URI, help="libvirt to ask"
    )
    parser.add_argument("--json", action="store_true", help="print the state as JSON")


def run(args: argparse.Namespace) -> int:
    """Start the VM; not one of its instructions runs before its introspection is in force.

    If that fails a VM that requires introspection is not started; any other one runs, and
    that it does so without is said. An interruption takes the start back.
    """
    if not libvirtio.is_local(args.connect):
        raise UsageError(f"{args.connect} is not this host, on which VMs are hooked")
    with libvirtio.new_domain(args.domain, uri=args.connect) as domain:
        _require_policy(domain)
        with Interrupts() as interrupts:
            with progress.shown(f"starting {domain.name}"):
                domain.start()
            # From here on it is paused, and something has to become of it.
            try:
                with progress.shown(f"hooking {domain.name}"), interrupts.heard():
                    state = _hooked(domain)
            except KeyboardInterrupt:
                print(f"kvmi-libvirt: interrupted; {_undone(domain)}", file=sys.stderr)
                return _INTERRUPTED
            except (KvmiLibvirtError, OSError) as error:
                return _judge(domain, error)
            _resume(domain)
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


def _require_policy(domain: NewDomain) -> None:
    # What is wrong with a policy is known before anything is touched.
    xml = domain.xml()
    try:
        _policy(domain, xml)
    except PolicyError:
        if demands(xml, load_host_policy, HOST_POLICY_PATH):
            raise


def _policy(domain: NewDomain, xml: bytes) -> tuple[Domain, Policy | None]:
    return decide(xml, load_host_policy(), source=f"XML of domain '{domain.name}'")


def _hooked(new: NewDomain) -> VmState | None:
    # libvirt's hook has done it already where it is installed: then this only verifies.
    domain, policy = _policy(new, new.xml())
    if policy is None:
        return None
    states = state_dir()
    with open_domain(new.name, new.uuid) as process:
        recorded = states.load(new.uuid)
        if recorded is not None and is_same_process(recorded, process):
            seen = verified(recorded)
            if seen.state == HOOKED:
                return seen
        return ensure_hooked(process, domain, policy, state=states)


def _judge(domain: NewDomain, error: Exception) -> ExitCode:
    code = ExitCode(getattr(error, "exit_code", ExitCode.FAILED))
    try:
        is_demanded = demands(domain.xml(), load_host_policy, HOST_POLICY_PATH)
    except KvmiLibvirtError:
        is_demanded = True  # libvirt does not tell: of two ways the safe one
    if is_demanded:
        raise SessionError(f"{error}; {_undone(domain)}", exit_code=code) from error
    _resume(domain)
    print(
        f"kvmi-libvirt: {domain.name} runs without introspection: {error}; "
        f"next: kvmi-libvirt doctor {shlex.quote(domain.name)}",
        file=sys.stderr,
    )
    return code


def _resume(domain: NewDomain) -> None:
    try:
        domain.resume()
    except KvmiLibvirtError as error:
        raise SessionError(f"{error}; {_undone(domain)}", exit_code=error.exit_code) from error


def _undone(domain: NewDomain) -> str:
    # Never leaves a VM paused without a word.
    try:
        done = domain.undo()
    except KvmiLibvirtError as error:
        return (
            f"{domain.name} MAY BE LEFT PAUSED ({error}): see 'virsh domstate {domain.name}'; "
            "'virsh destroy' ends it, 'virsh resume' lets it run"
        )
    # Where libvirt's hook is not installed nobody else forgets it.
    with contextlib.suppress(StateError):
        states = state_dir()
        with states.locked(domain.uuid, deadline=0.0):
            states.remove(domain.uuid)
    return f"{domain.name} was not started: {done}, and none of its instructions ran"
