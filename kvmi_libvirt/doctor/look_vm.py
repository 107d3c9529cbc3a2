# SPDX-License-Identifier: Apache-2.0
"""Look at one VM: its policy, its emulator, its process, its tool, what is recorded of it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi import revisions
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.doctor.facts import RecordFacts, VmFacts
from kvmi_libvirt.doctor.look_kernel import qemu_account, user_name
from kvmi_libvirt.doctor.look_logs import lines_about
from kvmi_libvirt.doctor.look_security import (
    apparmor_rules,
    changed_since,
    is_for_daemon,
    loaded_at,
)
from kvmi_libvirt.errors import KvmiLibvirtError, PlanError, PolicyError, StateError
from kvmi_libvirt.introspect import look_at
from kvmi_libvirt.plan import make_plan
from kvmi_libvirt.policy.document import parse
from kvmi_libvirt.policy.element import domain_of, parse_domain
from kvmi_libvirt.policy.findings import Severity
from kvmi_libvirt.policy.limits import HostPolicy
from kvmi_libvirt.policy.lint import lint
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.policy.secret import read_secret

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.doctor.look_libvirt import Told
    from kvmi_libvirt.doctor.look_process import Processes
    from kvmi_libvirt.doctor.look_sockets import Sockets
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.state import StateDir, VmState

_WRAPPER: Final = "kvmi-emulated-qemu"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What VMs are looked at against: read once, for any number of them.

    Parameters
        host       the host's policy; None when that cannot be used, for ``host_problem``
        kernel_abi name of the running kernel's revision, None: it has none, or who knows
    """

    host: HostPolicy | None
    host_problem: str | None
    kernel_abi: str | None
    state: StateDir
    processes: Processes
    sockets: Sockets


def look_at_vm(told: Told, world: World, *, with_log: bool = True) -> VmFacts:
    """Find out everything about a domain."""
    source = f"XML of domain '{told.name}'"
    policy, problem, warnings = _policy_of(told.xml, world, source)
    record, record_facts = _record_of(told, world)
    emulator = _emulator_of(told.xml, source)
    wrapper_abi = _wrapper_abi(emulator)
    process = world.processes.look_at(told.name, told.uuid, is_active=told.is_active)
    is_emulated = wrapper_abi is not None or process.supervisor is not None
    abi = wrapper_abi if is_emulated else _named(world.kernel_abi)
    if record is not None and record.abi is not None:
        abi = _named(record.abi) or abi
    log = lines_about(told.name, told.uuid) if with_log else None
    return VmFacts(
        name=told.name,
        uuid=told.uuid,
        is_active=told.is_active,
        told_by=told.by,
        policy=policy,
        policy_source=_origin(policy),
        policy_problem=problem,
        warnings=warnings,
        config_differs=_config_differs(told, policy, world),
        secret_problem=_secret_problem(policy),
        emulator=emulator,
        emulator_problem=_emulator_problem(emulator),
        is_emulated=is_emulated,
        emulated_abi=None if wrapper_abi is None else wrapper_abi.name,
        unsupported=_unsupported(policy, abi),
        vcpus=_vcpus(told.xml, source),
        newer_rules=newer_rules(told.uuid) if told.is_active else None,
        process=process,
        tool=None if policy is None else world.sockets.look_at_tool(policy.source),
        record=record_facts,
        journal=_journal(told, world.state, process.pid),
        log=() if log is None else log.lines,
        log_place="" if log is None or not log.lines else log.place,
    )


# -- the policy ----------------------------------------------------------------------------


def _policy_of(
    xml: bytes, world: World, source: str
) -> tuple[Policy | None, str | None, tuple[str, ...]]:
    if world.host is None:
        return None, world.host_problem, ()
    try:
        domain, policy = decide(xml, world.host, source=source)
    except KvmiLibvirtError as error:
        return None, str(error), ()
    if world.host.assignment(domain) is not None:
        return policy, None, ()
    # What libvirt keeps, but we would not find, or would find odd.
    findings = lint(xml, source=source, host=world.host).findings
    errors = [found.message for found in findings if found.severity is Severity.ERROR]
    told = tuple(found.message for found in findings if found.severity is not Severity.ERROR)
    if policy is None and errors:
        return None, f"{source}: {errors[0]}", told
    return policy, None, told


def _origin(policy: Policy | None) -> str:
    if policy is None:
        return ""
    line = "" if policy.line is None else f":{policy.line}"
    return f"{policy.origin or 'its element'}{line}"


