# SPDX-License-Identifier: Apache-2.0
"""Read the project's pages, and what they must agree with: sources, verbs, make's targets.

A page quotes a message of ours in a block of language ``message``, one a line, or in the first
cell of a table headed "message". A word of :data:`PLACEHOLDERS` in it stands for what differs
each time.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from kvmi_libvirt.cli import PROG, VERBS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"

PLACEHOLDERS: Final = (
    *("CALL", "DAEMON", "DOMAIN", "ERRNO", "FILE", "LINE", "MODE", "N", "NAME", "NAMES"),
    *("PATH", "PID", "PLACE", "REVISION", "SECONDS", "TIME", "UUID", "WHAT", "WHO", "WHY"),
)

_FENCE: Final = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_SPAN: Final = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING: Final = re.compile(r"^#+ (.*)$", re.MULTILINE)
_STANDS_FOR: Final = "\0"
_PLACEHOLDER: Final = re.compile(rf"\b(?:{'|'.join(PLACEHOLDERS)})\b")
_FORMAT: Final = re.compile(r"%[-0-9.]*[sdrigx]|\{\w*\}")


class Fence(NamedTuple):
    """A block of code of a page."""

    language: str
    body: str


def pages() -> list[Path]:
    """Return the pages that are held to their words here."""
    found = sorted(DOCS.glob("*.md"))
    return found + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]


def fences(text: str) -> Iterator[Fence]:
    """Return the blocks of code in a page."""
    for indent, language, body in _FENCE.findall(text):
        yield Fence(language, re.sub(rf"^{indent}", "", body, flags=re.MULTILINE))


def prose(text: str) -> str:
    """Return a page without its blocks of code."""
    return _FENCE.sub("", text)


def spans(text: str) -> Iterator[str]:
    """Return what is set as code within the prose of a page, broken lines joined."""
    for _ticks, code in _SPAN.findall(prose(text)):
        yield " ".join(code.split())


def links(text: str) -> list[str]:
    """Return the targets of a page's links."""
    return _LINK.findall(_SPAN.sub("", prose(text)))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as renderers of Markdown make them."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in _HEADING.findall(prose(text))
    }


def tables(text: str) -> Iterator[list[list[str]]]:
    """Return each table of a page as rows of cells, the heading first."""
    rows: list[list[str]] = []
    for line in [*prose(text).splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            rows.append([cell.replace("\\|", "|").strip() for cell in cells])
        elif rows:
            yield [row for row in rows if set("".join(row)) - set("-: ")]
            rows = []


def section(text: str, heading: str) -> str:
    """Return what stands below *heading* ("## Name"), up to the next of its level."""
    level = heading.partition(" ")[0]
    _, found, rest = f"\n{text}".partition(f"\n{heading}\n")
    assert found, f"no heading {heading!r}"
    return re.split(rf"^{level} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


# -- commands ------------------------------------------------------------------------------


def commands(text: str) -> Iterator[str]:
    """Return every ``kvmi-libvirt`` command line of a page, in blocks of sh and in prose."""
    for fence in fences(text):
        if fence.language == "sh":
            yield from (line for line in fence.body.splitlines() if _names_us(line))
    for span in spans(text):
        # In prose a verb alone is its name, not a command.
        if _names_us(span) and len(span.split()) > 2:
            yield span


def _names_us(line: str) -> bool:
    return re.match(rf"(sudo |\.venv/bin/|\$ )*{PROG} [-\w]", line) is not None


def parse_command(line: str) -> argparse.Namespace:
    """Return what the verb's own parser makes of a command line; SystemExit if nothing."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    while not words[0].endswith(PROG):
        del words[0]
    del words[0]
    ends = [number for number, word in enumerate(words) if set(word) <= set("|&;<>()")]
    words = words[: ends[0]] if ends else words
    while words[0].startswith("-"):
        del words[: 2 if words[0] in ("-c", "--connect") else 1]
        if not words:  # --version and the like
            return argparse.Namespace()
    verb = words.pop(0)
    assert verb in VERBS, f"no verb {verb!r}"
    parser = argparse.ArgumentParser(prog=f"{PROG} {verb}", allow_abbrev=False)
    importlib.import_module(f"kvmi_libvirt.cli.{verb}").add_arguments(parser)
    parse = parser.parse_intermixed_args if verb in ("allow", "deny") else parser.parse_args
    return parse(words)


def make_targets() -> set[str]:
    """Return what ``make`` can be asked for."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+):", text, re.MULTILINE))


# -- messages ------------------------------------------------------------------------------


def quoted_messages(text: str) -> Iterator[str]:
    """Return the messages that a page quotes as ours."""
    for fence in fences(text):
        if fence.language == "message":
            yield from fence.body.splitlines()
    for table in tables(text):
        if table[0][0] == "message":
            for row in table[1:]:
                yield from (code for _ticks, code in _SPAN.findall(row[0]))


def is_said(message: str) -> bool:
    """Say whether a message stands in our sources, with something to fill in at each placeholder.

    Everything else must be literally there, in one string.
    """
    pattern = _pattern(message)
    return any(pattern in template for template in _templates())


def _pattern(text: str) -> str:
    # Some messages show placeholders themselves, as in "--policy FILE".
    return re.sub(f"{_STANDS_FOR}+", _STANDS_FOR, _PLACEHOLDER.sub(_STANDS_FOR, text))


@functools.cache
def _templates() -> frozenset[str]:
    # Strings of the sources, what is filled in replaced by one character.
    files = [
        *(ROOT / "kvmi_libvirt").rglob("*.py"),
        ROOT / "hooks" / "qemu.d" / "50-kvmi-libvirt",
        ROOT / "hooks" / "proxmox" / "kvmi-hookscript",
    ]
    found: set[str] = set()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) not in documentation and isinstance(node, ast.expr):
                found.add(_pattern(_template(node)))
    return frozenset(template for template in found if len(template) > 1)


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _FORMAT.sub(_STANDS_FOR, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return _STANDS_FOR


# -- what the doctor checks ------------------------------------------------------------------


class DoctorCheck(NamedTuple):
    """A check of ``kvmi-libvirt doctor``."""

    name: str
    title: str


def doctor_checks() -> set[DoctorCheck]:
    """Return the checks that doctor's sources make, placeholders in their titles as "..."."""
    found = set()
    for file in (ROOT / "kvmi_libvirt" / "doctor").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in ("Check", "_check"):
                words = [_template(argument) for argument in node.args]
                name, title = words[-2:] if node.func.id == "_check" else words[:2]
                if name != _STANDS_FOR:
                    found.add(DoctorCheck(name, title.replace(_STANDS_FOR, "...")))
    return found


# -- tests and files -------------------------------------------------------------------------


def tests_in(path: Path) -> set[str]:
    """Return the tests in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def repository_paths(codes: Sequence[str]) -> Iterator[str]:
    """Return those of *codes* that name a file or directory of the source tree."""
    places = {path.name for path in ROOT.iterdir() if path.is_dir()} - {".git", ".venv"}
    for code in codes:
        place, slash, _ = code.partition("/")
        if slash and place in places and re.fullmatch(r"[\w.*/-]+(::\w+)?", code):
            yield code
