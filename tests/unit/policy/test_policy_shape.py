# SPDX-License-Identifier: Apache-2.0
"""The schema decides; the explanation never disagrees with it."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import strategies
from hypothesis import example, given, settings
from lxml import etree

from kvmi_libvirt.datafiles import data_file
from kvmi_libvirt.policy import shape
from kvmi_libvirt.policy.document import parse
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.policy.shape import HOST_SCHEMA, SCHEMA, diagnose, shape_findings
from kvmi_libvirt.policy.shapes import ALL_SHAPES, HOST_SHAPES, SHAPES, Occurs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmi_libvirt.policy.shapes import Shape

RNG = "{http://relaxng.org/ns/structure/1.0}"
SOURCE = '<source type="unix" path="/run/kvmi/x"/>'


def element(inner: str, attributes: str = "") -> etree._Element:
    text = f'<introspection xmlns="{NAMESPACE}"{attributes}>{inner}</introspection>'
    return parse(text.encode(), source="x")


@functools.cache
def schema(name: str) -> etree.RelaxNG:
    return etree.RelaxNG(file=str(data_file(name)))


def is_valid(root: etree._Element) -> bool:
    return bool(schema(schema_of(etree.QName(root).localname)).validate(root))


def schema_of(root: str) -> str:
    return SCHEMA if root == "introspection" else HOST_SCHEMA


@given(strategies.near_elements(strategies.ROOTS))
@example(f'<introspection xmlns="{NAMESPACE}"/>')
@example(f'<introspection xmlns="{NAMESPACE}">{SOURCE}</introspection>')
@settings(deadline=None, max_examples=400)
def test_schema_and_explanation_agree_on_what_is_wrong(text: str) -> None:
    root = parse(text.encode(), source="x")
    assert is_valid(root) == (list(diagnose(root)) == [])


@pytest.mark.parametrize("of", strategies.ROOTS)
def test_schema_and_explanation_agree_on_every_single_mistake(of: str) -> None:
    for text in strategies.single_changes(of):
        root = parse(text.encode(), source="x")
        assert is_valid(root) == (list(diagnose(root)) == []), text


@pytest.mark.skipif(shutil.which("jing") is None, reason="no jing (apt: jing)")
@pytest.mark.parametrize("of", strategies.ROOTS)
def test_jing_and_libxml2_agree_on_every_single_mistake(of: str, tmp_path: Path) -> None:
    wanted = set()
    for number, text in enumerate(strategies.single_changes(of)):
        path = tmp_path / f"{number}.xml"
        path.write_text(text, encoding="utf-8")
        if not is_valid(parse(text.encode(), source="x")):
            wanted.add(path)
    command = ["jing", str(data_file(schema_of(of))), *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert {Path(line.split(":")[0]) for line in done.stdout.splitlines()} == wanted


@given(strategies.near_elements(strategies.ROOTS))
@settings(deadline=None, max_examples=100)
def test_every_finding_is_one_printable_line(text: str) -> None:
    for finding in shape_findings(parse(text.encode(), source="x")):
        assert finding.message.isprintable()
        assert finding.line is not None


@pytest.mark.parametrize(
    ("rule", "write"),
    [
        ('name="memory-read"', 'write group="memory-read"'),
        ('name="memory-reed"', "write name= with one of the names"),
        ('name="vm-get info"', 'write name="VM_GET_INFO"'),
        ('name="kvmi-vm-get-info"', 'write name="KVMI_VM_GET_INFO"'),
        ('group="Memory_Read"', 'write group="memory-read"'),
        ('group="KVMI_VM_GET_INFO"', 'write name="KVMI_VM_GET_INFO"'),
        ('group="KVMI_X"', "write group= with one of query, "),
    ],
)
def test_group_and_name_in_each_others_place_are_told_so(rule: str, write: str) -> None:
    (finding,) = shape_findings(element(f"{SOURCE}<commands><allow {rule}/></commands>"))
    assert write in finding.message


@pytest.mark.parametrize(
    ("inner", "home"),
    [
        ("<reconnect enabled='yes'/>", "<source>"),
        ("<allow name='VM_GET_INFO'/>", "<commands> or <events>"),
        ("<commands><handshake timeout='1'/></commands>", "<introspection>"),
        ("<introspection/>", None),
        ("<match name='x'/>", None),  # that is for a host's policy
    ],
)
def test_element_in_the_wrong_place_is_told_where_it_belongs(inner: str, home: str | None) -> None:
    (finding,) = shape_findings(element(SOURCE + inner))
    assert ("move it to" in finding.message) == (home is not None)
    assert home is None or finding.message.endswith(f"; move it to {home}")


def test_element_in_a_host_policy_is_told_where_it_belongs_there() -> None:
    text = f'<p:host-policy xmlns:p="{NAMESPACE}"><p:source/></p:host-policy>'
    (finding,) = shape_findings(parse(text.encode(), source="x"))
    assert finding.message.endswith("; move it to <p:assign>")


def defines_of(name: str) -> dict[str | None, etree._Element]:
    return {
        d.get("name"): d for d in etree.parse(str(data_file(name))).getroot().iter(f"{RNG}define")
    }


@pytest.mark.parametrize(
    ("name", "shapes"), [(SCHEMA, SHAPES), (HOST_SCHEMA, HOST_SHAPES)], ids=["element", "host"]
)
def test_table_lists_what_the_schema_lists(name: str, shapes: Mapping[str, Shape]) -> None:
    # Another witness than the property above: no element or attribute is missing here
    # because no strategy happens to generate it.
    grammar = etree.parse(str(data_file(name))).getroot()
    defines = {**defines_of(SCHEMA), **defines_of(name)}  # one includes the other

    def refs(node: etree._Element) -> list[etree._Element]:
        # Patterns of an element, through references to groups but not into other elements.
        found: list[etree._Element] = []
        for child in node:
            if child.tag == f"{RNG}ref":
                target = defines[child.get("name")]
                first = target.find(f"{RNG}element")
                found += [first] if first is not None else refs(target)
            elif child.tag == f"{RNG}attribute":
                found.append(child)
            else:
                found += refs(child)
        return found

    seen = {}
    for node in grammar.iter(f"{RNG}element"):
        tag = node.get("name")
        assert tag is not None
        inside = refs(node)
        attributes = {n.get("name") for n in inside if n.tag == f"{RNG}attribute"}
        children = {n.get("name") for n in inside if n.tag == f"{RNG}element"}
        seen[tag] = (attributes, children)
    assert seen == {
        name: (set(known.all_attributes()), set(known.children)) for name, known in shapes.items()
    }


def test_each_define_holds_one_element_of_its_own_name() -> None:
    for define in (*defines_of(SCHEMA).values(), *defines_of(HOST_SCHEMA).values()):
        names = [e.get("name") for e in define.iter(f"{RNG}element")]
        assert names in ([], [define.get("name")])


def test_only_a_source_and_a_match_are_compulsory() -> None:
    compulsory = {
        child
        for known in ALL_SHAPES.values()
        for child, occurs in known.children.items()
        if occurs in (Occurs.ONCE, Occurs.AT_LEAST_ONCE)
    }
    assert compulsory == {"source", "match"}


@pytest.mark.parametrize(
    ("inner", "attributes", "message"),
    [
        (
            SOURCE,
            ' mod="required"',
            'unknown attribute "mod" on <introspection>; did you mean mode?',
        ),
        (
            SOURCE,
            ' xml:lang="en"',
            'unknown attribute "xml:lang" on <introspection>; allowed: mode, profile, early',
        ),
        (
            SOURCE,
            ' xmlns:f="u" f:mode="required"',
            'unknown attribute "f:mode" on <introspection>; did you mean mode?',
        ),
        (
            '<sours type="unix" path="/x"/>',
            "",
            "unknown element <sours> in <introspection>; did you mean source?",
        ),
        (
            f"{SOURCE}<rights/>",
            "",
            (
                "unknown element <rights> in <introspection>; "
                "allowed: source, secret, handshake, unhook, commands, events"
            ),
        ),
        (
            '<source type="unix" pth="/x"/>',
            "",
            'unknown attribute "pth" on <source>; did you mean path?',
        ),
        (
            '<source type="tcp" host="::1" path="/x"/>',
            "",
            'unknown attribute "path" on <source>; allowed: type, host, port',
        ),
        (
            '<source type="udp" host="::1" port="1"/>',
            "",
            (
                'type="udp" on <source> is not possible; '
                'write type="unix" or type="vsock" or type="tcp"'
            ),
        ),
        (
            SOURCE + '<commands><allow name="A" group="b"/></commands>',
            "",
            '<allow> has "name" and "group"; write one of them, and two rules for both',
        ),
        (
            SOURCE + "<commands><allow/></commands>",
            "",
            (
                '<allow> lacks the attribute "name" or "group"; '
                "write name= with one of the names that 'kvmi-libvirt names' lists"
            ),
        ),
        (
            SOURCE + '<x:commands xmlns:x="u"/>',
            "",
            '<x:commands> in <introspection> is of namespace "u"; remove it',
        ),
        (
            SOURCE + '<commands xmlns=""/>',
            "",
            '<commands> in <introspection> has no namespace; remove its xmlns=""',
        ),
        (
            SOURCE + "<commands>a<allow name='VM_GET_INFO'/></commands>",
            "",
            'text "a" in <commands>; only elements belong there',
        ),
        (
            SOURCE + "<commands><allow name='VM_GET_INFO'/>b</commands>",
            "",
            'text "b" in <commands>; only elements belong there',
        ),
    ],
)
def test_one_mistake_gets_one_line_and_not_one_for_each_consequence(
    inner: str, attributes: str, message: str
) -> None:
    assert [f.message for f in shape_findings(element(inner, attributes))] == [message]


@pytest.mark.parametrize("text", ["<introspection/>", f"<x xmlns='{NAMESPACE}'/>"])
def test_other_elements_are_not_of_the_shape(text: str) -> None:
    (finding,) = shape_findings(parse(text.encode(), source="x"))
    assert finding.message.startswith("unknown element <")


def test_hostile_names_and_values_cannot_forge_a_line() -> None:
    value = "\u202e\u2028x&#10;/etc/passwd:1: all is well" + "y" * 1000
    (finding,) = shape_findings(element(SOURCE, f' mode="{value}"'))
    assert finding.message.isprintable()
    assert len(finding.message) < 250


def test_number_of_findings_is_bounded() -> None:
    inner = SOURCE + "<x/>" * (shape.MAX_FINDINGS + 5)
    assert len(shape_findings(element(inner))) == shape.MAX_FINDINGS


def test_too_large_an_element_is_refused_before_the_schema_sees_it() -> None:
    rules = '<allow name="VM_GET_INFO"/>' * shape.MAX_ELEMENTS
    (finding,) = shape_findings(element(f"{SOURCE}<commands>{rules}</commands>"))
    assert "more than 20000 elements" in finding.message


def test_schema_is_the_judge_even_where_the_table_sees_nothing_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shape, "diagnose", lambda _element: iter(()))
    (finding,) = shape_findings(element(""))
    assert finding.message == "<introspection> does not fit xml-schemas/introspection.rng"
