# SPDX-License-Identifier: Apache-2.0
"""What is packaged for the agent: its unit, and a dashboard of its metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmi_libvirt.agent.jobs import Outcome
from kvmi_libvirt.agent.metrics import Metrics
from kvmi_libvirt.agent.vm import Vm, pack
from kvmi_libvirt.state import VmState

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "packaging" / "systemd" / "kvmi-libvirt-agent.service"
DASHBOARD = ROOT / "packaging" / "grafana" / "kvmi-libvirt.json"
EXPOSURE_LIMIT = 40
"""Tenths of systemd's exposure level: "OK" begins at 5.0, this is well below."""


def vm() -> Vm:
    record = VmState(
        domain="web",
        uuid="4dea22b3-1d52-d8f3-2516-782e98ab3fa0",
        pid=1,
        start_ticks=1,
        abi="v12",
        mode="required",
        state="hooked",
        source="unix:/run/kvmi/a",
        commands=("KVMI_VM_GET_INFO",),
        events=(),
        since="2026-01-01T00:00:00Z",
        error=None,
        socket_inode=1,
    )
    return Vm(uuid=record.uuid, name=record.domain, packed=pack(b"<domain/>"), record=record)


def test_every_metric_of_the_dashboard_is_one_of_the_agents() -> None:
    metrics = Metrics(lambda: [vm()])
    outcome = Outcome(step="hook", stall_us=10, gap_us=5, error="no", kind="Refused", veto="no")
    metrics.note(outcome)
    metrics.operation("started", outcome)
    served = {
        line.partition("{")[0].partition(" ")[0]
        for line in metrics.render().decode().splitlines()
        if not line.startswith("#")
    }
    wanted = set(re.findall(r"kvmi_libvirt_\w+", DASHBOARD.read_text(encoding="utf-8")))
    assert len(wanted) >= 9
    assert wanted <= served


def test_the_dashboard_is_json_and_each_panel_has_a_query_and_a_place() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels)
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    assert all(panel["targets"] for panel in panels)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_unit_is_well_formed_and_hardened(tmp_path: Path) -> None:
    # verify wants the program to exist; what it complains about beside is ours.
    unit = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8").replace("/usr/bin/kvmi-libvirt", "/bin/true")
    unit.write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.M), encoding="utf-8")
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert [line for line in verified.stderr.splitlines() if UNIT.name in line] == []
    rated = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=yes"),
            *(f"--threshold={EXPOSURE_LIMIT}", unit),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert rated.returncode == 0, rated.stdout.splitlines()[-1:]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_unit_says_why_each_setting_that_is_left_open_is_needed(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    unit.write_text(text.replace("/usr/bin/kvmi-libvirt", "/bin/true"), encoding="utf-8")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--json=short", "--no-pager", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    rows = json.loads(rated.stdout)
    left_open = [row["name"] for row in rows if row["set"] is False and row["exposure"]]
    assert len(left_open) > 10
    comments = " ".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    for name in left_open:
        # "CapabilityBoundingSet=~CAP_KILL", "RootDirectory=/RootImage="
        for setting in re.findall(r"(\w+)=", name):
            assert re.search(rf"\b{setting}\b", comments), name


def test_every_capability_that_the_unit_keeps_is_explained() -> None:
    text = UNIT.read_text(encoding="utf-8")
    (kept,) = re.findall(r"^CapabilityBoundingSet=(.*)$", text, flags=re.M)
    for capability in kept.split():
        assert re.search(rf"^#\s+{capability}\s+\w+", text, flags=re.M), capability
