# SPDX-License-Identifier: Apache-2.0
"""The agent's configuration: one INI file, read once.

Every key has a default; an unknown one is refused, so that a misspelt one is noticed.
"""

from __future__ import annotations

import configparser
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvmi_libvirt.agentclient import SOCKET_NAME
from kvmi_libvirt.errors import PolicyValueError, UsageError
from kvmi_libvirt.libvirtio import is_local
from kvmi_libvirt.policy.host import HOST_POLICY_PATH
from kvmi_libvirt.policy.trusted import read_trusted
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR
from kvmi_libvirt.state import STATE_DIR

CONFIG_PATH: Final = Path("/etc/kvmi-libvirt/agent.conf")
SECTION: Final = "agent"
DEFAULT_URI: Final = "qemu:///system"
PROXMOX: Final = "proxmox"
"""Instead of a libvirt: the machines of this Proxmox VE node."""
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
_MAX_LEN: Final = 64 << 10
_DEFAULT_SWEEP_S: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the agent runs.

    Parameters
        domains      a libvirt URI; or a directory in which libvirt keeps status files, for
                     where the files can be seen and the daemon cannot be reached; or
                     PROXMOX
        metrics      "off", "unix:PATH" or "HOST:PORT" with a loopback address
        log_level    a level of logging
        run_dir      where the pidfiles of running VMs are
        state_dir    what /run/kvmi-libvirt normally is; the socket is in it
        host_policy  the host's policy
        sweep_s      seconds between looks at channels that cannot be waited for
        standin      serve stand-in VM processes too, for machines without KVM
    """

    domains: str = DEFAULT_URI
    metrics: str = "unix:/run/kvmi-libvirt/metrics.sock"
    log_level: int = logging.INFO
    run_dir: Path = LIBVIRT_QEMU_RUN_DIR
    state_dir: Path = STATE_DIR
    host_policy: Path = HOST_POLICY_PATH
    sweep_s: int = _DEFAULT_SWEEP_S
    standin: bool = False

    @property
    def socket_path(self) -> Path:
        """Return where the hook finds the agent."""
        return self.state_dir / SOCKET_NAME


def load_settings(path: Path | None = None) -> Settings:
    """Return the settings in *path*; the defaults when it is not given and not there.

    Raises
        PolicyError  the file is not root's, or writable by others
        UsageError   it says something that has no meaning; with the place
    """
    data = read_trusted(path or CONFIG_PATH, limit=_MAX_LEN)
    if data is None:
        if path is not None:
            raise UsageError(f"{path}: no such file")
        return Settings()
    return parse_settings(data, source=str(path or CONFIG_PATH))


def parse_settings(data: bytes, *, source: str) -> Settings:
    """Return the settings in *data*. Raises UsageError with the place of what is wrong."""
    parser = configparser.ConfigParser(interpolation=None, strict=True, delimiters=("=",))
    try:
        parser.read_string(data.decode("utf-8"), source=source)
    except (configparser.Error, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise UsageError(f"{source}: {line}") from None
    unknown = [name for name in parser.sections() if name != SECTION]
    if unknown or parser.defaults():
        raise UsageError(f"{source}: unknown section [{(unknown or ['DEFAULT'])[0]}]")
    values = dict(parser[SECTION]) if parser.has_section(SECTION) else {}
    try:
        return _settings(values)
    except (ValueError, PolicyValueError) as error:
        raise UsageError(f"{source}: {error}") from None


def _settings(values: dict[str, str]) -> Settings:
    known = {"domains", "metrics", "log-level", "run-dir", "state-dir", "host-policy"}
    known |= {"sweep-seconds", "standin"}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key '{key}'; known are {', '.join(sorted(known))}")
    level = values.get("log-level", "info")
    if level not in LOG_LEVELS:
        raise ValueError(f"log-level = {level}: write one of {', '.join(LOG_LEVELS)}")
    default = Settings()
    if any("\0" in value or "\n" in value for value in values.values()):
        raise ValueError("a value has a character that cannot be meant")
    return Settings(
        domains=_domains(values.get("domains", default.domains)),
        metrics=_metrics(values.get("metrics", default.metrics)),
        log_level=logging.getLevelName(level.upper()),
        run_dir=_path(values, "run-dir", default.run_dir),
        state_dir=_path(values, "state-dir", default.state_dir),
        host_policy=_path(values, "host-policy", default.host_policy),
        sweep_s=_seconds(values.get("sweep-seconds", str(default.sweep_s))),
        standin=_yes(values.get("standin", "no")),
    )


def _domains(text: str) -> str:
    if not (text == PROXMOX or text.startswith("/") or is_local(text)):
        raise ValueError(
            f"domains = {text}: write the URI of a libvirt on this host, such as "
            f"{DEFAULT_URI}, the absolute path of a directory, or {PROXMOX}"
        )
    return text


def _path(values: dict[str, str], key: str, default: Path) -> Path:
    path = Path(values.get(key, str(default)))
    if not path.is_absolute():
        raise ValueError(f"{key} = {path}: write an absolute path")
    return path


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 3600):
        raise ValueError(f"sweep-seconds = {text}: write 1 to 3600")
    return int(text)


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"standin = {text}: write yes or no")
    return text == "yes"


def _metrics(text: str) -> str:
    if text == "off" or (text.startswith("unix:/") and text != "unix:/"):
        return text
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if host in ("127.0.0.1", "[::1]") and is_port:
        return text
    raise ValueError(
        f"metrics = {text}: write off, unix:/PATH, 127.0.0.1:PORT or [::1]:PORT; "
        "other addresses would show the host's VMs to the network"
    )
