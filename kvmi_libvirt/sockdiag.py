# SPDX-License-Identifier: Apache-2.0
"""Ask the kernel whether a socket that only KVM still holds is connected.

After HOOK the kernel keeps the tool's socket and every user space copy may be
closed; no ioctl tells whether the channel is still alive. The socket diagnosis
interface does, by inode number, without holding the socket. No package imports.

Source: sock_diag(7), <linux/unix_diag.h>, <linux/inet_diag.h>, <linux/vm_sockets_diag.h>.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLMSG_ERROR: Final = 2
_NLM_F_REQUEST: Final = 1

_NLM_F_DUMP: Final = 0x300
_NLMSG_DONE: Final = 3
_TIMEOUT_S: Final = 1.0

_UDIAG_SHOW_NAME: Final = 0x1
_UDIAG_SHOW_VFS: Final = 0x2
_UDIAG_SHOW_PEER: Final = 0x4
_UDIAG_SHOW_UID: Final = 0x40
_UNIX_DIAG_NAME: Final = 0
_UNIX_DIAG_VFS: Final = 1
_UNIX_DIAG_PEER: Final = 2
_UNIX_DIAG_SHUTDOWN: Final = 6
_UNIX_DIAG_UID: Final = 7
_TCP_ESTABLISHED: Final = 1
_TCP_LISTEN: Final = 10

_nlmsghdr: Final = struct.Struct("=IHHII")
_unix_diag_req: Final = struct.Struct("=BBHIIIII")
_unix_diag_msg: Final = struct.Struct("=BBBBIII")
_nlattr: Final = struct.Struct("=HH")
_unix_diag_vfs: Final = struct.Struct("=II")  # low 32 bits of the file's inode number, device
_vsock_diag_req: Final = struct.Struct("=BBHIIIII")
# u8 family, type, state, shutdown; u32 src_cid, src_port, dst_cid, dst_port, ino, cookie[2]
_vsock_diag_msg: Final = struct.Struct("=BBBB7I")
_SOCKID_LEN: Final = 48
# u8 family, protocol, ext, pad; u32 states; struct inet_diag_sockid
_inet_diag_req: Final = struct.Struct(f"=BBBBI{_SOCKID_LEN}x")
# u8 family, state, timer, retrans; struct inet_diag_sockid; u32 expires, rqueue, wqueue, uid, inode
_inet_diag_msg: Final = struct.Struct(f"=BBBB{_SOCKID_LEN}xIIIII")


def unix_stream_is_connected(inode: int) -> bool:
    """Say whether the unix stream socket with *inode* exists and both directions are open.

    False once the peer closed, either side shut it down, or the socket is gone.
    Looks in this process's network namespace only.

    Raises
        OSError  the kernel has no unix socket diagnosis (ENOENT from the bind of
                 the protocol, EPROTONOSUPPORT): nothing can be said.
    """
    request = _unix_diag_req.pack(
        socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, _UDIAG_SHOW_PEER, 0xFFFFFFFF, 0xFFFFFFFF
    )
    header = _nlmsghdr.pack(
        _nlmsghdr.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0
    )
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    ) as netlink:
        netlink.settimeout(_TIMEOUT_S)
        netlink.send(header + request)
        answer = netlink.recv(8192)
    return _is_connected(answer)


def open_unix_streams() -> set[int]:
    """Return the inodes of all unix stream sockets whose both directions are open.

    One dump for however many are asked about. Looks in this process's network
    namespace only. Raises OSError when nothing can be said.
    """
    states = 1 << _TCP_ESTABLISHED
    request = _unix_diag_req.pack(
        socket.AF_UNIX, 0, 0, states, 0, _UDIAG_SHOW_PEER, 0xFFFFFFFF, 0xFFFFFFFF
    )
    found = set()
    for body in _dump(request):
        _family, kind, state, _pad, inode, _cookie0, _cookie1 = _unix_diag_msg.unpack_from(body)
        if kind == socket.SOCK_STREAM and _is_open(state, body, _unix_diag_msg.size):
            found.add(inode)
    return found


def vsock_stream_is_connected(inode: int) -> bool:
    """Say whether the vsock stream with *inode* exists and both directions are open.

    Raises
        OSError  the kernel has no vsock diagnosis (module vsock_diag): nothing can be said.
    """
    request = _vsock_diag_req.pack(socket.AF_VSOCK, 0, 0, 0xFFFFFFFF, 0, 0, 0, 0)
    for body in _dump(request):
        fields: tuple[int, ...] = _vsock_diag_msg.unpack_from(body)
        state, shutdown, found = fields[2], fields[3], fields[8]
        if found == inode:
            return state == _TCP_ESTABLISHED and shutdown == 0
    return False


def tcp_stream_is_connected(inode: int) -> bool:
    """Say whether the TCP socket with *inode* exists and neither side has closed it.

    A peer that vanished without a word is seen when keepalive has given it up.

    Raises
        OSError  the kernel has no TCP diagnosis (module tcp_diag): nothing can be said.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _inet_diag_req.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
        for body in _dump(request):
            fields: tuple[int, ...] = _inet_diag_msg.unpack_from(body)
            state, found = fields[1], fields[-1]
            if found == inode:
                return state == _TCP_ESTABLISHED
    return False


