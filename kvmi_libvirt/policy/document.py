# SPDX-License-Identifier: Apache-2.0
"""Turn bytes of unknown origin into an XML tree, or into one plain sentence.

UTF-8, no NUL, no document type declaration (so no entities), nothing is ever fetched,
and the bounds below. Two parsers must agree that a document is well-formed: expat,
which can be stopped in time, and libxml2, which makes the tree. Imports errors, lxml.
"""

from __future__ import annotations

import operator
import re
import sys
import xml.parsers.expat as expat
from types import MappingProxyType
from typing import Final, NamedTuple, NoReturn

from lxml import etree

from kvmi_libvirt.errors import PolicySyntaxError
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.quoting import quoted, shortened

MAX_BYTES: Final = 16 * 1024 * 1024
MAX_ELEMENTS: Final = 100_000
MAX_ATTRIBUTES: Final = 200
"""On one element. libvirt writes a dozen at most."""

MAX_NAMESPACES: Final = 1000
"""Declarations in one document; libxml2 walks through all that are in scope."""

MAX_DEPTH: Final = 256
"""libxml2's own limit, told in our words."""

_CONTEXT_BYTES: Final = 4096

_LAST_KNOWN_LINE: Final = 65534
"""libxml2 keeps an element's line in 16 bits: 65535 means "that or later"."""

_ENCODINGS: Final = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})


def read_file(path: str) -> bytes:
    """Return the content of *path* ("-" is standard input), one byte over the limit at most.

    Raises
        OSError  it cannot be read.
    """
    if path == "-":
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def parse(data: bytes, *, source: str) -> etree._Element:
    """Return the root element of *data*, without comments and processing instructions.

    Raises
        PolicySyntaxError  *data* is no acceptable document; has the line where
                           there is one.
    """
    if len(data) > MAX_BYTES:
        raise PolicySyntaxError(
            f"longer than {MAX_BYTES // 1024 // 1024} MiB; this is no domain XML",
            source=source,
            line=1,
        )
    _check_text(data, source)
    refused = _check_bounds(data, source)
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
        collect_ids=False,
    )
    try:
        # Of what expat has refused, libxml2 sees no more than it needs to name the reason.
        root = etree.fromstring(data if refused is None else data[: refused.end], parser)
    except etree.XMLSyntaxError as error:
        line = error.lineno or 1
        raise PolicySyntaxError(_explain(error), source=source, line=line) from None
    if refused is not None:
        raise PolicySyntaxError(_NOT_WELL_FORMED, source=source, line=refused.line)
    return root


# lxml-stubs gives these in a form that mypy no longer reads.
_sourceline: Final = operator.attrgetter("sourceline")
_text: Final = operator.attrgetter("text")
_tail: Final = operator.attrgetter("tail")
_prefix: Final = operator.attrgetter("prefix")


def line_of(element: etree._Element) -> int | None:
    """Return the line on which *element*'s start tag ends, or None when it is not known.

    libxml2 cannot tell lines beyond 65534.
    """
    line: int | None = _sourceline(element)
    return line if line is not None and line <= _LAST_KNOWN_LINE else None


def split_name(name: str) -> tuple[str | None, str]:
    """Return namespace URI (or None) and local part of lxml's ``{uri}local``."""
    uri, brace, local = name[1:].partition("}")
    return (uri, local) if name.startswith("{") and brace else (None, name)


def text_of(element: etree._Element) -> str:
    """Return the text before *element*'s first child."""
    text: str | None = _text(element)
    return text or ""


def tail_of(element: etree._Element) -> str:
    """Return the text between *element*'s end and whatever follows it."""
    tail: str | None = _tail(element)
    return tail or ""


def prefix_of(element: etree._Element) -> str | None:
    """Return the namespace prefix *element* is written with, if any."""
    prefix: str | None = _prefix(element)
    return prefix


def written(element: etree._Element) -> str:
    """Return *element* and all below it as XML text, indented, with the namespaces it needs."""
    copy = etree.fromstring(etree.tostring(element, with_tail=False))
    etree.cleanup_namespaces(copy)
    etree.indent(copy)
    return etree.tostring(copy, encoding="unicode")


def written_plain(element: etree._Element) -> str:
    """Return *element* as XML text without its namespace, as libvirt wants new metadata.

    libvirt itself puts all of it into the namespace it is given beside it. Only for an
    element all of whose parts are of one namespace.
    """
    return etree.tostring(_plain(element), encoding="unicode")


def _plain(element: etree._Element) -> etree._Element:
    attributes = {str(name): str(value) for name, value in element.attrib.items()}
    copy = etree.Element(split_name(str(element.tag))[1], attributes)
    copy.extend([_plain(child) for child in element])
    return copy


def _check_text(data: bytes, source: str) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        what = "looks like UTF-16" if utf16 else f"byte 0x{data[error.start]:02x} is not UTF-8"
        line = 1 if utf16 else data.count(b"\n", 0, error.start) + 1
        raise PolicySyntaxError(
            f"{what}; save the file in UTF-8", source=source, line=line
        ) from None
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise PolicySyntaxError(
            "NUL byte; this is no text, or not in UTF-8", source=source, line=line
        )


