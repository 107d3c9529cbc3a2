# SPDX-License-Identifier: Apache-2.0
"""Judge our own files, the directory of tools' sockets, and the agent. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmi_libvirt.doctor.report import Check
from kvmi_libvirt.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.doctor.facts import (
        Access,
        AgentFacts,
        ConfigFacts,
        SocketFacts,
        SocketsFacts,
        StateFacts,
    )
    from kvmi_libvirt.doctor.report import Line

START_AGENT: Final = "systemctl enable --now kvmi-libvirt-agent (or run 'kvmi-libvirt agent')"
FORGET_RECORD: Final = "remove that file; what the VM has then stays until it is shut down"

_OTHERS_WRITE: Final = 0o002
_SHOWN: Final = 3


# -- our own files -------------------------------------------------------------------------


def check_config(config: ConfigFacts) -> Iterator[Line]:
    """Yield whether what an administrator wrote can be used."""
    schemas = Check("schemas", "for the schemas of policies")
    if config.schema_problem is None:
        yield schemas.passed()
    else:
        yield schemas.fail(config.schema_problem, "install kvmi-libvirt anew", code=ExitCode.FAILED)
    policy = Check("host-policy", "the host's policy")
    if config.host_policy_problem is not None:
        yield policy.fail(
            config.host_policy_problem,
            "nothing is allowed until it is right: kvmi-libvirt check "
            "/etc/kvmi-libvirt/host-policy.xml",
            code=ExitCode.POLICY,
        )
    elif not config.has_host_policy:
        yield policy.passed("there is none: the defaults hold")
    else:
        yield policy.passed(f"{_count(config.assignments, 'assignment')}")
    if config.profile_problems:
        profiles = Check("profiles", "the host's own profiles")
        todo = "correct it; 'kvmi-libvirt check FILE' says whether it is right"
        yield profiles.fail(_first(config.profile_problems), todo, code=ExitCode.POLICY)
    secrets = Check("secrets", "the secrets' owners and modes")
    if config.secret_problems:
        todo = "a secret is a file of root's, mode 0600, with 1 to 4096 bytes"
        yield secrets.fail(_first(config.secret_problems), todo, code=ExitCode.POLICY)
    else:
        yield secrets.passed(_count(config.secrets, "secret"))

    if config.agent_problem is not None:
        yield Check("agent-conf", "the agent's configuration").fail(
            f"no agent starts with it: {config.agent_problem}",
            "correct it, then: kvmi-libvirt agent --check-config",
            code=ExitCode.FAILED,
        )


def _first(problems: tuple[str, ...]) -> str:
    more = len(problems) - 1
    return f"{problems[0]} (and {more} more like it)" if more else problems[0]


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def check_state(state: StateFacts) -> Iterator[Line]:
    """Yield whether the records of VMs are sound."""
    found = Check("state", "the records of VMs in /run/kvmi-libvirt")
    access = state.access
    if access is None:
        yield found.passed("nothing was ever recorded since the host was started")
    elif access.uid != 0 or access.mode & 0o077:
        yield found.fail(
            f"{access.path} is not root's alone ({access.describe()}): its records could be forged",
            f"chown root: {access.path}; chmod 0700 {access.path}",
        )
    elif state.problem is not None:
        yield found.warn(state.problem, "run as root")
    elif state.damaged:
        yield found.fail(_first(state.damaged), FORGET_RECORD, code=ExitCode.FAILED)
    elif state.interrupted:
        names = ", ".join(state.interrupted[:_SHOWN])
        yield found.warn(
            f"a session was interrupted and may have left its hook in: {names}",
            f"kvmi-libvirt unhook {state.interrupted[0]}",
        )
    else:
        yield found.passed(f"{_count(state.hooked, 'VM')} hooked")


# -- the tools' sockets --------------------------------------------------------------------


def check_sockets(sockets: SocketsFacts) -> Iterator[Line]:
    """Yield whether only tools can be taken for tools."""
    found = Check("socket-directory", "the directory of tools' sockets")
    directory = sockets.directory
    if directory is None:
        yield found.warn(
            "/run/kvmi is not there: tools have no place to listen", "kvmi-libvirt install"
        )
        return
    if directory.uid != 0 or directory.mode & _OTHERS_WRITE:
        yield found.fail(
            f"{directory.path} is not root's alone ({directory.describe()}): whoever can write "
            "there can pose as a tool",
            f"chown root:root {directory.path}; chmod 0755 {directory.path}",
        )
    else:
        yield found.passed(directory.describe())
    owners = Check("sockets", "the owners of tools' sockets")
    if sockets.problem is not None:
        yield owners.warn(sockets.problem, "run as root")
        return
    wrong = [line for socket in sockets.sockets if (line := _socket(owners, socket, sockets))]
    stale = [socket.access.path for socket in sockets.sockets if socket.listener is None]
    if wrong:
        yield wrong[0]
    elif stale:
        yield owners.warn(
            f"nobody listens on {', '.join(stale[:_SHOWN])}: the tool has ended",
            "start it, or remove what it left",
        )
    else:
        yield owners.passed(_count(len(sockets.sockets), "socket"))


def _socket(found: Check, socket: SocketFacts, sockets: SocketsFacts) -> Line | None:
    problem = socket_problem(socket, qemu_uid=sockets.qemu_uid)
    return None if problem is None else found.fail(*problem)


def socket_problem(socket: SocketFacts, *, qemu_uid: int | None) -> tuple[str, str] | None:
    """Return why a tool's socket is not to be trusted and what to do, or None.

    It must belong to root or to the tool that listens, and nobody else may be able to
    put another in its place. It never belongs to QEMU's user: a guest that has broken
    out could pose as the tool.
    """
    access = socket.access
    tool = socket.listener
    if qemu_uid and access.uid == qemu_uid:
        told = f"{access.path} belongs to {access.owner}, as whom QEMU runs: a guest that has "
        return told + "broken out could pose as the tool", "run the tool as another user"
    # A socket that was left behind is its maker's, who has a directory of its own.
    own = {directory.uid for directory in socket.directories[-1:]} if tool is None else tool.uids
    trusted = {0, *own} - {qemu_uid or -1}
    if access.uid not in trusted and (tool is None or tool.uids):
        who = "nobody listens on it" if tool is None else f"the tool is {tool.who}"
        told = f"{access.path} belongs to {access.owner}, but {who}: its owner can put another "
        todo = f"restart the tool, or chown {_owner_of(socket)} {access.path}"
        return told + "in its place", todo
    for directory in socket.directories:
        if problem := _directory_problem(directory, {*trusted, access.uid}):
            return problem
    return None


def _owner_of(socket: SocketFacts) -> str:
    return "root" if socket.listener is None else str(min(socket.listener.uids, default=0))


def _directory_problem(directory: Access, trusted: set[int]) -> tuple[str, str] | None:
    if directory.uid not in trusted:
        return (
            f"{directory.path} belongs to {directory.owner}, who can put another socket there",
            f"chown root {directory.path}",
        )
    if directory.mode & _OTHERS_WRITE:
        return (
            f"anybody can put a socket into {directory.path} ({directory.describe()})",
            f"chmod o-w {directory.path}",
        )
    return None


# -- the agent -----------------------------------------------------------------------------


def check_agent(agent: AgentFacts, *, needed_by: str | None) -> Iterator[Line]:
    """Yield whether the agent answers, where one is wanted.

    Parameters
        needed_by  whose policy takes an agent, None when none does
    """
    found = Check("agent", "that the agent answers")
    access = agent.access
    if access is not None and (access.uid != 0 or access.mode & 0o077):
        yield found.fail(
            f"{access.path} is not root's alone ({access.describe()}): others could give it orders",
            "stop the agent, remove the socket, start the agent",
        )
    elif agent.pid is not None:
        yield found.passed(f"process {agent.pid}")
    elif agent.problem is not None:
        yield found.fail(agent.problem, f"start it: {START_AGENT}")
    elif agent.is_enabled:
        yield found.fail(
            "its service is enabled, but no agent runs",
            "systemctl start kvmi-libvirt-agent; why it ended: journalctl -u kvmi-libvirt-agent",
        )
    elif needed_by is not None:
        yield found.fail(f"{needed_by}, and no agent runs", START_AGENT)
    else:
        yield found.warn(
            "none runs: VMs are hooked when they start all the same, but no tool is called again, "
            "and a changed policy waits for 'kvmi-libvirt apply'",
            START_AGENT,
        )
