# SPDX-License-Identifier: Apache-2.0
"""How verbs name a running VM: a libvirt domain, or a process of another manager."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.errors import PolicyValueError, StateError, TargetNotFound, UsageError
from kvmi_libvirt.introspect import is_same_process
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.policy.document import read_file
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.qemu.process import Process, open_domain
from kvmi_libvirt.quoting import printable
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A running VM: its open process, and how to find its policy.

    Parameters
        xml         the domain's, whose introspection element may be wrong; None for a
                    hooked process that was named without it
        source      what *xml* is, for messages
        is_libvirt  libvirt runs it
    """

    process: Process
    name: str
    uuid: str
    xml: bytes | None
    source: str
    is_libvirt: bool

    def domain_xml(self) -> bytes:
        """Return the domain XML.

        Raises
            UsageError  none was given.
        """
        if self.xml is None:
            raise UsageError("--pid needs --xml FILE here: the policy is found by the domain XML")
        return self.xml


def add_target_arguments(parser: argparse.ArgumentParser, *, positional: bool = True) -> None:
    """Declare DOMAIN, --connect, and --pid with --xml."""
    if positional:
        parser.add_argument("domain", nargs="?", metavar="DOMAIN", help="name, uuid or id")
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
                is_libvirt=True,
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
            is_libvirt=False,
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
                is_libvirt=False,
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
