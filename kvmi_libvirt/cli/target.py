# SPDX-License-Identifier: Apache-2.0
"""How verbs name a running VM: a libvirt domain, or a process of another manager."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.commandline import domain_of
from kvmi_libvirt.errors import PolicyValueError, StateError, TargetNotFound, UsageError
from kvmi_libvirt.introspect import is_same_process
from kvmi_libvirt.machines import known_here, open_machine, require_own_uuid
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.policy.document import read_file
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.proxmoxfiles import Files, Places
from kvmi_libvirt.qemu.process import Process, open_domain
from kvmi_libvirt.quoting import printable
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.limits import HostPolicy
    from kvmi_libvirt.policy.model import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A running VM: its open process, and how to find its policy.

    Parameters
        xml         the domain's, whose introspection element may be wrong; None for a
                    machine of Proxmox VE, and a hooked process that was named without it
        source      what *xml* is, for messages
        is_managed  libvirt or Proxmox VE runs it
        files       of a machine of Proxmox VE, None for any other
    """

    process: Process
    name: str
    uuid: str
    xml: bytes | None
    source: str
    is_managed: bool
    files: Files | None = None

    def host_policy(self) -> HostPolicy:
        """Return the policy of its host. Raises PolicyError."""
        return load_host_policy() if self.files is None else self.files.host()

    def domain(self) -> Domain:
        """Return what the VM is, whatever its policy. Raises as decide()."""
        if self.files is not None:
            domain = domain_of(self.files.vmid, self.process.command_line())
            require_own_uuid(domain, state_dir(), self.process)
            return domain
        return parse_domain(self._domain_xml(), source=self.source, with_policy=False)

    def decide(self) -> tuple[Domain, Policy | None]:
        """Return what the VM is, and the policy it has now.

        Raises
            UsageError       a process was named without its domain XML
            PolicyError      its policy is wrong, or not to be trusted
            StateError       the files of Proxmox VE are not there
            TargetAmbiguous  another machine of Proxmox VE is on record by its UUID
        """
        if self.files is not None:
            self.files.require_config()
            return self.domain(), self.files.policy()
        return decide(self._domain_xml(), self.host_policy(), source=self.source)

    def _domain_xml(self) -> bytes:
        if self.xml is None:
            raise UsageError("--pid needs --xml FILE here: the policy is found by the domain XML")
        return self.xml


def add_target_arguments(parser: argparse.ArgumentParser, *, positional: bool = True) -> None:
    """Declare DOMAIN, --connect, and --pid with --xml."""
    if positional:
        parser.add_argument(
            "domain", nargs="?", metavar="DOMAIN", help="name, uuid or id; or Proxmox VE's VMID"
        )
    parser.add_argument(
        "-c", "--connect", metavar="URI", default=libvirtio.DEFAULT_URI, help="libvirt to ask"
    )
    parser.add_argument(
        "--pid",
        type=int,
        metavar="PID",
        help="instead of DOMAIN: a QEMU that libvirt does not run",
    )
    parser.add_argument(
        "--xml",
        metavar="FILE",
        help="with --pid: its domain XML, with name and uuid; needed where it has no record yet",
    )


@contextlib.contextmanager
def open_target(args: argparse.Namespace) -> Iterator[Target]:
    """Open the VM that *args* name, for the block.

    Raises
        UsageError      they name none, or two
        TargetNotFound  no such VM, or it does not run; or a process without XML that is
                        not hooked
        PolicyError     with --pid: the file is no domain XML
    """
    if args.pid is None:
        if args.xml is not None:
            raise UsageError("--xml goes with --pid PID")
        if args.domain is None:
            raise UsageError("name a DOMAIN, or --pid PID with --xml FILE")
        vmid = machine_here(args)
        if vmid is not None:
            with open_machine(vmid, Places()) as process:
                yield _machine(vmid, process)
            return
        if libvirtio.is_remote(args.connect):
            raise UsageError(f"--connect {printable(args.connect)} is another host: run this there")
        with progress.shown(f"asking libvirt at {args.connect}"):
            running = libvirtio.running_domain(args.domain, uri=args.connect)
        with open_domain(running.name, running.uuid) as process:
            yield Target(
                process=process,
                name=running.name,
                uuid=running.uuid,
                xml=running.xml,
                source=f"XML of domain '{running.name}'",
                is_managed=True,
            )
        return
    if args.domain is not None:
        raise UsageError("name either a DOMAIN or --pid PID, not both")
    if args.xml is None:
        with Process(Pid(args.pid)) as process:
            yield _recorded(process)
        return
    xml, source = read_file(args.xml), printable(args.xml)
    domain = parse_domain(xml, source=source, with_policy=False)
    if not domain.uuid or not domain.name:
        lacks = "<uuid>" if domain.name else "<name>"
        text = f"the domain has no {lacks}; write that of the process"
        raise PolicyValueError(text, source=source)
    with Process(Pid(args.pid)) as process:
        process.require_uuid(domain.uuid)
        yield Target(
            process=process,
            name=domain.name,
            uuid=domain.uuid,
            xml=xml,
            source=source,
            is_managed=False,
        )


def machine_here(args: argparse.Namespace, domain: str | None = None) -> int | None:
    """Return the VMID that is named, None when it is for libvirt to tell what is meant.

    Parameters
        domain  what was named, if not ``args.domain``
    """
    name = args.domain if domain is None else domain
    return known_here(name, Places()) if args.connect == libvirtio.DEFAULT_URI else None


def _machine(vmid: int, process: Process) -> Target:
    domain = domain_of(vmid, process.command_line())
    return Target(
        process=process,
        name=domain.name,
        uuid=domain.uuid,
        xml=None,
        source=f"policy of VM {vmid}",
        is_managed=True,
        files=Files(vmid, Places()),
    )


def _recorded(process: Process) -> Target:
    for recorded in state_dir().all(_tell_damaged):
        if is_same_process(recorded, process):
            return Target(
                process=process,
                name=recorded.domain,
                uuid=recorded.uuid,
                xml=None,
                source="",
                is_managed=False,
            )
    raise TargetNotFound(
        f"nothing is recorded of process {process.pid}; name its domain XML with --xml FILE",
        pid=process.pid,
    )


def _tell_damaged(error: StateError) -> None:
    logger.warning("%s", error)


def state_dir() -> StateDir:
    """Return the state directory; one line when it cannot be read at all."""
    state = StateDir()
    try:
        state.path.stat()
    except FileNotFoundError:
        return state
    except OSError as error:
        raise StateError(f"cannot read {state.path}: {error.strerror}") from error
    return state
