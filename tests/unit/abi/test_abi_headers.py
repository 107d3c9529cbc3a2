# SPDX-License-Identifier: Apache-2.0
"""Our kernel structures and numbers against this machine's own headers, by its compiler."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt import linux, sockdiag
from kvmi_libvirt.abi import kvmi, ptrace, seccomp, x86_64
from kvmi_libvirt.qemu import remote

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADERS: Final = (
    "stddef.h",
    "stdio.h",
    "signal.h",
    "sys/socket.h",
    "sys/user.h",
    "sys/syscall.h",
    "sys/ioctl.h",
    "sys/wait.h",
    "linux/ptrace.h",
    "linux/seccomp.h",
    "linux/filter.h",
    "linux/audit.h",
    "linux/prctl.h",
    "linux/kcmp.h",
    "linux/kvm.h",
    "linux/netlink.h",
    "linux/sock_diag.h",
    "linux/unix_diag.h",
)

STRUCTURES: Final[Mapping[str, type[ctypes.Structure]]] = {
    "struct user_regs_struct": x86_64.user_regs_struct,
    "struct ptrace_syscall_info": ptrace.ptrace_syscall_info,
    "struct seccomp_data": seccomp.seccomp_data,
    "struct seccomp_notif": seccomp.seccomp_notif,
    "struct seccomp_notif_resp": seccomp.seccomp_notif_resp,
    "struct seccomp_notif_sizes": seccomp.seccomp_notif_sizes,
    "struct seccomp_notif_addfd": seccomp.seccomp_notif_addfd,
    "struct sock_filter": seccomp.sock_filter,
    "struct sock_fprog": seccomp.sock_fprog,
}

NESTED: Final = {
    "struct ptrace_syscall_info": {
        "entry.nr": 24,
        "entry.args": 32,
        "exit.rval": 24,
        "exit.is_error": 32,
    },
}

MACROS: Final[Mapping[str, int]] = {
    **{
        name: getattr(ptrace, name)
        for name in (
            "PTRACE_CONT",
            "PTRACE_GETREGS",
            "PTRACE_SETREGS",
            "PTRACE_DETACH",
            "PTRACE_SYSCALL",
            "PTRACE_SEIZE",
            "PTRACE_INTERRUPT",
            "PTRACE_GETSIGINFO",
            "PTRACE_SETSIGINFO",
            "PTRACE_GET_SYSCALL_INFO",
            "PTRACE_O_TRACESYSGOOD",
            "PTRACE_EVENT_STOP",
            "PTRACE_SYSCALL_INFO_NONE",
            "PTRACE_SYSCALL_INFO_ENTRY",
            "PTRACE_SYSCALL_INFO_EXIT",
            "PTRACE_SYSCALL_INFO_SECCOMP",
        )
    },
    "__WALL": ptrace.WALL,
    "sizeof(siginfo_t)": ptrace.SIGINFO_LEN,
    **{
        name: getattr(seccomp, name)
        for name in (
            "SECCOMP_SET_MODE_FILTER",
            "SECCOMP_GET_NOTIF_SIZES",
            "SECCOMP_FILTER_FLAG_NEW_LISTENER",
            "SECCOMP_FILTER_FLAG_TSYNC_ESRCH",
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
            "SECCOMP_RET_USER_NOTIF",
            "SECCOMP_RET_ALLOW",
            "SECCOMP_USER_NOTIF_FLAG_CONTINUE",
            "SECCOMP_ADDFD_FLAG_SETFD",
            "SECCOMP_ADDFD_FLAG_SEND",
            "PR_SET_NO_NEW_PRIVS",
            "PR_SET_PTRACER",
            "SECCOMP_IOCTL_NOTIF_RECV",
            "SECCOMP_IOCTL_NOTIF_SEND",
            "SECCOMP_IOCTL_NOTIF_ID_VALID",
            "SECCOMP_IOCTL_NOTIF_ADDFD",
            "SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP",
            "SECCOMP_IOCTL_NOTIF_SET_FLAGS",
        )
    },
    "BPF_LD|BPF_W|BPF_ABS": seccomp.BPF_LD_W_ABS,
    "BPF_JMP|BPF_JEQ|BPF_K": seccomp.BPF_JMP_JEQ_K,
    "BPF_JMP|BPF_JGE|BPF_K": seccomp.BPF_JMP_JGE_K,
    "BPF_JMP|BPF_JSET|BPF_K": seccomp.BPF_JMP_JSET_K,
    "BPF_JMP|BPF_JA": seccomp.BPF_JMP_JA,
    "BPF_RET|BPF_K": seccomp.BPF_RET_K,
    "AUDIT_ARCH_X86_64": x86_64.AUDIT_ARCH_X86_64,
    "SYS_close": x86_64.NR_CLOSE,
    "SYS_poll": x86_64.NR_POLL,
    "SYS_ppoll": x86_64.NR_PPOLL,
    "SYS_epoll_wait": x86_64.NR_EPOLL_WAIT,
    "SYS_epoll_pwait": x86_64.NR_EPOLL_PWAIT,
    "SYS_epoll_pwait2": x86_64.NR_EPOLL_PWAIT2,
    "SYS_restart_syscall": x86_64.NR_RESTART_SYSCALL,
    "SYS_ioctl": x86_64.NR_IOCTL,
    "SYS_recvmsg": x86_64.NR_RECVMSG,
    "SYS_socketpair": x86_64.NR_SOCKETPAIR,
    "SYS_mmap": x86_64.NR_MMAP,
    "SYS_munmap": x86_64.NR_MUNMAP,
    "SYS_tgkill": linux._SYS_TGKILL,
    "SYS_seccomp": linux._SYS_SECCOMP,
    "SYS_kcmp": linux._SYS_KCMP,
    "SYS_pidfd_getfd": linux._SYS_PIDFD_GETFD,
    "KCMP_FILE": linux.KCMP_FILE,
    "KCMP_VM": linux.KCMP_VM,
    "KVMIO": kvmi.KVMIO,
    "KVM_CREATE_VM": kvmi.KVM_CREATE_VM,
    "KVM_CHECK_EXTENSION": kvmi.KVM_CHECK_EXTENSION,
    "KVM_RUN": kvmi.KVM_RUN,
    "SOCK_CLOEXEC": remote._SOCK_CLOEXEC,
    "MSG_DONTWAIT": remote._MSG_DONTWAIT,
    "MSG_CMSG_CLOEXEC": remote._MSG_CMSG_CLOEXEC,
    "MSG_CTRUNC": remote._MSG_CTRUNC,
    "sizeof(struct iovec)": remote._iovec.size,
    "sizeof(struct msghdr)": remote._msghdr.size,
    "offsetof(struct msghdr, msg_iov)": 16,
    "offsetof(struct msghdr, msg_control)": 32,
    "offsetof(struct msghdr, msg_controllen)": 40,
    "offsetof(struct msghdr, msg_flags)": 48,
    "sizeof(struct cmsghdr)": remote._cmsghdr.size,
    "CMSG_LEN(sizeof(int))": remote._CMSG_LEN,
    "CMSG_SPACE(sizeof(int))": remote._CMSG_SPACE,
    "NETLINK_SOCK_DIAG": sockdiag._NETLINK_SOCK_DIAG,
    "SOCK_DIAG_BY_FAMILY": sockdiag._SOCK_DIAG_BY_FAMILY,
    "NLMSG_ERROR": sockdiag._NLMSG_ERROR,
    "NLM_F_REQUEST": sockdiag._NLM_F_REQUEST,
    "UDIAG_SHOW_PEER": sockdiag._UDIAG_SHOW_PEER,
    "UNIX_DIAG_PEER": sockdiag._UNIX_DIAG_PEER,
    "UNIX_DIAG_SHUTDOWN": sockdiag._UNIX_DIAG_SHUTDOWN,
    "sizeof(struct nlmsghdr)": sockdiag._nlmsghdr.size,
    "sizeof(struct unix_diag_req)": sockdiag._unix_diag_req.size,
    "sizeof(struct unix_diag_msg)": sockdiag._unix_diag_msg.size,
    "sizeof(struct nlattr)": sockdiag._nlattr.size,
}

NEWER: Final = frozenset(
    {
        *("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", "SECCOMP_ADDFD_FLAG_SEND"),
        *("SYS_epoll_pwait2", "SECCOMP_FILTER_FLAG_TSYNC_ESRCH"),
        *("SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP", "SECCOMP_IOCTL_NOTIF_SET_FLAGS"),
    }
)
"""Macros that headers of a distribution we support may not have yet."""


def _ours(struct: type[ctypes.Structure], path: str) -> int:
    offset, current = 0, struct
    for part in path.split("."):
        offset += getattr(current, part).offset
        kinds = {
            name: kind
            for holder in (current, *(kind for _, kind, *_ in current._fields_))
            for name, kind, *_ in getattr(holder, "_fields_", ())
        }
        current = kinds[part]
    return offset


def _fields(struct: type[ctypes.Structure]) -> list[str]:
    anonymous = getattr(struct, "_anonymous_", ())
    return [name for name, *_ in struct._fields_ if name not in (*anonymous, "pad")]


@functools.cache
def headers_say() -> Mapping[str, int]:
    """Return the value of every expression of the tables above, as the compiler sees it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (apt-get install gcc libc6-dev linux-libc-dev)")
    expressions = [*MACROS]
    for name, struct in STRUCTURES.items():
        expressions.append(f"sizeof({name})")
        fields = [*_fields(struct), *NESTED.get(name, ())]
        expressions += [f"offsetof({name}, {field})" for field in fields]
    lines = ["#define _GNU_SOURCE", *(f"#include <{header}>" for header in HEADERS)]
    lines.append("int main(void) {")
    for number, expression in enumerate(expressions):
        line = f'printf("{number} %llu\\n", (unsigned long long) ({expression}));'
        guarded = expression in NEWER
        lines += [f"#ifdef {expression}", line, "#endif"] if guarded else [line]
    lines.append("return 0; }")
    source = "\n".join(lines)
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "headers"
        subprocess.run(
            [compiler, "-x", "c", "-o", str(program), "-"],
            input=source.encode(),
            check=True,
            timeout=60,
        )
        printed = subprocess.run([str(program)], capture_output=True, check=True, timeout=10)
    return {
        expressions[int(number)]: int(value)
        for number, value in re.findall(r"(\d+) (\d+)", printed.stdout.decode())
    }


