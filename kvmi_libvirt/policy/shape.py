# SPDX-License-Identifier: Apache-2.0
"""Check the shape of our elements: the schemas decide, this module says why.

The schemas in ``xml-schemas/`` alone accept or refuse. Their own messages speak
of patterns and sequences, so a refused element is looked at again with the tables
of ``shapes.py``; a test holds the two against each other.
Imports abi, datafiles, errors, lxml.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from typing import TYPE_CHECKING, Final

from lxml import etree

from kvmi_libvirt.abi.revisions import ALL_COMMANDS, ALL_EVENTS
from kvmi_libvirt.datafiles import data_file
from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.policy.document import line_of, prefix_of, split_name, tail_of, text_of
from kvmi_libvirt.policy.findings import Finding
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.policy.shapes import ALL_SHAPES, Attribute, Occurs, Shape
from kvmi_libvirt.quoting import quoted, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SCHEMA: Final = "xml-schemas/introspection.rng"
HOST_SCHEMA: Final = "xml-schemas/host-policy.rng"
MAX_ELEMENTS: Final = 20_000
"""In one policy. libxml2 takes quadratic time to hold it against the schema."""

MAX_FINDINGS: Final = 1000
"""An element with more mistakes than this is not an attempt at a policy."""

_ALIKE: Final = 0.7
"""How much alike a name must be to be suggested, from 0 to 1."""

_XML_SPACE: Final = " \t\r\n"
_XML_NAMESPACE: Final = "http://www.w3.org/XML/1998/namespace"


def shape_findings(element: etree._Element) -> list[Finding]:
    """Return what keeps *element* from being of the schema's shape; empty when it is.

    Raises
        KvmiLibvirtError  the schema is not installed.
    """
    size = sum(1 for _ in itertools.islice(element.iter(), MAX_ELEMENTS + 1))
    if size > MAX_ELEMENTS:
        text = f"more than {MAX_ELEMENTS} elements in {tag_of(element)}; write fewer"
        return [_finding(element, text)]
    name = HOST_SCHEMA if split(element)[1] in ("host-policy", "profile") else SCHEMA
    if _schema(name).validate(element):
        return []
    found = list(itertools.islice(diagnose(element), MAX_FINDINGS))
    if found:
        return found
    return [_finding(element, f"{tag_of(element)} does not fit {name}")]


def load_schemas() -> None:
    """Load both schemas, as the first use of each does.

    Raises
        KvmiLibvirtError  one is not installed, or cannot be used.
    """
    for name in (SCHEMA, HOST_SCHEMA):
        try:
            _schema(name)
        except (OSError, etree.LxmlError) as error:
            raise KvmiLibvirtError(f"{data_file(name)} cannot be used: {error}") from error


@functools.cache
def _schema(name: str) -> etree.RelaxNG:
    return etree.RelaxNG(file=str(data_file(name)))


def diagnose(element: etree._Element) -> Iterator[Finding]:
    """Yield, in document order, where *element* departs from the tables.

    Not the judge: only called for what the schema has refused.
    """
    namespace, name = split(element)
    if namespace != NAMESPACE or name not in ALL_SHAPES:
        yield _finding(element, f"unknown element {tag_of(element)}")
        return
    shape = ALL_SHAPES[name]
    yield from _attribute_findings(element, shape)
    yield from _text_findings(element)
    yield from _child_findings(element, shape)


def split(element: etree._Element) -> tuple[str | None, str]:
    """Return namespace URI (or None) and local name of *element*."""
    return split_name(str(element.tag))


def tag_of(element: etree._Element) -> str:
    """Return *element*'s start tag without attributes, as its author wrote the name."""
    name, prefix = split(element)[1], prefix_of(element)
    tag = name if prefix is None else f"{prefix}:{name}"
    return f"<{shortened(tag)}>"


def ours(element: etree._Element, name: str) -> str:
    """Return the tag of our element *name*, with the prefix that is in use at *element*."""
    prefix = next((p for p, uri in element.nsmap.items() if uri == NAMESPACE), "kvmi")
    return f"<{name}>" if prefix is None else f"<{prefix}:{name}>"


def _attribute_findings(element: etree._Element, shape: Shape) -> Iterator[Finding]:
    tag, strangers = tag_of(element), False
    attributes = dict(shape.attributes)
    if shape.variants:
        kind = element.get("type", "")
        if kind in shape.variants:
            attributes.update(shape.variants[kind])
        elif "type" in element.attrib:
            write = attributes["type"].write
            text = f"type={quoted(kind)} on {tag} is not possible; write {write}"
            yield _finding(element, text)
            return  # what goes with it cannot be told
        else:
            attributes = dict(shape.all_attributes())
    for key, raw in element.attrib.items():
        name, value = str(key), str(raw)
        known = attributes.get(name)
        if known is None:
            strangers = True
            yield _finding(element, _unknown_attribute(element, name, attributes))
        elif not known.pattern.fullmatch(value):
            strangers = True
            write = known.write
            if name in ("name", "group"):
                write = _instead(element, value) or write
            text = f"{name}={_shown(element, value)} on {tag} is not possible; write {write}"
            yield _finding(element, text)
    if not strangers:
        yield from _lacking_attributes(element, shape, attributes)


