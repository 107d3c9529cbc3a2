# SPDX-License-Identifier: Apache-2.0
"""What a Proxmox VE node's files say of one VM: its policy and its configuration.

May import ``policy``.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import PolicyError, StateError
from kvmi_libvirt.policy.document import MAX_BYTES, parse
from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.facts import Identity
from kvmi_libvirt.policy.host import HOST_POLICY_PATH, HostPolicy, load_host_policy
from kvmi_libvirt.policy.model import Mode
from kvmi_libvirt.policy.resolve import decide_for, permit
from kvmi_libvirt.policy.trusted import ROOT, read_trusted

if TYPE_CHECKING:
    from kvmi_libvirt.policy.model import Policy

logger = logging.getLogger(__name__)

CLUSTER_DIR: Final = Path("/etc/pve/kvmi")
"""On pmxcfs: root's and group www-data's alone, mode 0640 whatever chmod says."""

_MAX_CONFIG_LEN: Final = 1 << 20
_SMBIOS_UUID: Final = re.compile(
    r"(?i)(?:^|,)uuid=([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:,|$)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where everything lies on a node; tests have another.

    Parameters
        host_policy  this node's, and if there is none, the cluster's
        elements     directories with VMID.xml; the first that has one counts
        run          pidfiles and monitors
        configs      of the VMs on this node
        nodes        of all nodes, in which theirs are
        owner        whose the files of policy must be
        kvm          the QEMU that machines run in
    """

    host_policy: tuple[Path, ...] = (HOST_POLICY_PATH, CLUSTER_DIR / "host-policy.xml")
    elements: tuple[Path, ...] = (Path("/etc/kvmi-libvirt/proxmox"), CLUSTER_DIR)
    run: Path = Path("/var/run/qemu-server")
    configs: Path = Path("/etc/pve/qemu-server")
    nodes: Path = Path("/etc/pve/nodes")
    owner: int = ROOT
    kvm: Path = Path("/usr/bin/kvm")


class Files:
    """The files about one VM.

    Parameters
        vmid    the VM's number
        places  of this node
    """

    def __init__(self, vmid: int, places: Places) -> None:
        """Nothing is read yet."""
        self.vmid = vmid
        self._places = places

    def host(self) -> HostPolicy:
        """Return the policy of this node, which may be the cluster's. Raises PolicyError."""
        own, cluster = self._places.host_policy
        # A link that leads nowhere is there as well: it will be refused, not passed over.
        path = own if os.path.lexists(own) else cluster
        return load_host_policy(path, owner=self._places.owner)

    def policy(self, host: HostPolicy | None = None) -> Policy | None:
        """Return the policy the VM has on this node, or None for no introspection.

        An assignment of the host's policy comes before the VM's own element.

        Parameters
            host  if it was loaded before
        Raises
            PolicyError  there is one that is wrong, or not to be trusted
        """
        host = host or self.host()
        # By its number alone: a VM's name, description, tags and SMBIOS UUID can be
        # changed by those who were given rights on it.
        assigned = decide_for(Identity(name=str(self.vmid), vmid=self.vmid), host)
        if assigned is not None:
            return assigned
        path, data = self._element()
        policy = None if data is None else parse_document(data, source=path)
        return None if policy is None else permit(policy, host, source=path)

    def _element(self) -> tuple[str, bytes | None]:
        for directory in self._places.elements:
            path = directory / f"{self.vmid}.xml"
            data = read_trusted(path, limit=MAX_BYTES, owner=self._places.owner)
            if data is not None:
                return str(path), data
        return "", None

    def demand(self) -> Mode | None:
        """Return the mode of a policy that is wrong, as its element says all the same.

        None when that cannot be told either.
        """
        try:
            path, data = self._element()
            root = None if data is None else parse(data, source=path)
        except PolicyError:
            return None
        if root is None:
            return None
        is_optional = root.get("mode") in (None, Mode.OPTIONAL.value)
        return Mode.OPTIONAL if is_optional else Mode.REQUIRED

    def smbios_uuid(self) -> str | None:
        """Return the SMBIOS UUID in the VM's configuration, None when there is none."""
        match = _SMBIOS_UUID.search(self.config().get("smbios1", ""))
        return None if match is None else match[1].lower()

    def require_config(self) -> None:
        """Raise StateError if the VM has no configuration: its policy may be away as well.

        So it is while pmxcfs is not mounted; a VM that runs has one on some node.
        """
        path = self._config_path()
        if not path.exists():
            raise StateError(
                f"VM {self.vmid}: there is no {path}, so nothing is decided about it: "
                "does pve-cluster run?"
            )

    def _config_path(self) -> Path:
        # A VM that arrives is the other node's until all of it has come.
        name = f"{self.vmid}.conf"
        own = self._places.configs / name
        others = () if own.exists() else self._places.nodes.glob(f"*/qemu-server/{name}")
        return next(iter(others), own)

    def config(self) -> dict[str, str]:
        """Return the VM's configuration; nothing where it cannot be read."""
        path = self._config_path()
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read(_MAX_CONFIG_LEN)
        except OSError as error:
            logger.warning("VM %d: cannot read %s: %s", self.vmid, path, error.strerror)
            return {}
        return parse_config(text)


def parse_config(text: str) -> dict[str, str]:
    """Return the settings of a VM's configuration, without pending ones and snapshots."""
    settings = {}
    for line in text.splitlines():
        if line.startswith("["):
            break
        key, colon, value = line.partition(":")
        if colon and not line.startswith("#"):
            settings[key.strip()] = value.strip()
    return settings
