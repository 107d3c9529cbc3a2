# SPDX-License-Identifier: Apache-2.0
"""Where each command that README.md and the manual pages print is run, and which is not."""

from __future__ import annotations

from typing import Final

BY_CI: Final = ("make demo", "make test")
"""``.ci/run`` runs these, on a clean Debian."""

NOT_RUN: Final = {
    "systemctl enable --now kvmi-libvirt-agent": (
        "needs a host that systemd has booted; the unit is tests/unit/test_packaging_agent.py's"
    ),
    "systemctl reload kvmi-libvirt-agent": (
        "needs a host that systemd has booted; what it does, SIGHUP, is tests/live/test_agent.py's"
    ),
    "journalctl -u kvmi-libvirt-agent KVMI_LIBVIRT_DOMAIN=web1": (
        "needs journald; the fields are tests/unit/agent/test_agent_logs.py's"
    ),
    "qm set 100 --hookscript local:snippets/kvmi-hookscript": (
        "is Proxmox VE's own; the hookscript is called as it would be in tests/live/test_proxmox.py"
    ),
}
"""Commands that no test can run as they are printed, each with the reason."""