def _instead(element: etree._Element, value: str) -> str | None:
    # What was meant where a rule names a group as a command, or the other way round, or
    # spells either with other separators.
    if split(element)[1] not in ("allow", "deny"):
        return None
    as_group = re.sub(r"[_ ]", "-", value).lower()
    if as_group in GROUPS:
        return f'group="{as_group}"'
    as_name = re.sub(r"[- ]", "_", value).upper()
    is_known = {as_name, f"KVMI_{as_name}"} & (ALL_COMMANDS | ALL_EVENTS)
    return f'name="{as_name}"' if is_known else None


def _lacking_attributes(
    element: etree._Element, shape: Shape, attributes: Mapping[str, Attribute]
) -> Iterator[Finding]:
    tag = tag_of(element)
    if shape.variants and "type" not in element.attrib:
        attributes = shape.attributes
    for name, known in attributes.items():
        if known.is_required and name not in element.attrib:
            text = f'{tag} lacks the attribute "{name}"; write {known.write}'
            yield _finding(element, text)
    for names, at_most in ((shape.exclusive, 1), (shape.any_of, len(shape.any_of))):
        present = [name for name in names if name in element.attrib]
        if names and not present:
            listed = " or ".join(f'"{name}"' for name in names)
            write = attributes[names[0]].write
            yield _finding(element, f"{tag} lacks the attribute {listed}; write {write}")
        elif len(present) > at_most:
            both = " and ".join(f'"{name}"' for name in present)
            yield _finding(element, f"{tag} has {both}; write one of them, and two rules for both")


def _unknown_attribute(
    element: etree._Element, key: str, attributes: Mapping[str, Attribute]
) -> str:
    namespace, name = split_name(key)
    if namespace == _XML_NAMESPACE:
        name = f"xml:{name}"
    elif namespace is not None:
        prefixes = (p for p, uri in element.nsmap.items() if p and uri == namespace)
        name = f"{next(prefixes, '')}:{name}"
    return f"unknown attribute {quoted(name)} on {tag_of(element)}; {_instead_of(name, attributes)}"


def _instead_of(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=_ALIKE)
    if close:
        return f"did you mean {close[0]}?"
    return f"allowed: {', '.join(known) or 'none'}"


def _text_findings(element: etree._Element) -> Iterator[Finding]:
    for text in (text_of(element), *map(tail_of, element)):
        if stripped := text.strip(_XML_SPACE):
            text = (
                f"text {_shown(element, stripped)} in {tag_of(element)}; only elements belong there"
            )
            yield _finding(element, text)


def _shown(element: etree._Element, text: str) -> str:
    # Somebody may have written the secret itself there: it must not be repeated.
    return "(not shown)" if split(element)[1] == "secret" else quoted(text)


def _child_findings(element: etree._Element, shape: Shape) -> Iterator[Finding]:
    seen: set[str] = set()
    strangers = False
    for child in element:
        namespace, name = split(child)
        occurs = shape.children.get(name) if namespace == NAMESPACE else None
        if occurs is None:
            strangers = True
            yield _finding(child, _unknown_child(element, child, shape))
            continue
        if occurs in (Occurs.ONCE, Occurs.AT_MOST_ONCE) and name in seen:
            text = f"second {tag_of(child)} in {tag_of(element)}; write one"
            yield _finding(child, text)
        seen.add(name)
        yield from diagnose(child)
    if not strangers:
        for name, occurs in shape.children.items():
            if occurs in (Occurs.ONCE, Occurs.AT_LEAST_ONCE) and name not in seen:
                tag, example = ours(element, name), _example(element, name)
                text = f"{tag_of(element)} lacks {tag}; write {example}"
                yield _finding(element, text)


def _unknown_child(element: etree._Element, child: etree._Element, shape: Shape) -> str:
    namespace, name = split(child)
    parent = tag_of(element)
    if namespace is None:
        instead = ours(element, shortened(name))
        write = 'remove its xmlns=""' if instead == tag_of(child) else f"write {instead}"
        return f"{tag_of(child)} in {parent} has no namespace; {write}"
    if namespace != NAMESPACE:
        return f"{tag_of(child)} in {parent} is of namespace {quoted(namespace)}; remove it"
    homes = " or ".join(ours(element, home) for home in _homes(element, name))
    if homes and name not in shape.children:
        return f"{tag_of(child)} does not belong in {parent}; move it to {homes}"
    if not shape.children:
        return f"unknown element {tag_of(child)} in {parent}; no element belongs there, remove it"
    instead = _instead_of(name, shape.children)
    return f"unknown element {tag_of(child)} in {parent}; {instead}"


def _homes(element: etree._Element, name: str) -> list[str]:
    # The elements in which *name* may stand, in a document such as this.
    above = (split(one) for one in (element, *element.iterancestors()))
    *_, top = (tag for namespace, tag in above if namespace == NAMESPACE)
    return [home for home in _all_below(top) if name in ALL_SHAPES[home].children]


@functools.cache
def _all_below(top: str) -> tuple[str, ...]:
    found = [top] if top in ALL_SHAPES else []
    for name in found:
        found += [child for child in ALL_SHAPES[name].children if child not in found]
    return tuple(found)


def _example(element: etree._Element, name: str) -> str:
    return f"{ours(element, name)[:-1]}{ALL_SHAPES[name].example}/>"


def _finding(element: etree._Element, message: str) -> Finding:
    return Finding(message=message, line=line_of(element))