def _config_differs(told: Told, policy: Policy | None, world: World) -> bool:
    if told.config_xml is None or world.host is None:
        return False
    try:
        return decide(told.config_xml, world.host, source="")[1] != policy
    except KvmiLibvirtError:
        return True


def _secret_problem(policy: Policy | None) -> str | None:
    if policy is None or policy.secret is None:
        return None
    try:
        read_secret(policy.secret)
    except PolicyError as error:
        return str(error)
    return None


def _vcpus(xml: bytes, source: str) -> int:
    try:
        return parse_domain(xml, source=source, with_policy=False).vcpus
    except KvmiLibvirtError:
        return 0


def newer_rules(uuid: str) -> str | None:
    """Return a file with AppArmor rules of ours that the profile of a VM is older than."""
    moment = loaded_at(f"libvirt-{uuid}")
    if moment is None:
        return None
    rules = [path for path in apparmor_rules() if not is_for_daemon(path)]
    found = changed_since(moment, rules)
    return None if found is None else str(found)


# -- what it runs on -----------------------------------------------------------------------


def _emulator_of(xml: bytes, source: str) -> str | None:
    try:
        domain = domain_of(parse(xml, source=source))
    except KvmiLibvirtError:
        return None
    return None if domain is None else domain.findtext("devices/emulator")


def _emulator_problem(emulator: str | None) -> str | None:
    if emulator is None:
        return None
    try:
        found = os.stat(emulator)
        if not stat.S_ISREG(found.st_mode) or not found.st_mode & 0o111:
            return f"{emulator} cannot be executed"
        closed = _closed_directory(emulator)
    except (FileNotFoundError, NotADirectoryError):
        return f"{emulator} is not there"
    except OSError:  # not ours to see
        return None
    if closed is None:
        return None
    return f"QEMU's user may not enter {closed}, so cannot execute {emulator}"


def _closed_directory(program: str) -> Path | None:
    """Return the first directory on the way to *program* that QEMU's user may not enter."""
    account = qemu_account()
    if account is None:
        return None
    name, groups = account
    # The way to a link, and the way to what it leads to.
    places = (Path(os.path.abspath(program)), Path(os.path.realpath(program)))
    for directory in (parent for path in places for parent in reversed(path.parents)):
        found = directory.stat()
        if user_name(found.st_uid) == name:
            may_enter = found.st_mode & 0o100
        elif found.st_gid in groups:
            may_enter = found.st_mode & 0o010
        else:
            may_enter = found.st_mode & 0o001
        if not may_enter:
            return directory
    return None


def _wrapper_abi(emulator: str | None) -> KvmiAbi | None:
    """Return the revision a wrapper of ours emulates, None for a plain QEMU."""
    if emulator is None:
        return None
    for path in (emulator, os.path.realpath(emulator)):
        name = os.path.basename(path)
        if name.startswith(_WRAPPER):
            return _named(name.removeprefix(_WRAPPER).removeprefix("-")) or V12
    return None


def runs_emulated(xml: bytes) -> bool:
    """Say whether a domain's ``<emulator>`` is a wrapper of ours."""
    return _wrapper_abi(_emulator_of(xml, "")) is not None


def _named(abi: str | None) -> KvmiAbi | None:
    try:
        return None if abi is None else revisions.by_name(abi)
    except KeyError:
        return None


def _unsupported(policy: Policy | None, abi: KvmiAbi | None) -> str | None:
    if policy is None or abi is None:
        return None
    try:
        make_plan(policy, abi, None)
    except PlanError as error:
        return str(error)
    return None


# -- what is recorded ----------------------------------------------------------------------


def _record_of(told: Told, world: World) -> tuple[VmState | None, RecordFacts | None]:
    try:
        recorded = world.state.load(told.uuid)
    except StateError as error:
        return None, RecordFacts(state="damaged", error=str(error))
    seen = None if recorded is None or not told.is_active else look_at(recorded)
    if recorded is None or seen is None:
        return None, None  # or it is of a process that has ended while nobody told us
    return recorded, RecordFacts(
        state=seen.state,
        source=seen.source,
        since=seen.since,
        error=seen.error,
        commands=len(seen.commands),
        events=len(seen.events),
    )


def _journal(told: Told, state: StateDir, pid: int | None) -> str:
    try:
        journal = state.load_journal(told.uuid)
    except StateError as error:
        return str(error)
    if journal is None or journal.pid != pid:
        return ""
    if state.is_locked(told.uuid):
        return "it is being hooked right now"
    return "a session with it was interrupted and may have left its hook in place"
