# SPDX-License-Identifier: Apache-2.0
"""The operators' pages: what they show can be used as it stands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.host import parse_host_policy
from kvmi_libvirt.policy.model import Mode

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parents[2]
ROLE: Final = ROOT / "packaging" / "ansible" / "roles" / "kvmi_libvirt"


def blocks(page: str, language: str) -> Iterator[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    yield from re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_host_policy_for_openstack_is_one() -> None:
    (policy,) = (parse_host_policy(b.encode(), source="x") for b in blocks("openstack.md", "xml"))

    assert [assigned.policy.profile for assigned in policy.assignments] == ["protect", "observe"]


def test_the_element_for_proxmox_is_one() -> None:
    (policy,) = (parse_document(b.encode(), source="x") for b in blocks("proxmox.md", "xml"))

    assert policy is not None
    assert policy.mode is Mode.REQUIRED


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((1, 0), 1), ((0, 3), 1), ((), 0)])
def test_the_dispatcher_for_proxmox_passes_a_failure_on(
    tmp_path: Path, codes: tuple[int, ...], expected: int
) -> None:
    (text,) = (block for block in blocks("proxmox.md", "sh") if block.startswith("#!/bin/sh"))
    dispatcher = tmp_path / "dispatch"
    dispatcher.write_text(text, encoding="utf-8")
    (tmp_path / "dispatch.d").mkdir()
    for number, code in enumerate(codes):
        script = tmp_path / "dispatch.d" / f"{number}"
        script.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n', encoding="utf-8")
        script.chmod(0o755)

    done = subprocess.run(
        ["/bin/sh", dispatcher, "100", "pre-start"], capture_output=True, text=True, check=False
    )

    assert done.returncode == expected
    assert done.stdout == "100 pre-start\n" * len(codes)


def test_every_variable_of_the_role_is_described_and_every_one_told_exists() -> None:
    yaml: Any = pytest.importorskip("yaml", reason="no PyYAML (ansible-core brings it)")
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text(encoding="utf-8"))
    specs = yaml.safe_load((ROLE / "meta" / "argument_specs.yml").read_text(encoding="utf-8"))
    described = specs["argument_specs"]["main"]["options"]
    told = re.findall(r"\bkvmi_libvirt_\w+", (ROOT / "docs" / "fleet.md").read_text())

    assert set(defaults) == set(described)
    for name, option in described.items():
        if "default" in option:
            assert defaults[name] == option["default"], name
    assert set(told) <= set(described)
