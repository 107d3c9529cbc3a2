# SPDX-License-Identifier: Apache-2.0
"""docs/policy.md names everything a policy can hold, and its example is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_policy_bounds

from kvmi_libvirt.abi.revisions import ALL_COMMANDS, ALL_EVENTS
from kvmi_libvirt.policy import document, facts, secret, shape, shapes
from kvmi_libvirt.policy.element import parse_document, parse_domain
from kvmi_libvirt.policy.explain import notes
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.model import Mode
from kvmi_libvirt.policy.profile import SHIPPED

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "policy.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[str]:
    section = TEXT.split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
    return re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize(("heading", "names"), [("Commands", ALL_COMMANDS), ("Events", ALL_EVENTS)])
def test_every_name_has_one_line_about_what_it_gives_away(
    heading: str, names: frozenset[str]
) -> None:
    assert sorted(rows(heading)) == sorted(names)


def test_every_element_and_attribute_is_described() -> None:
    for name, known in shapes.ALL_SHAPES.items():
        (section,) = re.findall(rf"^### .*`<{name}>`.*\n((?:.*\n)+?)(?=#)", TEXT, re.MULTILINE)
        for attribute in known.all_attributes():
            assert f"| `{attribute}`" in section, (name, attribute)


def test_the_example_is_a_policy() -> None:
    example = TEXT.split("```xml\n", 1)[1].split("```", 1)[0].replace("...", "")
    policy = parse_domain(example.encode(), source="docs/policy.md").policy
    assert policy is not None
    assert len(policy.commands.allowed) == 5
    assert notes(policy) == []


README = (Path(__file__).resolve().parents[3] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", re.findall(r"```xml\n(.*?)```", README, re.DOTALL))
def test_examples_of_the_readme_are_policies_of_which_every_right_is_of_use(example: str) -> None:
    element = example.removeprefix("<metadata>\n").replace("</metadata>\n", "")
    policy = parse_document(element.encode(), source="README.md")
    assert policy is not None
    assert policy.mode is Mode.REQUIRED
    assert notes(policy) == []


def test_limits_are_the_real_ones() -> None:
    limits = TEXT.split("## Limits", 1)[1].split("\n## ", 1)[0]
    for limit in (
        document.MAX_ELEMENTS,
        document.MAX_ATTRIBUTES,
        document.MAX_NAMESPACES,
        document.MAX_DEPTH,
        document.MAX_BYTES >> 20,
        shape.MAX_ELEMENTS,
        shape.MAX_FINDINGS,
        facts.MAX_EXTRA_SPECS,
        facts.MAX_NAME_LEN,
        secret.MAX_SECRET_BYTES,
        test_policy_bounds.LIMIT_S,
        test_policy_bounds.LIMIT_MIB,
    ):
        assert re.search(rf"(?<![\d,]){limit:,g}(?![\d,])", limits), limit


def test_every_group_and_profile_has_its_threat_in_one_line() -> None:
    assert rows("Groups") == list(GROUPS)
    for name, group in GROUPS.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*$", TEXT.split("### Groups", 1)[1], re.MULTILINE)
        assert group.threat in line
    assert rows("Profiles") == list(SHIPPED)