class UnixListener(NamedTuple):
    """A listening unix socket with a name in the file system.

    Parameters
        path        as it was bound, perhaps relative, perhaps moved since
        file_inode  of that file, its low 32 bits
        inode       of the socket itself, as /proc/PID/fd shows it
        uid         of its maker; None where the kernel does not tell
    """

    path: bytes
    file_inode: int
    inode: int
    uid: int | None


def unix_listeners() -> list[UnixListener]:
    """Return the unix stream sockets of this network namespace that somebody listens on.

    Raises
        OSError  the kernel has no unix socket diagnosis: nothing can be said.
    """
    show = _UDIAG_SHOW_NAME | _UDIAG_SHOW_VFS | _UDIAG_SHOW_UID
    request = _unix_diag_req.pack(
        socket.AF_UNIX, 0, 0, 1 << _TCP_LISTEN, 0, show, 0xFFFFFFFF, 0xFFFFFFFF
    )
    found = []
    for body in _dump(request):
        _family, kind, state, _pad, inode, _cookie0, _cookie1 = _unix_diag_msg.unpack_from(body)
        attributes = dict(_attributes(body, _unix_diag_msg.size))
        if state != _TCP_LISTEN or kind != socket.SOCK_STREAM or _UNIX_DIAG_VFS not in attributes:
            continue
        file_inode, _device = _unix_diag_vfs.unpack_from(attributes[_UNIX_DIAG_VFS])
        path = attributes.get(_UNIX_DIAG_NAME, b"").rstrip(b"\0")
        uid = attributes.get(_UNIX_DIAG_UID)
        found.append(
            UnixListener(path, file_inode, inode, struct.unpack("=I", uid)[0] if uid else None)
        )
    return found


def tcp_listener_exists(address: bytes, port: int) -> bool:
    """Say whether a TCP socket listens on *port* of this host's *address*, 4 or 16 bytes.

    Raises
        OSError  the kernel has no TCP diagnosis (module tcp_diag): nothing can be said.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _inet_diag_req.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << _TCP_LISTEN)
        for body in _dump(request):
            # struct inet_diag_sockid, in network byte order: sport, dport, src[4], ...
            (found_port,) = struct.unpack_from("!H", body, 4)
            size = 4 if family == socket.AF_INET else 16
            bound_to = body[8 : 8 + size]
            is_any = not any(bound_to)
            if found_port == port and (bound_to == address or (is_any and size >= len(address))):
                return True
    return False


def vsock_listener_exists(port: int) -> bool:
    """Say whether a vsock stream socket of this host listens on *port*.

    Raises
        OSError  the kernel has no vsock diagnosis (module vsock_diag): nothing can be said.
    """
    request = _vsock_diag_req.pack(socket.AF_VSOCK, 0, 0, 1 << _TCP_LISTEN, 0, 0, 0, 0)
    for body in _dump(request):
        fields: tuple[int, ...] = _vsock_diag_msg.unpack_from(body)
        if fields[2] == _TCP_LISTEN and fields[5] == port:
            return True
    return False


def _attributes(body: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    while offset + _nlattr.size <= len(body):
        length, kind = _nlattr.unpack_from(body, offset)
        if length < _nlattr.size:
            return
        yield kind, body[offset + _nlattr.size : offset + length]
        offset += (length + 3) & ~3


def _dump(request: bytes) -> Iterator[bytes]:
    # Yields the body of each message of one dump. All of it is read, since a socket
    # whose inode is asked for may come last; more than a deadline's worth is an error.
    header = _nlmsghdr.pack(
        _nlmsghdr.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0
    )
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    ) as netlink:
        netlink.settimeout(_TIMEOUT_S)
        netlink.send(header + request)
        while True:
            answer = netlink.recv(1 << 16)
            offset = 0
            while offset + _nlmsghdr.size <= len(answer):
                length, kind, _flags, _seq, _pid = _nlmsghdr.unpack_from(answer, offset)
                body = answer[offset + _nlmsghdr.size : offset + length]
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", body)
                    raise OSError(-code, f"sock_diag: {os.strerror(-code)}")
                yield body
                offset += max((length + 3) & ~3, _nlmsghdr.size)


def _is_connected(answer: bytes) -> bool:
    length, kind, _flags, _seq, _pid = _nlmsghdr.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", answer, _nlmsghdr.size)
        if -code == errno.ENOENT:
            return False
        raise OSError(-code, f"sock_diag: {os.strerror(-code)}")
    offset = _nlmsghdr.size
    state = _unix_diag_msg.unpack_from(answer, offset)[2]
    return _is_open(state, answer[:length], offset + _unix_diag_msg.size)


def _is_open(state: int, message: bytes, offset: int) -> bool:
    attributes = dict(_attributes(message, offset))
    peer = attributes.get(_UNIX_DIAG_PEER, b"")
    shutdown = attributes.get(_UNIX_DIAG_SHUTDOWN, b"")
    return state == _TCP_ESTABLISHED and any(peer) and not any(shutdown)
