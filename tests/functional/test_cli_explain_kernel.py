# SPDX-License-Identifier: Apache-2.0
"""``explain`` on a running kernel: which of the rights it has, found by asking it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from kvmi_libvirt.abi.revisions import ALL_COMMANDS, ALL_EVENTS, by_name
from kvmi_libvirt.kernel import NO_KVMI
from kvmi_libvirt.policy.model import NAMESPACE

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]

MAIN = [sys.executable, "-c", "import sys; from kvmi_libvirt.cli import main; sys.exit(main())"]
ELEMENT = f"""<introspection xmlns="{NAMESPACE}" profile="protect">
  <source type="unix" path="/run/kvmi/x"/>
  <commands><allow name="KVMI_VM_GET_MAX_GFN"/></commands>
</introspection>"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "web1.xml"
    path.write_text(ELEMENT, encoding="utf-8")
    return str(path)


def emulated(*options: str) -> list[str]:
    return [*MAIN, "emulate", *options, "--", *MAIN]


def explained(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def explained_json(command: list[str]) -> Any:
    return json.loads(explained([*command, "--json"]))


@pytest.mark.parametrize("name", ["v12", "v11", "v7"])
def test_each_right_is_said_to_be_in_this_kernel_or_not(name: str, file: str) -> None:
    found = explained_json([*emulated("--abi", name), "explain", file])
    abi = by_name(name)
    assert found["abi"] == name
    in_kernel = {entry["name"]: entry["in_kernel"] for entry in found["commands"]}
    assert in_kernel == {name: name in abi.commands_by_name for name in ALL_COMMANDS}
    in_kernel = {entry["name"]: entry["in_kernel"] for entry in found["events"]}
    assert in_kernel == {name: name in abi.events_by_name for name in ALL_EVENTS}
    # What is demanded, and is not there, is told before a VM has to start without it.
    if name == "v12":
        assert found["problem"].startswith(f"{abi.title} has no command KVMI_VM_GET_MAX_GFN;")
    else:
        assert found["problem"] is None


def test_kernel_where_introspection_is_switched_off_is_said_to_be_one(file: str) -> None:
    out = explained([*emulated("--fault", "introspection-off"), "explain", file])
    assert "kernel:    KVM introspection is switched off in this kernel" in out


def test_kernel_without_introspection_has_none_of_the_rights(file: str) -> None:
    if f"kernel:    {NO_KVMI}\n" not in explained([*MAIN, "explain", file]):
        pytest.skip("this kernel has KVM introspection")
    found = explained_json([*MAIN, "explain", file])
    assert found["abi"] is None
    assert {entry["in_kernel"] for entry in (*found["commands"], *found["events"])} == {False}
