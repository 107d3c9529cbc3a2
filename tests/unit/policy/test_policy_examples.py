# SPDX-License-Identifier: Apache-2.0
"""xml-schemas/examples: every element and attribute has a right and a wrong one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from lxml import etree

from kvmi_libvirt.datafiles import data_file
from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.findings import Severity
from kvmi_libvirt.policy.host import HostPolicy
from kvmi_libvirt.policy.limits import TcpPlace
from kvmi_libvirt.policy.lint import lint
from kvmi_libvirt.policy.shape import HOST_SCHEMA, SCHEMA
from kvmi_libvirt.policy.shapes import ALL_SHAPES, SHAPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmi_libvirt.policy.shapes import Shape

SCHEMA_PATH = data_file(SCHEMA)
EXAMPLES = SCHEMA_PATH.parent / "examples"
VALID = sorted((EXAMPLES / "valid").glob("*.xml"))
INVALID = sorted((EXAMPLES / "invalid").glob("*.xml"))
HOST_VALID = sorted((EXAMPLES / "host-policy/valid").glob("*.xml"))
HOST_INVALID = sorted((EXAMPLES / "host-policy/invalid").glob("*.xml"))
HOST = HostPolicy(tcp=(TcpPlace(host="tool.example"),))


def things_of(shapes: Mapping[str, Shape]) -> set[str]:
    return set(shapes) | {
        f"{name}/@{attribute}"
        for name, known in shapes.items()
        for attribute in known.all_attributes()
    }


THINGS = things_of(ALL_SHAPES)


class Header(NamedTuple):
    """The comment at the top of an invalid example."""

    about: str
    by: str
    expect: list[str]


def header(path: Path) -> Header:
    comment = path.read_text(encoding="utf-8").split("<!--", 2)[2].split("-->", 1)[0]
    fields = re.findall(r"^  (about|by|expect): (.*)$", comment, re.MULTILINE)
    about, by = (next(v for k, v in fields if k == key) for key in ("about", "by"))
    return Header(about, by, [value for key, value in fields if key == "expect"])


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_valid_example_is_a_policy(path: Path) -> None:
    xml = path.read_bytes()
    report = lint(xml, source=path.name, host=HOST)
    assert [f for f in report.findings if f.severity is Severity.ERROR] == []
    assert report.policy == parse_document(xml, source=path.name) is not None


@pytest.mark.parametrize("path", HOST_VALID, ids=lambda path: path.stem)
def test_valid_example_for_a_host_has_nothing_wrong(path: Path) -> None:
    report = lint(path.read_bytes(), source=path.name, host=HostPolicy())
    assert report.findings == ()
    assert report.kind == ("profile" if path.stem == "profile" else "host-policy")


@pytest.mark.parametrize("path", [*INVALID, *HOST_INVALID], ids=lambda path: path.stem)
def test_invalid_example_gets_the_message_it_names(path: Path) -> None:
    report = lint(path.read_bytes(), source=path.name, host=HostPolicy())
    errors = [f"{f.line}: {f.message}" for f in report.findings if f.severity is Severity.ERROR]
    assert errors == header(path).expect
    assert report.policy is None


@pytest.mark.parametrize(
    ("paths", "shapes"), [(VALID, SHAPES), ([*VALID, *HOST_VALID], ALL_SHAPES)]
)
def test_every_element_and_attribute_has_a_valid_example(
    paths: list[Path], shapes: Mapping[str, Shape]
) -> None:
    shown = set()
    for path in paths:
        for element in etree.parse(str(path)).getroot().iter("{*}*"):
            name = etree.QName(element).localname
            shown |= {name, *(f"{name}/@{attribute}" for attribute in map(str, element.attrib))}
    assert shown == things_of(shapes)


def test_every_element_and_attribute_has_an_invalid_example() -> None:
    # An element with a compulsory attribute goes wrong through that attribute.
    through_attributes = {"reconnect", "allow", "deny"}
    wanted = THINGS - through_attributes
    assert {header(path).about for path in (*INVALID, *HOST_INVALID)} >= wanted


def test_headers_of_invalid_examples_are_well_made() -> None:
    for path in (*INVALID, *HOST_INVALID):
        about, by, expect = header(path)
        assert about in THINGS, path.name
        assert by in ("syntax", "schema", "meaning"), path.name
        assert expect, path.name


@pytest.mark.skipif(shutil.which("xmllint") is None, reason="no xmllint (apt: libxml2-utils)")
def test_xmllint_judges_the_examples_alike() -> None:
    for path in (*VALID, *INVALID, *HOST_VALID, *HOST_INVALID):
        schema = data_file(HOST_SCHEMA if "host-policy" in path.parts else SCHEMA)
        command = ["xmllint", "--noout", "--relaxng", str(schema), str(path)]
        done = subprocess.run(command, capture_output=True, check=False)
        fits = path in (*VALID, *HOST_VALID) or header(path).by == "meaning"
        assert (done.returncode == 0) == (fits or path.stem == "doctype"), (path, done.stderr)


@pytest.mark.skipif(shutil.which("jing") is None, reason="no jing (apt: jing)")
@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [(SCHEMA, VALID, INVALID), (HOST_SCHEMA, HOST_VALID, HOST_INVALID)],
    ids=["element", "host"],
)
def test_jing_judges_the_examples_alike(
    schema: str, valid: list[Path], invalid: list[Path]
) -> None:
    # The Java one, as XML editors use it: an independent reading of the schema.
    files = [*valid, *(path for path in invalid if header(path).by != "syntax")]
    command = ["jing", str(data_file(schema)), *map(str, files)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    refused = {Path(line.split(":")[0]) for line in done.stdout.splitlines()}
    assert refused == {path for path in invalid if header(path).by == "schema"}
