# SPDX-License-Identifier: Apache-2.0
"""What can be known of a host and of a VM. Data only; None means that it is not known.

A field called ``problem`` says in one line why something could not be found out, or why
it cannot be used. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmi_libvirt.abi.probing import Outcome
    from kvmi_libvirt.policy.model import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who owns a file or directory, and its mode (permission bits only)."""

    path: str
    uid: int
    owner: str
    gid: int
    group: str
    mode: int

    def describe(self) -> str:
        """Return owner, group and mode in a word."""
        return f"{self.owner}:{self.group} {self.mode:04o}"


# -- the hook ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HookFacts:
    """The hook script, and what lies beside it.

    Parameters
        path            where it belongs
        exists          something is there
        is_ours         and it is our script
        is_executable   libvirt would run it
        is_current      it is the script of this version
        shebang_problem why the script cannot start
        python          the interpreter it runs the package with
        python_program  what that is, without links: this is what a security module sees
        python_problem  why that cannot
        version         of the package that interpreter has
        others_can      who besides root can change the script, the interpreter or the package
        stray           executables beside it that only look like leftovers of an editor or
                        a package manager; libvirt runs them too
        broken          executables libvirt cannot start, each with why
    """

    path: str
    exists: bool = False
    is_ours: bool = False
    is_executable: bool = False
    is_current: bool = False
    shebang_problem: str | None = None
    python: str | None = None
    python_program: str | None = None
    python_problem: str | None = None
    version: str | None = None
    others_can: tuple[str, ...] = ()
    stray: tuple[str, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonFacts:
    """A running libvirt daemon.

    Parameters
        knows_hooks  it is certain that it runs qemu hooks
        reload       what to type to make it look again
        has_ptrace   it may trace any process; None where that cannot be read
        label        its label under a security module, "" for none
        waits_for    hooks it runs at this moment, each in words
    """

    name: str
    pid: int
    since: str
    knows_hooks: bool
    reload: str
    has_ptrace: bool | None = None
    label: str = ""
    waits_for: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtFacts:
    """libvirt as such.

    Parameters
        is_installed  there is a libvirt on this host
        is_silent     it was asked, and did not answer in time
    """

    is_installed: bool
    daemons: tuple[DaemonFacts, ...] = ()
    version: str | None = None
    problem: str | None = None
    is_silent: bool = False


# -- the kernel and its security modules ---------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFacts:
    """What the running kernel says of itself.

    Parameters
        outcome    of the probe, None where it could not be made
        abi        the revision's name
        why        the outcome in words
        problem    why there was no probe
        parameter  kvm.introspection as the kernel shows it
        has_pidfd_getfd, has_sock_diag  what else is needed of it
    """

    outcome: Outcome | None = None
    abi: str | None = None
    why: str = ""
    problem: str | None = None
    parameter: str | None = None
    has_pidfd_getfd: bool = True
    has_sock_diag: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmFacts:
    """/dev/kvm, and whether libvirt's QEMU may open it.

    Parameters
        access    None: there is none
        user      as whom libvirt runs QEMU
        may_open  None where that cannot be told
    """

    access: Access | None = None
    user: str = ""
    may_open: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityFacts:
    """What may keep us from a QEMU.

    Parameters
        is_root        this process is
        has_ptrace     this process has CAP_SYS_PTRACE; None where that cannot be read
        yama           kernel.yama.ptrace_scope, None without Yama
        apparmor       AppArmor is on
        apparmor_rules files of libvirt's profiles with rules of ours
        apparmor_unloaded  each profile of a daemon that was loaded before one of these files
                       was changed, and that file
        selinux        "enforcing", "permissive" or None
        selinux_module our policy module is installed; None where that cannot be read
        selinux_loaded and is in the kernel's policy; None where that cannot be read
        hooks_unconfined  the boolean virt_hooks_unconfined, None where there is none
        deny_ptrace    the boolean of that name
        refusals       the last log lines in which either refused something about us
        apparmor_readme, selinux_readme  where our rules are explained
    """

    is_root: bool
    has_ptrace: bool | None = True
    yama: int | None = None
    apparmor: bool = False
    apparmor_rules: tuple[str, ...] = ()
    apparmor_unloaded: tuple[tuple[str, str], ...] = ()
    selinux: str | None = None
    selinux_module: bool | None = None
    selinux_loaded: bool | None = None
    hooks_unconfined: bool | None = None
    deny_ptrace: bool = False
    refusals: tuple[str, ...] = ()
    apparmor_readme: str = "packaging/apparmor/README.md"
    selinux_readme: str = "packaging/selinux/README.md"


# -- our own files -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFacts:
    """Schemas, the host's policy, profiles, secrets, agent.conf: what is wrong with each."""

    schema_problem: str | None = None
    has_host_policy: bool = False
    host_policy_problem: str | None = None
    assignments: int = 0
    reconnecting: int = 0
    profile_problems: tuple[str, ...] = ()
    secret_problems: tuple[str, ...] = ()
    secrets: int = 0
    agent_problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFacts:
    """/run/kvmi-libvirt.

    Parameters
        access       None: it is not there
        damaged      one line for each file that is no record
        interrupted  VMs with the journal of a session that did not end
        waiting      VMs an agent is expected to hook yet
        hooked       how many are hooked
    """

    access: Access | None = None
    problem: str | None = None
    damaged: tuple[str, ...] = ()
    interrupted: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    hooked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who listens on a socket.

    Parameters
        uids  of the socket's maker and of the processes that hold it
        who   in words
    """

    uids: frozenset[int]
    who: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketFacts:
    """A socket below the directory of tools' sockets.

    Parameters
        directories  those on the way to it, from the top; only what is not right matters
        listener     None: nobody listens
    """

    access: Access
    directories: tuple[Access, ...] = ()
    listener: Listener | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketsFacts:
    """The directory of tools' sockets, and all in it.

    Parameters
        qemu_uid  as whom QEMU runs: such a socket could be a guest's
        is_whole  False: there are more than were looked at
    """

    directory: Access | None = None
    sockets: tuple[SocketFacts, ...] = ()
    problem: str | None = None
    qemu_uid: int | None = None
    is_whole: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFacts:
    """The agent.

    Parameters
        access    of its socket, None: there is none
        pid       what it answered, None: it did not
        problem   why not
        is_enabled  its service is to be started with the host
    """

    path: str
    access: Access | None = None
    pid: int | None = None
    problem: str | None = None
    is_enabled: bool = False


# -- a VM ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFacts:
    """The tool a policy names.

    Parameters
        where      the source in a word
        listens    None where that cannot be seen from here
        problem    why not, or why it cannot be told
        socket     of a unix source that exists
    """

    where: str
    listens: bool | None
    problem: str | None = None
    socket: SocketFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """The QEMU of a VM that runs.

    Parameters
        pid             None: there is none
        pidfile         its path
        pidfile_problem why it does not lead to the QEMU
        problem         why the process cannot be hooked
        vcpus           how many it has; None where that cannot be seen
        supervisor      process id of the KVMI emulator's supervisor, None: it has none
    """

    pid: int | None = None
    pidfile: str = ""
    pidfile_problem: str | None = None
    problem: str | None = None
    vcpus: int | None = None
    supervisor: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFacts:
    """What is recorded of a VM's introspection, held against what can be seen now."""

    state: str
    source: str | None = None
    since: str = ""
    error: str | None = None
    commands: int = 0
    events: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFacts:
    """One VM.

    Parameters
        is_active          it runs
        told_by            who told, if not libvirt itself
        policy             None: none applies, or it cannot be used
        policy_source      where it comes from
        policy_problem     why it cannot be used, one line
        warnings           what else is to be said of the XML
        config_differs     the next start would have another policy
        secret_problem     of the secret the policy names
        emulator           the program of its ``<emulator>``
        emulator_problem   why that cannot be executed
        is_emulated        it runs on the emulated KVMI kernel; ``emulated_abi`` says which
        unsupported        what the policy demands of the kernel in vain
        vcpus              as its XML says
        newer_rules        a file with AppArmor rules of ours that its profile is older than
        journal            a session with it did not end, or is at work: "" or a sentence
        log                the last lines of the logs that name it, ``log_place`` where they are
    """

    name: str
    uuid: str
    is_active: bool
    told_by: str | None = None
    policy: Policy | None = None
    policy_source: str = ""
    policy_problem: str | None = None
    warnings: tuple[str, ...] = ()
    config_differs: bool = False
    secret_problem: str | None = None
    emulator: str | None = None
    emulator_problem: str | None = None
    is_emulated: bool = False
    emulated_abi: str | None = None
    unsupported: str | None = None
    vcpus: int = 0
    newer_rules: str | None = None
    process: ProcessFacts = field(default_factory=ProcessFacts)
    tool: ToolFacts | None = None
    record: RecordFacts | None = None
    journal: str = ""
    log: tuple[str, ...] = ()
    log_place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Everything of the host."""

    hook: HookFacts
    libvirt: LibvirtFacts
    kernel: KernelFacts
    kvm: KvmFacts
    security: SecurityFacts
    config: ConfigFacts
    state: StateFacts
    sockets: SocketsFacts
    agent: AgentFacts