@pytest.mark.parametrize("expression", MACROS)
def test_a_number_is_the_headers(expression: str) -> None:
    said = headers_say()
    if expression in NEWER and expression not in said:
        pytest.skip(f"the headers of this machine do not have {expression} yet")

    assert MACROS[expression] & 0xFFFF_FFFF == said[expression] & 0xFFFF_FFFF


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_is_laid_out_as_the_headers_say(name: str) -> None:
    said, struct = headers_say(), STRUCTURES[name]

    assert ctypes.sizeof(struct) == said[f"sizeof({name})"]
    assert {field: getattr(struct, field).offset for field in _fields(struct)} == {
        field: said[f"offsetof({name}, {field})"] for field in _fields(struct)
    }


def test_the_parts_of_a_system_call_stop_are_where_the_header_puts_them() -> None:
    said = headers_say()
    for name, fields in NESTED.items():
        for field, offset in fields.items():
            assert said[f"offsetof({name}, {field})"] == offset
            assert _ours(STRUCTURES[name], field) == offset


def test_registers_are_in_the_order_of_the_header() -> None:
    said = headers_say()
    offsets = {
        name: said[f"offsetof(struct user_regs_struct, {name})"] for name in x86_64.REGISTERS
    }

    assert sorted(offsets, key=offsets.__getitem__) == list(x86_64.REGISTERS)
    assert list(offsets.values()) == list(range(0, 27 * 8, 8))


