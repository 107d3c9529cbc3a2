# SPDX-License-Identifier: Apache-2.0
"""Who runs VMs, for a job: how to find a VM's process, and where its policy stands."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

from kvmi_libvirt import machines
from kvmi_libvirt.commandline import domain_of
from kvmi_libvirt.errors import TargetNotFound
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.policy.model import Mode
from kvmi_libvirt.policy.required import is_required
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.proxmoxfiles import Files
from kvmi_libvirt.qemu.process import open_domain

if TYPE_CHECKING:
    from pathlib import Path

    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.limits import HostPolicy
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.proxmoxfiles import Places
    from kvmi_libvirt.qemu.process import Process
    from kvmi_libvirt.state import StateDir

SETTLED_S: Final = 100.0
"""Above the time a hookscript gets, which ends a machine that it cannot hook at its start."""


class Manager(Protocol):
    """What a job asks about one VM, of a name and uuid that were told before."""

    def open(self, name: str, uuid: str) -> Process:
        """Open its process; the caller owns it. Raises TargetError."""

    def host_policy(self, name: str) -> HostPolicy:
        """Return the policy of the host. Raises PolicyError."""

    def decide(
        self, process: Process, name: str, xml: bytes, host: HostPolicy
    ) -> tuple[Domain, Policy | None]:
        """Return what it is, and the policy it has. Raises KvmiLibvirtError."""

    def demand(self, name: str, xml: bytes) -> Mode:
        """Return the mode of a policy that is wrong, as far as that can be told."""

    def is_being_started(self, process: Process) -> bool:
        """Say whether somebody else still has to hook it, or to judge that he could not."""


class Libvirt:
    """libvirt: a policy is in the domain XML, or assigned by the host.

    Parameters
        run_dir      where pidfiles are
        host_policy  the host's policy
    """

    def __init__(self, run_dir: Path, host_policy: Path) -> None:
        """Nothing is read yet."""
        self._run_dir = run_dir
        self._host_policy = host_policy

    def open(self, name: str, uuid: str) -> Process:
        """Open the domain's process."""
        return open_domain(name, uuid, run_dir=self._run_dir)

    def host_policy(self, _name: str) -> HostPolicy:
        """Return the policy of the host."""
        return load_host_policy(self._host_policy)

    def decide(
        self, _process: Process, name: str, xml: bytes, host: HostPolicy
    ) -> tuple[Domain, Policy | None]:
        """Return what *xml* and *host* say."""
        return decide(xml, host, source=f"XML of domain '{name}'")

    def demand(self, _name: str, xml: bytes) -> Mode:
        """Return what the element says, were it right."""
        return Mode.REQUIRED if is_required(xml) else Mode.OPTIONAL

    def is_being_started(self, _process: Process) -> bool:
        """Return False: a start is handed over, and has the VM's turn."""
        return False


class Proxmox:
    """Proxmox VE: a machine's name is its number, its policy in a file of that name.

    Parameters
        places     of this node
        state      the state directory
        settled_s  how long a machine without a record is its hookscript's
    """

    def __init__(self, places: Places, state: StateDir, *, settled_s: float = SETTLED_S) -> None:
        """Nothing is read yet."""
        self._places = places
        self._state = state
        self._settled_s = settled_s

    def open(self, name: str, uuid: str) -> Process:
        """Open the machine's process."""
        process = machines.open_machine(int(name), self._places)
        try:
            if domain_of(int(name), process.command_line()).uuid != uuid:
                raise TargetNotFound(f"VM {name} is another one by now", pid=process.pid)
        except BaseException:
            process.close()
            raise
        return process

    def host_policy(self, name: str) -> HostPolicy:
        """Return the policy of the node, which may be the cluster's."""
        return Files(int(name), self._places).host()

    def decide(
        self, process: Process, name: str, _xml: bytes, host: HostPolicy
    ) -> tuple[Domain, Policy | None]:
        """Return what the command line, the machine's file and *host* say."""
        domain = domain_of(int(name), process.command_line())
        machines.require_own_uuid(domain, self._state, process)
        files = Files(int(name), self._places)
        files.require_config()
        return domain, files.policy(host)

    def demand(self, name: str, _xml: bytes) -> Mode:
        """Return what the machine's file says, were it right."""
        return Files(int(name), self._places).demand() or Mode.OPTIONAL

    def is_being_started(self, process: Process) -> bool:
        """Say whether the machine's hookscript may still be at work."""
        return process.age_s(time.clock_gettime(time.CLOCK_BOOTTIME)) < self._settled_s
