# SPDX-License-Identifier: Apache-2.0
"""What the verbs that change a running VM have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.cli.status import summary
from kvmi_libvirt.cli.target import state_dir
from kvmi_libvirt.errors import PolicyRefused
from kvmi_libvirt.introspect import change_vm, is_same_process, public_fields, take_leave
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.qemu.process import open_domain
from kvmi_libvirt.state import HOOKED

if TYPE_CHECKING:
    from kvmi_libvirt.cli.target import Target
    from kvmi_libvirt.state import VmState


def print_state(state: VmState, *, as_json: bool) -> None:
    """Print what is in force now."""
    if as_json:
        print_json(public_fields(state))
    else:
        print(summary(state))


def apply_policy(target: Target) -> VmState:
    """Move a hooked VM to the policy it has now.

    Raises
        PolicyRefused  it has none any more
        SessionError   it is not hooked, or by another tool; or a step failed
    """
    policy = decide(target.domain_xml(), load_host_policy(), source=target.source)[1]
    if policy is None:
        text = "no introspection element, and no assignment of the host fits; to end its "
        text += "introspection, 'kvmi-libvirt unhook' it"
        raise PolicyRefused(text, source=target.source)
    with progress.shown(f"moving {target.name} to its policy"):
        return change_vm(target.process, target.uuid, policy, state=state_dir())


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
        policy = decide(running.xml, load_host_policy(), source=source)[1]
        if policy is None:
            with progress.shown(f"waiting for {recorded.source} to let {running.name} go"):
                return take_leave(process, recorded, state=state)
        with progress.shown(f"moving {running.name} to its policy"):
            return change_vm(process, uuid, policy, state=state)
