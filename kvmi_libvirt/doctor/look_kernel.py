# SPDX-License-Identifier: Apache-2.0
"""Look at the kernel, and at /dev/kvm and who may open it."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import stat
from pathlib import Path
from typing import Final

from kvmi_libvirt import bounded, linux
from kvmi_libvirt.doctor.facts import Access, KernelFacts, KvmFacts
from kvmi_libvirt.kernel import KVM, probe_kernel
from kvmi_libvirt.newtypes import LocalFd, RemoteFd
from kvmi_libvirt.sockdiag import unix_stream_is_connected

_PROBE_TIMEOUT_S: Final = 10.0
_MAX_LEN: Final = 1 << 20
_PARAMETER: Final = Path("/sys/module/kvm/parameters/introspection")
_QEMU_CONF: Final = Path("/etc/libvirt/qemu.conf")
_QEMU_USERS: Final = ("libvirt-qemu", "qemu")
_ACL: Final = "system.posix_acl_access"


def read_text(path: Path | str) -> str | None:
    """Return the start of a small file, None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_LEN).decode("utf-8", "replace")
    except OSError:
        return None


def access_of(path: Path | str) -> Access | None:
    """Return owner and mode of what *path* itself is, None where it is not there."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return Access(
        path=str(path),
        uid=found.st_uid,
        owner=user_name(found.st_uid),
        gid=found.st_gid,
        group=_group_name(found.st_gid),
        mode=stat.S_IMODE(found.st_mode),
    )


def user_name(uid: int) -> str:
    """Return the name of *uid*, or the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


# -- the kernel --------------------------------------------------------------------------


def look_at_kernel() -> KernelFacts:
    """Probe the kernel with an empty VM in a process of its own."""
    parameter = read_text(_PARAMETER)
    outcome, abi, why, problem = None, None, "", None
    try:
        found = bounded.call(probe_kernel, timeout_s=_PROBE_TIMEOUT_S)
        outcome, why = found.outcome, found.why
        abi = None if found.abi is None else found.abi.name
    except OSError as error:
        where = f"{error.filename}: " if error.filename else "no VM can be made to ask: "
        problem = f"{where}{error.strerror}"
    except bounded.Unanswered as error:
        problem = f"no VM can be made to ask: {error}"
    return KernelFacts(
        outcome=outcome,
        abi=abi,
        why=why,
        problem=problem,
        parameter=None if parameter is None else parameter.strip(),
        has_pidfd_getfd=_has_pidfd_getfd(),
        has_sock_diag=_has_sock_diag(),
    )


def _has_pidfd_getfd() -> bool:
    try:
        pidfd = LocalFd(os.pidfd_open(os.getpid()))
    except OSError as error:
        return error.errno != errno.ENOSYS
    try:
        os.close(linux.pidfd_getfd(pidfd, RemoteFd(pidfd)))
    except OSError as error:
        return error.errno != errno.ENOSYS
    finally:
        os.close(pidfd)
    return True


def _has_sock_diag() -> bool:
    try:
        unix_stream_is_connected(0xFFFF_FFFF)
    except OSError:
        return False
    return True


# -- /dev/kvm ------------------------------------------------------------------------------


def qemu_account() -> tuple[str, set[int]] | None:
    """Return as whom libvirt runs QEMU: the user's name, and its groups."""
    conf = read_text(_QEMU_CONF) or ""
    for name in (_setting(conf, "user"), *_QEMU_USERS):
        if name is None:
            continue
        try:
            user = _user(name)
            gid = _gid(_setting(conf, "group")) if _setting(conf, "group") else user.pw_gid
        except (KeyError, ValueError):
            continue
        # libvirt also gives it the user's supplementary groups.
        return user.pw_name, {gid, *os.getgrouplist(user.pw_name, gid)}
    return None


def _setting(conf: str, name: str) -> str | None:
    found = re.findall(rf'^\s*{name}\s*=\s*"([^"]*)"', conf, re.MULTILINE)
    return str(found[-1]) if found else None


def _user(name: str) -> pwd.struct_passwd:
    return pwd.getpwuid(int(name.removeprefix("+"))) if _is_number(name) else pwd.getpwnam(name)


def _gid(name: str | None) -> int:
    if name is None:
        raise ValueError("no group")
    return int(name.removeprefix("+")) if _is_number(name) else grp.getgrnam(name).gr_gid


def _is_number(name: str) -> bool:
    return name.removeprefix("+").isdecimal()


def look_at_kvm(path: str = KVM) -> KvmFacts:
    """Find out whether libvirt's QEMU may open the device."""
    access = access_of(path)
    account = qemu_account()
    if access is None or account is None:
        return KvmFacts(access=access)
    name, groups = account
    uid = pwd.getpwnam(name).pw_uid
    return KvmFacts(access=access, user=name, may_open=_may_open(access, uid, groups))


def _may_open(access: Access, uid: int, groups: set[int]) -> bool | None:
    if uid == 0:
        return True
    try:
        if _ACL in os.listxattr(access.path):  # udev's "uaccess"; not read here
            return None
    except OSError:
        pass
    if access.uid == uid:
        bits = access.mode >> 6
    elif access.gid in groups:
        bits = access.mode >> 3
    else:
        bits = access.mode
    return bits & 0o6 == 0o6
