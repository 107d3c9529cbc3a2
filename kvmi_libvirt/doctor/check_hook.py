# SPDX-License-Identifier: Apache-2.0
"""Judge the hook, and libvirt's readiness to run it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmi_libvirt.doctor.report import Check

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from kvmi_libvirt.doctor.facts import HookFacts, LibvirtFacts, SecurityFacts
    from kvmi_libvirt.doctor.report import Line

INSTALL: Final = "kvmi-libvirt install"

# Where AppArmor's profile of libvirtd lets a hook execute programs.
_SYSTEM_BIN: Final = ("/usr/bin/", "/bin/", "/usr/sbin/", "/sbin/")


def check_hook(
    hook: HookFacts, libvirt: LibvirtFacts, security: SecurityFacts, *, own_version: str
) -> Iterator[Line]:
    """Yield whether libvirt would run the hook, and the hook would work."""
    if not libvirt.is_installed and not hook.exists:
        found = Check("hook", "for the libvirt hook")
        yield found.warn(
            "there is no libvirt on this host, and no hook", f"if that changes: {INSTALL}"
        )
        return
    usable = yield from _script(hook)
    if usable:
        yield from _interpreter(hook, security, own_version)
        yield _owner(hook)
    yield from _neighbours(hook)
    if usable:
        yield from _known(libvirt)


def _script(hook: HookFacts) -> Generator[Line, None, bool]:
    # Returns whether libvirt can run it.
    found = Check("hook", "for the libvirt hook")
    if not hook.exists:
        yield found.fail(f"{hook.path} is not there: no VM is hooked when it starts", INSTALL)
        return False
    if not hook.is_ours:
        yield found.fail(
            f"{hook.path} is not a hook of kvmi-libvirt", f"move it away, then: {INSTALL}"
        )
        return False
    yield found.passed(hook.path)
    executable = Check("hook-executable", "that the hook is executable")
    if not hook.is_executable:
        yield executable.fail(
            f"{hook.path} is not executable, so libvirt passes it by without a word",
            f"chmod 0755 {hook.path}",
        )
        return False
    yield executable.passed()
    starts = Check("hook-starts", "that the hook's own interpreter starts (-IS)")
    if hook.shebang_problem is not None:
        yield starts.fail(
            f"the hook cannot be started ({hook.shebang_problem}): libvirt then refuses every "
            "start, and ends running VMs when it restarts",
            "install Debian's or Fedora's own python3, or remove the hook: kvmi-libvirt uninstall",
        )
        return False
    yield starts.passed()
    current = Check("hook-version", "that the hook is of this version")
    if hook.is_current:
        yield current.passed()
    else:
        yield current.warn(f"{hook.path} differs from what this version installs", INSTALL)
    return True


def _interpreter(hook: HookFacts, security: SecurityFacts, own_version: str) -> Iterator[Line]:
    found = Check("hook-interpreter", "for the package in the hook's interpreter")
    if hook.python_problem is not None:
        yield found.fail(
            f"the hook runs {hook.python}, which cannot load kvmi_libvirt "
            f"({hook.python_problem}): VMs that require introspection are refused, all others "
            "start without",
            INSTALL,
        )
    elif hook.version != own_version:
        yield found.warn(
            f"{hook.python} has version {hook.version}, this command is {own_version}", INSTALL
        )
    elif security.apparmor and not (hook.python_program or "").startswith(_SYSTEM_BIN):
        yield found.warn(
            f"AppArmor's profile of libvirtd lets a hook execute programs in /usr/bin only, "
            f"and this one runs {hook.python_program}",
            "install the distribution's package, or add our rules to the profile",
        )
    else:
        yield found.passed(f"{hook.python}, version {hook.version}")


def _owner(hook: HookFacts) -> Line:
    found = Check("hook-owner", "that only root can change what the hook runs")
    if not hook.others_can:
        return found.passed()
    return found.warn(
        f"{'; '.join(hook.others_can)}: who can change that is root at the next start of a VM",
        f"install the distribution's package, or into a directory of root's; then: {INSTALL}",
    )


def _neighbours(hook: HookFacts) -> Iterator[Line]:
    found = Check("hook-leftovers", "for leftovers that libvirt would run")
    if hook.broken:
        path, why = hook.broken[0]
        more = f" (and {len(hook.broken) - 1} more)" if len(hook.broken) > 1 else ""
        yield found.fail(
            f"{path} is executable but cannot be started{more}: {why}; libvirt takes that for "
            "a refusal of every start, and ends running VMs when it restarts",
            f"repair it, or chmod -x {path}",
        )
    elif hook.stray:
        names = ", ".join(hook.stray)
        yield found.warn(
            f"libvirt runs every executable in that directory, these too: {names}",
            f"remove them, or chmod -x {hook.stray[0]}",
        )
    else:
        yield found.passed()


def _known(libvirt: LibvirtFacts) -> Iterator[Line]:
    found = Check("hook-known", "that the running libvirt knows of the hook")
    if not libvirt.daemons:
        if libvirt.version is None:
            yield found.passed("no libvirt daemon runs; it looks for hooks when it starts")
        else:
            yield found.warn(
                "a libvirt daemon answers that has no pidfile here, so it cannot be told",
                "if it was started before the hook was installed, reload it",
            )
    for daemon in libvirt.daemons:
        if daemon.knows_hooks:
            yield found.passed(f"{daemon.name}, process {daemon.pid}")
        else:
            yield found.fail(
                f"{daemon.name} (process {daemon.pid}) looked for qemu hooks at {daemon.since}; "
                "none of those here is known to have been there then, and nothing tells of a "
                "reload since: as far as can be told it runs none",
                f"{daemon.reload} (running VMs do not notice)",
            )


def check_libvirt(libvirt: LibvirtFacts, *, is_needed: bool) -> Iterator[Line]:
    """Yield whether libvirt answers, and may do what its hook needs.

    Parameters
        is_needed  a domain was asked about
    """
    found = Check("libvirt", "that libvirt answers")
    if libvirt.version is not None:
        yield found.passed(f"version {libvirt.version}")
    elif libvirt.is_silent:
        daemon = next((f"{one.name} (process {one.pid})" for one in libvirt.daemons), "it")
        yield found.fail(f"{libvirt.problem}, though {daemon} runs", what_holds_it_up(libvirt))
    elif libvirt.daemons:
        names = " ".join(daemon.name for daemon in libvirt.daemons)
        yield found.fail(f"{libvirt.problem}", f"see its log: journalctl -u {names}")
    elif is_needed:
        yield found.fail(f"{libvirt.problem}", "start it: systemctl start libvirtd, or virtqemud")
    else:
        yield found.warn(
            f"{libvirt.problem}", "to run VMs, start it: systemctl start libvirtd, or virtqemud"
        )
    yield from _ptrace(libvirt)


def what_holds_it_up(libvirt: LibvirtFacts) -> str:
    """Return what a libvirt daemon that does not answer waits for, or where to look."""
    for daemon in libvirt.daemons:
        if daemon.waits_for:
            return f"it waits for {daemon.waits_for[0]}; end that process"
    names = " ".join(f"'ps --ppid {daemon.pid}'" for daemon in libvirt.daemons)
    return f"a VM that is being started may hold it up: see {names or 'its processes'}, and its log"


def _ptrace(libvirt: LibvirtFacts) -> Iterator[Line]:
    found = Check("capabilities", "that the hook may trace QEMU (CAP_SYS_PTRACE)")
    for daemon in libvirt.daemons:
        if daemon.has_ptrace is None:
            yield found.warn(
                f"the capabilities of process {daemon.pid} cannot be read", "run as root"
            )
        elif daemon.has_ptrace:
            yield found.passed(f"as {daemon.name} has it")
        else:
            yield found.fail(
                f"{daemon.name} (process {daemon.pid}) runs without CAP_SYS_PTRACE, and so does "
                "its hook",
                f"take the limit out of the service: systemctl cat {daemon.name}",
            )
