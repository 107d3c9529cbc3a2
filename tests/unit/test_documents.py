# SPDX-License-Identifier: Apache-2.0
"""The pages in docs/ and beside it: what they name exists, and what they quote is said."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import documents
import pytest
import test_imports
from documents import DOCS, ROOT

from kvmi_libvirt.policy.host import HostPolicy
from kvmi_libvirt.policy.lint import lint

if TYPE_CHECKING:
    from pathlib import Path

PAGES: Final = documents.pages()
TROUBLESHOOTING: Final = DOCS / "troubleshooting.md"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in documents.links(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page

        assert target.exists(), link
        if anchor:
            assert anchor in documents.anchors(text_of(target)), link


@each_page
def test_every_file_that_is_named_is_there(page: Path) -> None:
    codes = [*documents.spans(text_of(page)), *documents.links(text_of(page))]
    for path in documents.repository_paths(codes):
        file, _, test = path.partition("::")

        # In a tree that a Debian package is built from, that directory has moved.
        places = (file.rstrip("/"), file.rstrip("/").replace("packaging/debian", "debian"))
        assert any(list(ROOT.glob(place)) for place in places), path
        if test:
            assert test in documents.tests_in(ROOT / file), path


@each_page
def test_every_command_is_one(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in documents.commands(text_of(page)):
        try:
            documents.parse_command(line)
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}", pytrace=False)


@each_page
def test_every_target_of_make_is_one(page: Path) -> None:
    text = text_of(page)
    lines = [*documents.spans(text), *(fence.body for fence in documents.fences(text))]
    asked = {target for line in lines for target in re.findall(r"^make ([a-z-]+)", line, re.M)}

    assert asked <= documents.make_targets()


@pytest.mark.parametrize("name", ["security.md", "troubleshooting.md", "comparison.md"])
def test_every_document_in_these_is_right(name: str) -> None:
    for fence in documents.fences(text_of(DOCS / name)):
        if fence.language == "xml":
            report = lint(fence.body.encode(), source=name, host=HostPolicy())

            assert not report.findings, report.findings


def test_the_index_has_every_page() -> None:
    listed = documents.links(text_of(DOCS / "index.md"))

    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= set(listed)


# -- troubleshooting -------------------------------------------------------------------------


def test_every_message_that_is_quoted_is_said() -> None:
    messages = list(documents.quoted_messages(text_of(TROUBLESHOOTING)))

    assert [message for message in messages if not documents.is_said(message)] == []
    assert len(messages) > 60


@pytest.mark.parametrize(
    "message",
    [
        "no tool listens on PLACE (ENOENT): start the tool",
        "no tool listens on PLACE: start the tool first",
    ],
)
def test_a_message_is_said_when_its_words_are(message: str) -> None:
    assert documents.is_said(message)


@pytest.mark.parametrize(
    "message",
    [
        "no tool listens at PLACE (ENOENT): start the tool first",  # another word
        "no tool listens on /run/kvmi/tool.sock (ENOENT): start the tool first",  # filled in
        "no tool WHY on PLACE (ENOENT): start the tool first",  # nothing is filled in there
        "Hook one running VM, from its policy to the recorded state.",  # documentation
    ],
)
def test_a_message_is_not_said_when_one_of_its_words_is_not(message: str) -> None:
    assert not documents.is_said(message)


def test_the_table_of_checks_is_the_doctors() -> None:
    (table,) = (
        table for table in documents.tables(text_of(TROUBLESHOOTING)) if table[0][0] == "check"
    )

    told = {documents.DoctorCheck(row[0].strip("`"), row[1]) for row in table[1:]}
    assert told == documents.doctor_checks()


@each_page
def test_every_check_that_is_named_is_the_doctors(page: Path) -> None:
    known = {check.name for check in documents.doctor_checks()}
    named = re.findall(r"\b[Cc]hecks? `([a-z-]+)`", documents.prose(text_of(page)))

    assert set(named) <= known


def test_every_errno_that_has_an_explanation_is_in_the_page() -> None:
    section = documents.section(text_of(TROUBLESHOOTING), "## Errors of the kernel")
    source = (ROOT / "kvmi_libvirt" / "session.py").read_text(encoding="utf-8")

    for name in re.findall(r"^ +errno\.(E\w+): \"", source, re.MULTILINE):
        assert f"`{name}`" in section, name


# -- the security model ------------------------------------------------------------------------


def test_every_threat_that_is_answered_names_the_test_that_shows_it() -> None:
    text = text_of(DOCS / "security.md")
    (table,) = (table for table in documents.tables(text) if table[0][0] == "threat")

    assert table[0] == ["threat", "what stops it", "where", "shown by"]
    for threat, _answer, where, shown in table[1:]:
        assert re.search(r"`tests/[\w/]+\.py(::\w+)?`", shown), threat
        assert re.search(r"`[\w./-]+`", where), threat
    assert len(table) > 20


# -- the architecture --------------------------------------------------------------------------


def layers() -> list[list[str]]:
    section = documents.section(text_of(DOCS / "architecture.md"), "## Modules")
    (table,) = documents.tables(section)
    return [re.findall(r"`(\w+)`", row[0]) for row in table[1:]]


def test_the_architecture_names_every_module() -> None:
    package = ROOT / "kvmi_libvirt"
    modules = [
        path.stem
        for path in package.iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or path.is_dir())
    ]

    assert sorted(name for layer in layers() for name in layer) == sorted(modules)


def test_a_module_imports_only_what_stands_above_it_or_beside_it() -> None:
    level = {name: number for number, layer in enumerate(layers()) for name in layer}
    for module in test_imports.modules():
        top = module.partition(".")[0]
        for found in test_imports.own_imports(module):
            target = found.target.partition(".")[0]
            if top and target and target != top:
                assert level[target] <= level[top], f"{module} imports {found.target}"
