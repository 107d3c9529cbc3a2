# SPDX-License-Identifier: Apache-2.0
"""What the verbs that change a running VM have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.cli.status import summary
from kvmi_libvirt.cli.target import state_dir
from kvmi_libvirt.errors import PolicyError, PolicyRefused
from kvmi_libvirt.introspect import (
    follow_policy,
    is_same_process,
    lower_vm,
    public_fields,
    take_leave,
)
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.policy.model import parse_source
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.qemu.process import open_domain
from kvmi_libvirt.state import HOOKED

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.cli.target import Target
    from kvmi_libvirt.policy.limits import HostPolicy
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.qemu.process import Process
    from kvmi_libvirt.state import StateDir, VmState


def print_state(state: VmState, *, as_json: bool) -> None:
    """Print what is in force now."""
    if as_json:
        print_json(public_fields(state))
    else:
        print(summary(state))


def apply_policy(target: Target) -> VmState:
    """Move a hooked VM to the policy it has now.

    What that does not allow any more goes even if it cannot be applied as a whole.

    Raises
        PolicyRefused  it has none any more
        PolicyError    it is wrong, or not allowed on this host
        SessionError   it is not hooked, or by another tool; or a step failed
    """
    state = state_dir()
    policy = _policy(
        target.process, target.uuid, lambda: target.decide()[1], target.host_policy, state
    )
    if policy is None:
        text = "no introspection element, and no assignment of the host fits; to end its "
        text += "introspection, 'kvmi-libvirt unhook' it"
        raise PolicyRefused(text, source=target.source)
    with progress.shown(f"moving {target.name} to its policy"):
        return follow_policy(target.process, target.uuid, policy, state=state)


def follow(domain: str, uuid: str, *, uri: str) -> VmState | None:
    """Bring a domain whose metadata has just changed to its new policy, if it is hooked here.

    A domain that has no policy any more is unhooked.

    Returns
        the new state; None when there was nothing to do, since it is not hooked
    """
    state = state_dir()
    recorded = state.load(uuid)
    if recorded is None or recorded.state != HOOKED:
        return None
    running = libvirtio.running_domain(domain, uri=uri)
    with open_domain(running.name, running.uuid) as process:
        if not is_same_process(recorded, process):
            return None
        source = f"XML of domain '{running.name}'"
        policy = _policy(
            process,
            uuid,
            lambda: decide(running.xml, load_host_policy(), source=source)[1],
            load_host_policy,
            state,
        )
        if policy is None:
            with progress.shown(f"waiting for {recorded.source} to let {running.name} go"):
                return take_leave(process, recorded, state=state)
        with progress.shown(f"moving {running.name} to its policy"):
            return follow_policy(process, uuid, policy, state=state)


def _policy(
    process: Process,
    uuid: str,
    decided: Callable[[], Policy | None],
    host_policy: Callable[[], HostPolicy],
    state: StateDir,
) -> Policy | None:
    try:
        return decided()
    except PolicyError:
        # Whatever is wrong with it: what the host does not allow counts for everybody.
        recorded = state.load(uuid)
        if recorded is not None and recorded.state == HOOKED and is_same_process(recorded, process):
            _hold_to(host_policy(), process, recorded, state)
        raise


def _hold_to(host: HostPolicy, process: Process, recorded: VmState, state: StateDir) -> None:
    if host.refusal(parse_source(recorded.source or "")) is not None:
        take_leave(process, recorded, state=state)
    elif host.ceiling is not None:
        lower_vm(process, recorded.uuid, host.ceiling, state=state)
