# SPDX-License-Identifier: Apache-2.0
"""Ask the agent whether it is there. Over its own socket, bounded in time."""

from __future__ import annotations

import json
import socket
import struct
import time
from pathlib import Path
from typing import Final

from kvmi_libvirt import daemons
from kvmi_libvirt.agentclient import SOCKET_NAME, VERSION
from kvmi_libvirt.doctor.facts import AgentFacts
from kvmi_libvirt.doctor.look_kernel import access_of
from kvmi_libvirt.installation import AGENT_UNIT
from kvmi_libvirt.state import STATE_DIR

AGENT_SOCKET: Final = STATE_DIR / SOCKET_NAME

_TIMEOUT_S: Final = 3.0
_MAX_ANSWER_LEN: Final = 1 << 16
_PING: Final = {"version": VERSION, "op": "ping"}
_UNITS: Final = Path("/etc/systemd/system")
_ucred: Final = struct.Struct("=iII")


def look_at_agent(
    path: Path = AGENT_SOCKET, *, units: Path | None = None, timeout_s: float = _TIMEOUT_S
) -> AgentFacts:
    """Find out whether an agent answers on *path*.

    Parameters
        units  where systemd's links to units are; None: this host's, if systemd manages its
               services. What a package enables in a container or chroot, nobody starts
    """
    if units is None and daemons.is_booted_with_systemd():
        units = _UNITS
    access = access_of(path)
    pid, problem = None, None
    if access is not None:
        try:
            pid = _ping(path, time.monotonic() + timeout_s)
        except TimeoutError:
            problem = f"nobody answers on {path} within {timeout_s:g} s: it hangs"
        except (ConnectionError, FileNotFoundError):
            problem = f"{path} is there, but nobody listens: it has ended"
        except (OSError, ValueError) as error:
            problem = f"{path}: {error}"
    wanted = units is not None and any(
        link for kind in ("wants", "requires") for link in units.glob(f"*.{kind}/{AGENT_UNIT}")
    )
    return AgentFacts(path=str(path), access=access, pid=pid, problem=problem, is_enabled=wanted)


def _ping(path: Path, deadline: float) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        sock.connect(str(path))
        peer, uid, _gid = _ucred.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size)
        )
        if uid != 0:
            raise ValueError(f"process {peer} of uid {uid} listens there, not root's agent")
        sock.sendall(json.dumps(_PING).encode() + b"\n")
        answer = b""
        while b"\n" not in answer:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = sock.recv(_MAX_ANSWER_LEN)
            if not chunk:
                raise ConnectionResetError
            answer += chunk
            if len(answer) > _MAX_ANSWER_LEN:
                raise ValueError("the answer is too long")
    told = json.loads(answer.split(b"\n", 1)[0])
    if not isinstance(told, dict) or not told.get("ok") or told.get("version") != VERSION:
        raise ValueError("it does not answer a ping as an agent of this version does")
    return int(told.get("pid", peer))