class _Refused(NamedTuple):
    line: int
    end: int  # bytes of the document that show why


def _check_bounds(data: bytes, source: str) -> _Refused | None:
    # libxml2 reads a document type declaration, entities and all, before it could be
    # asked whether there is one, and takes quadratic time for many attributes. expat
    # does neither, and calls back in time.
    parser = expat.ParserCreate("utf-8")
    depth = count = namespaces = 0

    def refuse(message: str) -> NoReturn:
        raise PolicySyntaxError(message, source=source, line=parser.CurrentLineNumber)

    def declaration(_version: str, encoding: str | None, _standalone: int) -> None:
        if encoding is not None and encoding.lower() not in _ENCODINGS:
            refuse(f"declared as {quoted(encoding)}; save the file in UTF-8 and declare that")

    def doctype(*_: object) -> None:
        refuse("document type declaration; remove <!DOCTYPE ...>, it is never needed")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count, namespaces
        depth += 1
        count += 1
        namespaces += sum(map(_is_declaration, attributes))
        if depth > MAX_DEPTH:
            refuse(f"elements nested more than {MAX_DEPTH} deep; this is no domain XML")
        if count > MAX_ELEMENTS:
            refuse(f"more than {MAX_ELEMENTS} elements; this is no domain XML")
        if len(attributes) > MAX_ATTRIBUTES:
            refuse(f"more than {MAX_ATTRIBUTES} attributes on <{shortened(name)}>; remove some")
        if namespaces > MAX_NAMESPACES:
            refuse(f"more than {MAX_NAMESPACES} namespace declarations; this is no domain XML")

    def end(_name: str) -> None:
        nonlocal depth
        depth -= 1

    parser.XmlDeclHandler = declaration
    parser.StartDoctypeDeclHandler = doctype
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        return _Refused(error.lineno, parser.ErrorByteIndex + _CONTEXT_BYTES)
    return None


def _is_declaration(attribute: str) -> bool:
    return attribute.startswith("xmlns")


_NOT_WELL_FORMED: Final = "not well-formed XML; 'xmllint --noout FILE' shows the place"

_PLAIN: Final = MappingProxyType(
    {
        1: "larger than an XML parser should accept",
        4: "no XML; a document starts with <",
        5: "something follows the end of the root element; remove it",
        9: "a character that XML does not allow",
        22: "an entity that is not known; write &amp; for &, &lt; for <",
        26: "an entity that is not known; write &amp; for &, &lt; for <",
        38: "< inside an attribute value; write &lt;",
        39: 'an attribute value without quotes; write name="value"',
        40: "an attribute value that does not end, or is too long",
        41: 'an attribute without a value; write name="value"',
        42: "the same attribute twice in one tag",
        45: "a comment that does not end; write -->",
        63: "a CDATA section that does not end",
        64: "<?xml ...?> must be the first thing in the file",
        65: 'a tag that is not well-formed; write name="value" and a space between attributes',
        68: "an & that begins no entity; write &amp;",
        73: "a tag that does not end; write >",
        76: "the end tag does not fit the start tag",
        77: "the document ends too early; an end tag is missing",
        80: "-- inside a comment",
        108: 'an XML version that nobody uses; write version="1.0"',
        200: "a namespace declaration that is not allowed",
        201: "a namespace prefix that is not bound",
        202: "a name with a colon in the wrong place",
    }
)
"""libxml2's error codes (xmlerror.h) in words for an operator."""

_MISMATCH: Final = re.compile(r"Opening and ending tag mismatch: (\S+) line (\d+) and ([^\s,]+)")
_UNCLOSED: Final = re.compile(r"Premature end of data in tag (\S+) line (\d+)")
_UNBOUND: Final = re.compile(r"Namespace prefix (\S+) (?:for (\S+) )?on (\S+) is not defined")
_REDEFINED: Final = re.compile(r"Attribute (\S+) redefined")
_UNKNOWN_ENTITY: Final = re.compile(r"Entity '([^']*)' not defined")


def _explain(error: etree.XMLSyntaxError) -> str:
    # The texts differ between libxml2 versions; the codes do not. So the names in a
    # text make a message better, but none depends on them.
    text = error.msg or ""
    if match := _MISMATCH.search(text):
        opened, line, closed = match.groups()
        return f"<{shortened(opened)}> of line {line} is closed by </{shortened(closed)}>"
    if match := _UNCLOSED.search(text):
        opened, line = match.groups()
        return f"the document ends too early: <{shortened(opened)}> of line {line} is not closed"
    if match := _UNBOUND.search(text):
        prefix, _, tag = map(shortened, map(str, match.groups()))
        uri = NAMESPACE if tag == "introspection" or "kvmi" in prefix else "..."
        return f'prefix "{prefix}" on <{tag}> is not bound; write xmlns:{prefix}="{uri}"'
    if match := _REDEFINED.search(text):
        return f"attribute {shortened(match.group(1))} stands twice in one tag"
    if match := _UNKNOWN_ENTITY.search(text):
        return f"&{shortened(match.group(1))}; is not known; write &amp; for &, &lt; for <"
    _, column = error.position
    what = _PLAIN.get(getattr(error, "code", 0), _NOT_WELL_FORMED)
    return f"{what} (column {column})" if column else what
