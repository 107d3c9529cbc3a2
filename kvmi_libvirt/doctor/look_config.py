# SPDX-License-Identifier: Apache-2.0
"""Look at our own files: schemas, the host's policy, profiles, secrets, records."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvmi_libvirt.agent.settings import CONFIG_PATH, load_settings
from kvmi_libvirt.doctor.facts import ConfigFacts, StateFacts
from kvmi_libvirt.doctor.look_kernel import access_of
from kvmi_libvirt.errors import KvmiLibvirtError, PolicyError, StateError
from kvmi_libvirt.introspect import interrupted, look_at
from kvmi_libvirt.policy.host import HOST_POLICY_PATH, load_host_policy
from kvmi_libvirt.policy.profile import PROFILES_DIRECTORY, Profiles
from kvmi_libvirt.policy.secret import SECRETS_DIRECTORY, read_secret
from kvmi_libvirt.policy.shape import load_schemas
from kvmi_libvirt.state import HOOKED, WAITING, StateDir, VmState

_MAX_FILES: Final = 1000


def look_at_config(
    *,
    host_policy: Path = HOST_POLICY_PATH,
    profiles: Path = PROFILES_DIRECTORY,
    secrets: Path = SECRETS_DIRECTORY,
    agent_conf: Path = CONFIG_PATH,
    owner: int = 0,
) -> ConfigFacts:
    """Read everything an administrator may have written, as the hook would.

    Parameters
        owner  uid it must belong to
    """
    schema_problem = None
    try:
        load_schemas()
    except KvmiLibvirtError as error:
        schema_problem = str(error)
    host_problem, assignments, reconnecting = None, 0, 0
    if schema_problem is None:
        try:
            known = Profiles(profiles, owner=owner)
            host = load_host_policy(host_policy, owner=owner, profiles=known)
            assignments = len(host.assignments)
            policies = (assignment.policy for assignment in host.assignments)
            reconnecting = sum(policy.reconnect_s is not None for policy in policies)
        except PolicyError as error:
            host_problem = str(error)
    secret_names = _names(secrets)
    return ConfigFacts(
        schema_problem=schema_problem,
        has_host_policy=access_of(host_policy) is not None,
        host_policy_problem=host_problem,
        assignments=assignments,
        reconnecting=reconnecting,
        profile_problems=() if schema_problem else tuple(_profile_problems(profiles, owner)),
        secret_problems=tuple(_secret_problems(secrets, secret_names, owner)),
        secrets=len(secret_names),
        agent_problem=_agent_problem(agent_conf),
    )


def _agent_problem(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        load_settings(path)
    except KvmiLibvirtError as error:
        return str(error)
    return None


def _names(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir())[:_MAX_FILES]
    except OSError:
        return []


def _profile_problems(directory: Path, owner: int) -> list[str]:
    found = []
    known = Profiles(directory, owner=owner)
    for name in _names(directory):
        if not name.endswith(".xml"):
            continue
        try:
            known(name.removesuffix(".xml"))
        except PolicyError as error:
            found.append(str(error))
    return found


def _secret_problems(directory: Path, names: list[str], owner: int) -> list[str]:
    found = []
    access = access_of(directory)
    if access is not None and (access.uid != owner or access.mode & 0o077):
        found.append(f"{directory} is open to others ({access.describe()}); chmod 0700")
    for name in names:
        try:
            read_secret(name, directory=directory, owner=owner)
        except PolicyError as error:
            found.append(str(error))
    return found


# -- records -------------------------------------------------------------------------------


def look_at_state(state: StateDir) -> StateFacts:
    """Read what is recorded of VMs, and check it against what can be seen."""
    access = access_of(state.path)
    if access is None:
        return StateFacts()
    damaged: list[StateError] = []
    try:
        records = [seen for found in state.all(damaged.append) if (seen := look_at(found))]
        journals = [interrupted(left, state) for left in state.journals(damaged.append)]
    except (KvmiLibvirtError, OSError) as error:
        return StateFacts(access=access, problem=str(error))
    unfinished = [found.domain for found in journals if found and found.state != WAITING]
    return StateFacts(
        access=access,
        damaged=tuple(str(error) for error in damaged),
        interrupted=tuple(unfinished),
        waiting=tuple(_names_in(records, WAITING)),
        hooked=len(_names_in(records, HOOKED)),
    )


def _names_in(records: list[VmState], state: str) -> list[str]:
    return [record.domain for record in records if record.state == state]
