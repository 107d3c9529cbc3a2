# SPDX-License-Identifier: Apache-2.0
"""Judge the security modules, /dev/kvm and the kernel. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi.probing import Outcome
from kvmi_libvirt.doctor.report import Check
from kvmi_libvirt.quoting import shortened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.doctor.facts import KernelFacts, KvmFacts, LibvirtFacts, SecurityFacts
    from kvmi_libvirt.doctor.report import Line

EMULATE: Final = (
    "to try it without one, name a kvmi-emulated-qemu as <emulator> of a domain, or use "
    "'kvmi-libvirt emulate'"
)


def what_to_do(outcome: Outcome | None) -> str:
    """Return what to do about a kernel whose probe had this *outcome*."""
    match outcome:
        case Outcome.ABSENT:
            return EMULATE
        case Outcome.OFF:
            return "the parameter's value is in /sys/module/kvm/parameters/introspection"
        case None:
            return "see /dev/kvm; run as root"
        case _:
            return "'kvmi-libvirt names --help' lists the revisions that are known"


# -- what may forbid it --------------------------------------------------------------------


def check_security(security: SecurityFacts, libvirt: LibvirtFacts) -> Iterator[Line]:
    """Yield what Yama, AppArmor and SELinux say."""
    if not security.is_root:
        yield Check("root", "that this is run by root").warn(
            "much cannot be seen by others", "sudo kvmi-libvirt doctor"
        )
    elif security.has_ptrace is not None:
        yield _capability(security.has_ptrace)
    yield _yama(security)
    yield from _apparmor(security, libvirt)
    yield from _selinux(security, libvirt)
    if security.refusals:
        yield Check("refusals", "for refusals by AppArmor or SELinux").warn(
            f"the log has: {shortened(security.refusals[-1], 200)}",
            "if that is not old, our rules for it are missing",
        )


def _capability(has_ptrace: bool) -> Line:
    found = Check("own-capabilities", "that root may trace QEMU here (CAP_SYS_PTRACE)")
    if has_ptrace:
        return found.passed()
    return found.fail(
        "this shell runs without CAP_SYS_PTRACE, in a container perhaps",
        "run this on the host itself, or give the container that capability",
    )


def _yama(security: SecurityFacts) -> Line:
    found = Check("yama", "that Yama lets root trace processes")
    if security.yama == 3:
        return found.fail(
            "kernel.yama.ptrace_scope is 3: nobody traces anything until the next boot",
            "set it to 0, 1 or 2 in /etc/sysctl.d/, then reboot",
        )
    if security.yama is None:
        return found.passed("the kernel has no Yama")
    return found.passed(f"ptrace_scope {security.yama}")


def _apparmor(security: SecurityFacts, libvirt: LibvirtFacts) -> Iterator[Line]:
    found = Check("apparmor", "for our AppArmor rules")
    if not security.apparmor:
        yield found.passed("AppArmor is off")
        return
    labels = {daemon.label for daemon in libvirt.daemons}
    confined = sorted(label for label in labels if label.endswith("(enforce)"))
    if not confined:
        yield found.passed("libvirt is not confined")
    elif not security.apparmor_rules:
        yield found.warn(
            f"libvirt is confined ({confined[0]}), and no rule of ours is in /etc/apparmor.d: a "
            "tool's socket may be refused to QEMU's threads",
            f"{security.apparmor_readme} says what to put where",
        )
    elif security.apparmor_unloaded:
        profile, path = security.apparmor_unloaded[0]
        yield found.warn(
            f"{path} was changed after the profile {profile} was loaded: what is new in it is not "
            "in force",
            "systemctl reload apparmor",
        )
    else:
        yield found.passed(f"{', '.join(security.apparmor_rules)}; a VM has them from its start")


def _selinux(security: SecurityFacts, libvirt: LibvirtFacts) -> Iterator[Line]:
    found = Check("selinux", "for our SELinux module")
    if security.selinux is None:
        yield found.passed("SELinux is off")
        return
    install = f"{security.selinux_readme} says how, or install the package kvmi-libvirt-selinux"
    is_there = (
        security.selinux_module if security.selinux_loaded is None else security.selinux_loaded
    )
    yield from _booleans(security, libvirt, has_module=is_there is True)
    if is_there:
        loaded = "loaded" if security.selinux_loaded else "installed"
        yield found.passed(f"{security.selinux}, module {loaded}")
    elif security.selinux_module:
        yield found.warn(
            f"{security.selinux}; our module is installed, but not in the policy that is in force",
            "semodule -B",
        )
    elif is_there is None:
        yield found.warn(f"{security.selinux}; the installed modules cannot be read", "run as root")
    elif security.selinux == "permissive":
        yield found.warn(
            "permissive, and our module is not installed: enforcing, it may refuse", install
        )
    else:
        yield found.warn(
            "enforcing, and our module is not installed: libvirt may not execute the hook, or "
            "the hook may not trace QEMU",
            f"{install}; 'ausearch -m avc -ts recent' says what was refused",
        )


def _booleans(
    security: SecurityFacts, libvirt: LibvirtFacts, *, has_module: bool
) -> Iterator[Line]:
    if security.deny_ptrace:
        tracing = Check("selinux-ptrace", "that SELinux lets root trace processes")
        if has_module:
            yield tracing.passed("deny_ptrace is on; our module excepts the QEMUs of VMs")
        else:
            yield tracing.fail(
                "the boolean deny_ptrace is on: no process may be traced",
                f"install our module ({security.selinux_readme}), or: setsebool -P deny_ptrace off",
            )
    # Only the modular daemon runs hooks in a domain of their own.
    is_modular = any(":virtqemud_t:" in daemon.label for daemon in libvirt.daemons)
    if is_modular and security.hooks_unconfined is not None:
        hooks = Check("selinux-hooks", "that SELinux lets libvirt run hooks")
        if security.hooks_unconfined:
            yield hooks.passed("virt_hooks_unconfined is on")
        else:
            yield hooks.warn(
                f"the boolean virt_hooks_unconfined is off: {security.selinux}, virtqemud may not "
                "be allowed to run the hook, and then starts no VM",
                "setsebool -P virt_hooks_unconfined on",
            )


# -- the kernel ----------------------------------------------------------------------------


def check_kernel(kernel: KernelFacts, kvm: KvmFacts, *, excuse: str | None) -> Iterator[Line]:
    """Yield whether this kernel can do it.

    Parameters
        excuse  why a kernel without KVMI will do all the same, None when it will not
    """
    yield from _device(kvm)
    if not kernel.has_pidfd_getfd:
        yield Check("pidfd", "for pidfd_getfd in the kernel").fail(
            "the kernel is older than Linux 5.6: no socket can be passed to QEMU",
            "boot a newer one",
        )
    if not kernel.has_sock_diag:
        yield Check("sock-diag", "that the kernel tells of unix sockets").warn(
            "it has no unix_diag: nobody notices when a tool goes away", "modprobe unix_diag"
        )
    found = Check("kvmi", "for KVMI in the kernel")
    if kernel.outcome is Outcome.FOUND:
        yield found.passed(kernel.why)
    elif excuse is not None:
        yield found.warn(kernel.problem or kernel.why, excuse)
    elif kernel.outcome is None:
        told = f"{kernel.problem}, so the kernel cannot be asked"
        yield found.fail(told, what_to_do(None))
    else:
        yield found.fail(kernel.why, what_to_do(kernel.outcome))
    yield _parameter(kernel, excuse)


def _parameter(kernel: KernelFacts, excuse: str | None) -> Line:
    found = Check("kvmi-parameter", "kvm.introspection")
    if kernel.parameter is None:
        if kernel.outcome is Outcome.FOUND:
            return found.passed("this kernel has no such switch")
        told = "the kvm module has no such parameter, or is not loaded"
        return found.warn(told, excuse or "see 'KVMI in the kernel'")
    if kernel.parameter in ("Y", "1"):
        return found.passed(kernel.parameter)
    told = f"it is {kernel.parameter}: KVM introspection is switched off"
    if excuse is not None:
        return found.warn(told, excuse)
    return found.fail(told, "boot with kvm.introspection=1, or load kvm with introspection=1")


def _device(kvm: KvmFacts) -> Iterator[Line]:
    found = Check("dev-kvm", "/dev/kvm")
    access = kvm.access
    if access is None:
        yield found.fail(
            "/dev/kvm is not there: no VM can use KVM",
            "switch virtualization on in the firmware; modprobe kvm_intel, or kvm_amd",
        )
    elif kvm.may_open is False:
        yield found.fail(
            f"libvirt runs QEMU as {kvm.user}, who may not open it ({access.describe()})",
            f"chgrp kvm {access.path}; chmod 0660 {access.path}",
        )
    elif kvm.may_open is None:
        yield found.passed(f"{access.describe()}; who may open it cannot be told")
    else:
        yield found.passed(f"{access.describe()}, open to {kvm.user}")
