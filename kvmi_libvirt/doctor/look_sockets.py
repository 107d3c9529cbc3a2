# SPDX-License-Identifier: Apache-2.0
"""Look at the sockets of tools, and at who listens on them. No tool is called.

A tool that is called expects a VM: so the kernel is asked who listens. Only where it
cannot tell, since the socket is of another network namespace, a connection is tried.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import sockdiag
from kvmi_libvirt.doctor.facts import Listener, SocketFacts, SocketsFacts, ToolFacts
from kvmi_libvirt.doctor.look_kernel import access_of, qemu_account, read_text, user_name
from kvmi_libvirt.policy.limits import SOCKET_DIRECTORY
from kvmi_libvirt.policy.model import TcpSource, UnixSource, VsockSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmi_libvirt.policy.model import Source
    from kvmi_libvirt.sockdiag import UnixListener

_MAX_SOCKETS: Final = 500
_CONNECT_TIMEOUT_S: Final = 1.0
_HERE_CIDS: Final = (1, 2)  # VMADDR_CID_LOCAL, VMADDR_CID_HOST


class Sockets:
    """What listens on this host at this moment: read when it is first needed."""

    @functools.cached_property
    def listeners(self) -> list[UnixListener] | None:
        """Return who listens on unix sockets, None where the kernel does not tell."""
        try:
            return sockdiag.unix_listeners()
        except OSError:
            return None

    @functools.cached_property
    def holders(self) -> Mapping[int, set[int]]:
        """Return which processes hold which of the listening sockets."""
        wanted = {f"socket:[{found.inode}]": found.inode for found in self.listeners or []}
        held: dict[int, set[int]] = {}
        for pid, link in _all_fd_links():
            if link in wanted:
                held.setdefault(wanted[link], set()).add(pid)
        return held

    def look_at_directory(self, directory: Path = Path(SOCKET_DIRECTORY)) -> SocketsFacts:
        """Find out who may put sockets into *directory*, and all about those in it."""
        account = qemu_account()
        qemu_uid = None if account is None else _uid_of(account[0])
        access = access_of(directory)
        if access is None:
            return SocketsFacts(qemu_uid=qemu_uid)
        found: list[SocketFacts] = []
        problem = None
        try:
            for path in _sockets_below(directory):
                facts = self.look_at_socket(path)
                if facts is not None:
                    found.append(facts)
                if len(found) == _MAX_SOCKETS:
                    break
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
        return SocketsFacts(
            directory=access,
            sockets=tuple(found),
            problem=problem,
            qemu_uid=qemu_uid,
            is_whole=len(found) < _MAX_SOCKETS,
        )

    def look_at_socket(self, path: Path) -> SocketFacts | None:
        """Return all about one socket, None where there is none."""
        access = access_of(path)
        if access is None or not _is_socket(path):
            return None
        directories = (access_of(parent) for parent in reversed(path.parents))
        return SocketFacts(
            access=access,
            directories=tuple(found for found in directories if found is not None),
            listener=self._listener(path),
        )

    def _listener(self, path: Path) -> Listener | None:
        inode = path.lstat().st_ino & 0xFFFF_FFFF
        for found in self.listeners or []:
            if found.file_inode == inode and os.path.basename(found.path) == os.fsencode(path.name):
                pids = sorted(self.holders.get(found.inode, ()))
                uids = {uid for pid in pids if (uid := _uid_of_process(pid)) is not None}
                if found.uid is not None:
                    uids.add(found.uid)
                return Listener(uids=frozenset(uids), who=_describe(pids))
        return _stranger(path)

    def look_at_tool(self, source: Source) -> ToolFacts:
        """Find out whether the tool that a policy names listens."""
        where = source.describe()
        if isinstance(source, UnixSource):
            return self._unix_tool(Path(source.path), where)
        try:
            if isinstance(source, VsockSource):
                listens = _vsock_listens(source)
            else:
                listens = _tcp_listens(source)
        except OSError as error:
            return ToolFacts(where=where, listens=None, problem=f"the kernel cannot tell ({error})")
        if listens is None:
            return ToolFacts(where=where, listens=None, problem="it is on another machine")
        return ToolFacts(
            where=where, listens=listens, problem=None if listens else f"no tool listens on {where}"
        )

    def _unix_tool(self, path: Path, where: str) -> ToolFacts:
        facts = self.look_at_socket(path)
        if facts is None:
            what = "it is no socket" if os.path.lexists(path) else "there is no such socket"
            return ToolFacts(
                where=where, listens=False, problem=f"no tool listens on {path}: {what}"
            )
        if facts.listener is None:
            problem = f"no tool listens on {path}: the socket was left by one that has ended"
            return ToolFacts(where=where, listens=False, problem=problem, socket=facts)
        return ToolFacts(where=where, listens=True, socket=facts)


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


def _sockets_below(directory: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error

    for parent, _directories, files in os.walk(directory, onerror=stop):
        for name in sorted(files):
            path = Path(parent, name)
            if _is_socket(path):
                yield path


def _stranger(path: Path) -> Listener | None:
    # Nobody of this network namespace; the tool may live in a container with its own.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_CONNECT_TIMEOUT_S)
        try:
            sock.connect(str(path))
        except OSError as error:
            if error.errno != errno.EAGAIN and not isinstance(error, TimeoutError):
                return None
    return Listener(uids=frozenset(), who="a process of another network namespace")


def _describe(pids: list[int]) -> str:
    if not pids:
        return "a process that cannot be seen"
    pid = pids[0]
    name = (read_text(f"/proc/{pid}/comm") or "?").strip()
    uid = _uid_of_process(pid)
    return f"{name}, process {pid}" + ("" if uid is None else f" of {user_name(uid)}")


def _uid_of_process(pid: int) -> int | None:
    for line in (read_text(f"/proc/{pid}/status") or "").splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[2])  # the effective one
    return None


def _uid_of(name: str) -> int | None:
    import pwd

    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _all_fd_links() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended, or is not ours to see
            for fd in os.scandir(f"/proc/{name}/fd"):
                with contextlib.suppress(OSError):
                    yield int(name), os.readlink(fd.path)


# -- elsewhere -----------------------------------------------------------------------------


def _vsock_listens(source: VsockSource) -> bool | None:
    if source.cid not in _HERE_CIDS:
        return None
    return sockdiag.vsock_listener_exists(source.port)


def _tcp_listens(source: TcpSource) -> bool | None:
    address = _own_address(source.host)
    return None if address is None else sockdiag.tcp_listener_exists(address, source.port)


def _own_address(host: str) -> bytes | None:
    # Only an address of this host can be bound to. A name is not looked up.
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            address = socket.inet_pton(family, host)
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((host, 0))
        except OSError:
            continue
        return address
    return None
