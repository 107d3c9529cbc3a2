# SPDX-License-Identifier: Apache-2.0
"""How verbs name a running VM: a libvirt domain, or a process of another manager."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.errors import PolicyError, StateError, UsageError
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.policy.document import read_file
from kvmi_libvirt.policy.element import Domain, parse_domain
from kvmi_libvirt.qemu.process import Process, open_domain
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A running VM: its open process, and what its domain XML says."""

    process: Process
    domain: Domain
    is_libvirt: bool


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare DOMAIN, --connect, and --pid with --xml."""
    parser.add_argument("domain", nargs="?", metavar="DOMAIN", help="name, uuid or id")
    parser.add_argument(
        "-c", "--connect", metavar="URI", default=libvirtio.DEFAULT_URI, help="libvirt to ask"
    )
    parser.add_argument(
        "--pid", type=int, metavar="PID", help="a QEMU that libvirt does not run; needs --xml"
    )
    parser.add_argument(
        "--xml", metavar="FILE", help="with --pid: its domain XML, with name and uuid"
    )


@contextlib.contextmanager
def open_target(args: argparse.Namespace) -> Iterator[Target]:
    """Open the VM that *args* name, for the block.

    Raises
        UsageError      they name none, or two
        TargetNotFound  no such VM, or it does not run
        PolicyError     with --pid: the file is no domain XML
    """
    if args.pid is not None:
        if args.domain is not None or args.xml is None:
            raise UsageError("--pid goes with --xml FILE, and without DOMAIN")
        domain = parse_domain(read_file(args.xml), source=args.xml)
        if not domain.uuid or not domain.name:
            raise PolicyError("no <name> or no <uuid>", source=args.xml)
        with Process(Pid(args.pid)) as process:
            process.require_uuid(domain.uuid)
            yield Target(process=process, domain=domain, is_libvirt=False)
        return
    if args.domain is None:
        raise UsageError("name a DOMAIN, or --pid PID with --xml FILE")
    running = libvirtio.running_domain(args.domain, uri=args.connect)
    domain = parse_domain(running.xml, source=f"XML of domain '{running.name}'")
    with open_domain(running.name, running.uuid) as process:
        yield Target(process=process, domain=domain, is_libvirt=True)


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
