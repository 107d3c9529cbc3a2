# SPDX-License-Identifier: Apache-2.0
"""Bytes in, a tree or one plain sentence out; within bounds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmi_libvirt.errors import PolicySyntaxError
from kvmi_libvirt.policy import document
from kvmi_libvirt.policy.document import line_of, parse, read_file

if TYPE_CHECKING:
    from pathlib import Path

UTF8 = "save the file in UTF-8"

NOT_XML = {
    "empty": (b"", 1, "no XML"),
    "blank": (b" \n\n", 3, "no XML"),
    "text": (b"hello", 1, "no XML"),
    "nul": (b"<a>\n\0</a>", 2, "NUL byte"),
    "nul after the end": (b"<a/>\0", 1, "NUL byte"),
    "not closed": (b"<a>\n<b>\n", 3, "<b> of line 2 is not closed"),
    "closed by another": (b"<a>\n<b>\n</a>", 3, "<b> of line 2 is closed by </a>"),
    "tag not finished": (b'<a x="1"', 1, "not well-formed"),
    "attribute twice": (b'<a\nx="1" x="2"/>', 2, "attribute x stands twice"),
    "no quotes": (b"<a x=1/>", 1, "without quotes"),
    "no value": (b"<a x/>", 1, "attribute without a value"),
    "less-than in attribute": (b'<a x="<"/>', 1, "write &lt;"),
    "ampersand": (b"<a>x & y</a>", 1, "write &amp;"),
    "entity": (b"<a>\n&foo;</a>", 2, "&foo; is not known"),
    "prefix on element": (b"<a>\n<k:b/></a>", 2, 'prefix "k" on <b> is not bound'),
    "prefix on attribute": (b'<a k:x="1"/>', 1, 'prefix "k" on <a> is not bound'),
    "prefix of ours": (
        b"<metadata><kvmi:introspection/></metadata>",
        1,
        'write xmlns:kvmi="urn:kvmi-libvirt:introspection:1.0"',
    ),
    "empty namespace": (b'<a xmlns:k=""/>', 1, "namespace declaration"),
    "colon": (b"<:a/>", 1, "colon in the wrong place"),
    "two roots": (b"<a/>\n<b/>", 2, "something follows the end"),
    "junk at the end": (b"<a/>junk", 1, "something follows the end"),
    "late declaration": (b'\n<?xml version="1.0"?><a/>', 2, "must be the first thing"),
    "version": (b'<?xml version="2.0"?><a/>', 1, "XML version"),
    "comment": (b"<a><!-- x -- y --></a>", 1, "-- inside a comment"),
    "comment not closed": (b"<a><!-- x", 1, "comment that does not end"),
    "cdata": (b"<a><![CDATA[x</a>", 1, "CDATA section that does not end"),
    "control character": (b"<a>\n\x1b[2J</a>", 2, "character that XML does not allow"),
    "character reference": (b'<a x="&#0;"/>', 1, "character that XML does not allow"),
    "surrogate reference": (b"<a>&#xD800;</a>", 1, "character that XML does not allow"),
    "latin-1": (b"<a>\n\xe9</a>", 2, f"byte 0xe9 is not UTF-8; {UTF8}"),
    "declared latin-1": (b'<?xml version="1.0" encoding="ISO-8859-1"?><a/>', 1, UTF8),
    "declared utf-16": (b'<?xml version="1.0" encoding="UTF-16"?><a/>', 1, UTF8),
    "declared utf-7": (b'<?xml version="1.0" encoding="utf-7"?><a/>', 1, UTF8),
    "declared nonsense": (b'<?xml version="1.0" encoding="klingon"?><a/>', 1, UTF8),
    "utf-16": ("<a/>".encode("utf-16"), 1, UTF8),
    "utf-16 without mark": ("<a/>".encode("utf-16-le"), 1, "not in UTF-8"),
    "utf-32": ("<a/>".encode("utf-32"), 1, UTF8),
    "ebcdic": ("<a/>".encode("cp037"), 1, UTF8),
    "surrogate": (b"<a>\xed\xa0\x80</a>", 1, "byte 0xed is not UTF-8"),
    "overlong": (b"<a>\xc0\xbc</a>", 1, "byte 0xc0 is not UTF-8"),
    "doctype": (b"<!-- c -->\n<!DOCTYPE a><a/>", 2, "remove <!DOCTYPE"),
    "external entity": (
        b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
        1,
        "remove <!DOCTYPE",
    ),
    "parameter entity": (
        b'<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1:1/x"> %x;]><a/>',
        1,
        "remove <!DOCTYPE",
    ),
    # Allowed by the fifth edition of XML 1.0 only: expat does not know it, libxml2 does.
    "parsers disagree": ("<a>\n<\u0220/></a>".encode(), 2, "not well-formed XML"),
    "depth": (b"<a>" * 257 + b"</a>" * 257, 1, "more than 256 deep"),
}


@pytest.mark.parametrize("name", NOT_XML)
def test_parse_refuses_with_line_and_reason(name: str) -> None:
    data, line, reason = NOT_XML[name]
    with pytest.raises(PolicySyntaxError) as caught:
        parse(data, source="web1.xml")
    error = caught.value
    assert (error.source, error.line) == ("web1.xml", line)
    assert reason in error.message
    assert error.message.isprintable()


@pytest.mark.parametrize(
    "data",
    [
        b"<a/>",
        b"\xef\xbb\xbf<a/>",
        b'<?xml version="1.0" encoding="utf-8"?><a/>',
        b'<?xml version="1.0" encoding="US-ASCII"?>\n<!-- c --><?pi x?><a/>\n<!-- c -->',
        "<a>\u20ac &lt;&amp;&#65; <![CDATA[<x>]]></a>".encode(),
        b"<a>" * 256 + b"</a>" * 256,
    ],
)
def test_parse_accepts(data: bytes) -> None:
    assert parse(data, source="x").tag == "a"


def test_parse_drops_comments_and_processing_instructions() -> None:
    root = parse(b"<a><!-- c --><b/><?pi?></a>", source="x")
    assert [child.tag for child in root] == ["b"]


ELEMENTS = b"<a>" + b"<b/>" * document.MAX_ELEMENTS + b"</a>"
ATTRIBUTES = b"<a " + b" ".join(b'x%d="1"' % i for i in range(100_000)) + b"/>"
NAMESPACES = (
    b"<a>"
    + b"".join(b'<b xmlns:p%d="u"/>' % i for i in range(document.MAX_NAMESPACES + 1))
    + b"</a>"
)
BOMB = (
    b"<!DOCTYPE a [<!ENTITY x0 'ha'>"
    + b"".join(b"<!ENTITY x%d '%s'>" % (i, b"&x%d;" % (i - 1) * 10) for i in range(1, 30))
    + b"]><a>&x29;</a>"
)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b" " * (document.MAX_BYTES + 1), "longer than 16 MiB"),
        (ELEMENTS, "more than 100000 elements"),
        (ATTRIBUTES, "more than 200 attributes on <a>"),
        (NAMESPACES, "more than 1000 namespace declarations"),
        (BOMB, "remove <!DOCTYPE"),
        (b"<a>" * 1_000_000, "more than 256 deep"),
        (b'<a x="' + b"y" * 12_000_000 + b'"/>', "too long"),
        # Refused by expat at once; libxml2 must not be let loose on the rest.
        (b"<a>&</a>" + ATTRIBUTES, "write &amp;"),
    ],
    ids=["bytes", "elements", "attributes", "namespaces", "bomb", "depth", "value", "prefix only"],
)
def test_parse_refuses_a_document_beyond_its_bounds_quickly(data: bytes, reason: str) -> None:
    before = time.process_time()
    with pytest.raises(PolicySyntaxError) as caught:
        parse(data, source="x")
    spent_s = time.process_time() - before
    assert reason in caught.value.message
    assert caught.value.line == 1
    # libxml2 alone needs half a minute for the attributes; an entity bomb, for ever.
    assert spent_s < 3


@pytest.mark.parametrize("newlines", [65533, 65534, 200_000])
def test_line_of_is_right_or_none(newlines: int) -> None:
    root = parse(b"\n" * newlines + b"<a/>", source="x")
    assert line_of(root) == (newlines + 1 if newlines < 65534 else None)


@given(st.binary() | st.text().map(str.encode))
@example(b"<?xml")
@example(b"\xef\xbb\xbf")
@settings(deadline=None, max_examples=300)
def test_arbitrary_bytes_give_a_tree_or_a_syntax_error(data: bytes) -> None:
    error = None
    try:
        parse(data, source="x")
    except PolicySyntaxError as caught:
        error = caught
    if error is not None:
        assert error.message.isprintable()
        newlines = data.count(b"\n") + data.count(b"\r")
        assert error.line is not None
        assert 1 <= error.line <= newlines + 1


def test_read_file_stops_just_beyond_the_limit() -> None:
    assert len(read_file("/dev/zero")) == document.MAX_BYTES + 1


def test_read_file_returns_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\0")
    assert read_file(str(tmp_path / "x")) == b"\xff\0"
