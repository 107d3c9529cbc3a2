# SPDX-License-Identifier: Apache-2.0
"""An agent to test and measure: its own configuration, started, asked and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from host import HostError, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fleet import StandIn

URI: Final = "urn:kvmi-libvirt:introspection:1.0"
PROGRAM: Final = Path(sys.executable).with_name("kvmi-libvirt")
_START_S: Final = 30.0
_END_S: Final = 30.0


class RunningAgent:
    """An agent of its own places. Use it with ``with``; it is ready then.

    Parameters
        directory  root's own: the configuration, state, host policy and log go there
        domains    a libvirt URI or a directory of status files
        run_dir    where pidfiles are
        settings   more keys of the configuration
        seen_state_dir  where its state directory lies for us, if it is on another host
        program    what to run instead of ``kvmi-libvirt agent``
    """

    def __init__(
        self,
        directory: Path,
        *,
        domains: str,
        run_dir: Path,
        state_dir: Path | None = None,
        host_policy: Path | None = None,
        settings: dict[str, str] | None = None,
        seen_state_dir: Path | None = None,
        program: Sequence[str] = (str(PROGRAM), "agent"),
    ) -> None:
        self.directory = directory
        state_dir = state_dir or directory / "state"
        self.state_dir = seen_state_dir or state_dir
        self.host_policy = host_policy or directory / "host-policy.xml"
        self.log = directory / "agent.log"
        self.config = directory / "agent.conf"
        values = {
            "domains": domains,
            "metrics": f"unix:{directory}/metrics.sock",
            "run-dir": str(run_dir),
            "state-dir": str(state_dir),
            "host-policy": str(self.host_policy),
            **(settings or {}),
        }
        text = "".join(f"{key} = {value}\n" for key, value in values.items())
        self.config.write_text(f"[agent]\n{text}", encoding="utf-8")
        self.config.chmod(0o644)
        self._command = [*program, "--config", str(self.config)]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RunningAgent:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Return its process id."""
        assert self.process is not None
        return self.process.pid

    def start(
        self, environment: dict[str, str] | None = None, *, pass_fds: Sequence[int] = ()
    ) -> None:
        """Start it, and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                pass_fds=pass_fds,
            )
        deadline = time.monotonic() + _START_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                text = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
                self.stop()
                raise HostError(f"the agent does not answer: {text}")
            time.sleep(0.02)

    def answers(self) -> bool:
        """Say whether an agent answers where this one does."""
        try:
            return bool(self.ask("ping"))
        except (OSError, ValueError):
            return False

    def stop(self) -> None:
        """End it as a service manager does; nothing when it has ended."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=_END_S)
        self.process = None

    def kill(self) -> None:
        """End it without a word."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=_END_S)
        self.process = None

    def reload(self) -> None:
        """Let it read the host's policy again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def ask(self, operation: str, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """Return its answer to a question. Raises OSError, ValueError without one."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(self.state_dir / "agent.sock"))
            sock.sendall(json.dumps({"version": 1, "op": operation}).encode() + b"\n")
            chunks = []
            while chunk := sock.recv(1 << 16):
                chunks.append(chunk)
        answer: dict[str, Any] = json.loads(b"".join(chunks))
        return answer

    def ping(self) -> dict[str, Any]:
        """Return how it is."""
        return self.ask("ping")

    def status(self) -> dict[str, dict[str, Any]]:
        """Return what it says about each VM, by name."""
        return {vm["domain"]: vm for vm in self.ask("status")["vms"]}

    def wait(self, condition: Callable[[], bool], *, what: str, timeout_s: float = 60.0) -> None:
        """Wait until *condition*; with the log's end in the error when it does not come."""
        try:
            wait_for(condition, what=what, timeout_s=timeout_s)
        except HostError as error:
            text = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise HostError(f"{error}\n{text}") from None

    def metrics(self) -> str:
        """Return its metrics, in Prometheus' text format."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(10.0)
            sock.connect(str(self.directory / "metrics.sock"))
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n")
            chunks = []
            while chunk := sock.recv(1 << 16):
                chunks.append(chunk)
        head, _, body = b"".join(chunks).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise HostError(f"no metrics: {head!r}")
        return body.decode()

    def processes(self) -> list[int]:
        """Return the ids of its processes, those of its workers too."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    stat = (entry / "stat").read_bytes()
                except OSError:
                    continue
                parent = int(stat.rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
        found = [self.pid]
        for pid in found:
            found += children.get(pid, [])
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Introspection as an operator writes it down, for a VM or for the whole host.

    Parameters
        tool         where the tool listens
        reconnect_s  None: it is not called again
    """

    tool: Path
    commands: Sequence[str] = ("KVMI_VM_GET_INFO",)
    events: Sequence[str] = ()
    mode: str = "optional"
    reconnect_s: int | None = 10
    handshake_s: int = 3
    unhook_s: int = 60

    def element(self) -> str:
        """Return it as the element of a domain's metadata."""
        return f"<introspection xmlns='{URI}' mode='{self.mode}'>{self._body()}</introspection>"

    def assignment(self, name: str = "*") -> str:
        """Return it as the host policy's assignment to all domains of such a name."""
        return f"<assign mode='{self.mode}'><match name='{name}'/>{self._body()}</assign>"

    def _body(self) -> str:
        reconnect = "<reconnect enabled='no'/>"
        if self.reconnect_s is not None:
            reconnect = f"<reconnect enabled='yes' timeout='{self.reconnect_s}'/>"
        return (
            f"<source type='unix' path='{self.tool}'>{reconnect}</source>"
            f"<handshake timeout='{self.handshake_s}'/><unhook timeout='{self.unhook_s}'/>"
            f"<commands>{_allowed(self.commands)}</commands>"
            f"<events>{_allowed(self.events)}</events>"
        )


def write_policy(
    directory: Path,
    *assignments: str,
    ceiling: Sequence[str] | None = None,
    excess: str = "refuse",
    sockets: Sequence[Path] | None = None,
) -> None:
    """Write the host's policy, at once.

    Parameters
        directory  of the policy; tools may listen in it, or where *sockets* says
        ceiling    names of commands, None for no ceiling
    """
    places = (directory / "*",) if sockets is None else sockets
    top = ""
    if ceiling is not None:
        top = f"<ceiling excess='{excess}'><commands>{_allowed(ceiling)}</commands></ceiling>"
    text = "".join(f"<unix path='{place}'/>" for place in places)
    _replace(
        directory / "host-policy.xml",
        f"<host-policy xmlns='{URI}'><sockets>{text}</sockets>{top}{''.join(assignments)}"
        "</host-policy>",
    )


def _allowed(names: Sequence[str]) -> str:
    return "".join(f"<allow name='{name}'/>" for name in names)


def domain_xml(vm: StandIn, metadata: str = "") -> str:
    """Return what libvirt would say of a running VM."""
    return (
        f"<domain type='kvm' id='1'><name>{vm.name}</name><uuid>{vm.uuid}</uuid>"
        f"<metadata>{metadata}</metadata><memory unit='KiB'>4</memory><vcpu>{vm.vcpus}</vcpu>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
    )


def write_status(run_dir: Path, vm: StandIn, metadata: str = "") -> None:
    """Write down what libvirt would about a running VM, at once."""
    _replace(
        run_dir / f"{vm.name}.xml",
        f"<domstatus state='running' reason='booted' pid='{vm.pid}'>"
        f"{domain_xml(vm, metadata)}</domstatus>",
    )


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.rename(path)
