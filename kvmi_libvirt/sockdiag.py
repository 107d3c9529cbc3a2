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
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLMSG_ERROR: Final = 2
_NLM_F_REQUEST: Final = 1

_NLM_F_DUMP: Final = 0x300
_NLMSG_DONE: Final = 3
_TIMEOUT_S: Final = 1.0

_UDIAG_SHOW_PEER: Final = 0x4
_UNIX_DIAG_PEER: Final = 2
_UNIX_DIAG_SHUTDOWN: Final = 6
_TCP_ESTABLISHED: Final = 1

_nlmsghdr: Final = struct.Struct("=IHHII")
_unix_diag_req: Final = struct.Struct("=BBHIIIII")
_unix_diag_msg: Final = struct.Struct("=BBBBIII")
_nlattr: Final = struct.Struct("=HH")
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
        if kind == socket.SOCK_STREAM and _is_open(state, body, _unix_diag_msg.size, len(body)):
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
    return _is_open(state, answer, offset + _unix_diag_msg.size, length)


def _is_open(state: int, message: bytes, offset: int, length: int) -> bool:
    peer = shutdown = 0
    while offset + _nlattr.size <= length:
        attribute_len, attribute = _nlattr.unpack_from(message, offset)
        if attribute_len < _nlattr.size:
            break
        if attribute == _UNIX_DIAG_PEER:
            (peer,) = struct.unpack_from("=I", message, offset + _nlattr.size)
        elif attribute == _UNIX_DIAG_SHUTDOWN:
            shutdown = message[offset + _nlattr.size]
        offset += (attribute_len + 3) & ~3
    return state == _TCP_ESTABLISHED and peer != 0 and shutdown == 0