def test_parked_calls_are_those_an_event_loop_waits_in() -> None:
    said = headers_say()
    names = ("SYS_poll", "SYS_ppoll", "SYS_epoll_wait", "SYS_epoll_pwait", "SYS_epoll_pwait2")

    assert {said[name] for name in names if name in said} <= x86_64.PARKED_CALLS
    assert len(x86_64.PARKED_CALLS) == len(names)


def test_requests_on_notifications_carry_the_structures_they_point_to() -> None:
    sizes = {
        seccomp.SECCOMP_IOCTL_NOTIF_RECV: seccomp.seccomp_notif,
        seccomp.SECCOMP_IOCTL_NOTIF_SEND: seccomp.seccomp_notif_resp,
        seccomp.SECCOMP_IOCTL_NOTIF_ADDFD: seccomp.seccomp_notif_addfd,
    }

    for request, struct in sizes.items():
        assert request >> 16 & 0x3FFF == ctypes.sizeof(struct)


def test_the_kernel_says_the_same_about_its_notification_structures() -> None:
    try:
        sizes = linux.seccomp_notif_sizes()
    except OSError as error:
        pytest.skip(f"no seccomp notifications here ({error.strerror})")

    # A newer kernel may have grown them; buffers are made as large as it says.
    assert sizes.seccomp_notif >= ctypes.sizeof(seccomp.seccomp_notif)
    assert sizes.seccomp_notif_resp >= ctypes.sizeof(seccomp.seccomp_notif_resp)
    assert sizes.seccomp_data >= ctypes.sizeof(seccomp.seccomp_data)
