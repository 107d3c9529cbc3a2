# SPDX-License-Identifier: Apache-2.0
"""The manual pages: clean for two formatters, and complete for what they describe."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

import pages
import pytest
from lxml import etree
from support import require_tool

from kvmi_libvirt.agent.settings import parse_settings
from kvmi_libvirt.errors import ExitCode, UsageError
from kvmi_libvirt.policy.document import parse
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.host import HostPolicy
from kvmi_libvirt.policy.lint import lint
from kvmi_libvirt.policy.profile import SHIPPED

ROOT: Final = Path(__file__).resolve().parents[2]
MAN: Final = ROOT / "packaging" / "man"
PAGES: Final = sorted(MAN.glob("*.[1-8]"))
SOURCES: Final = [
    *(ROOT / "kvmi_libvirt").rglob("*.py"),
    *(path for path in (ROOT / "hooks").rglob("*") if path.is_file()),
    *(path for path in (ROOT / "scripts").iterdir() if path.is_file()),
]
SCHEMAS: Final = sorted((ROOT / "xml-schemas").glob("*.rng"))
RNG: Final = "{http://relaxng.org/ns/structure/1.0}"


def text_of(name: str) -> str:
    """Return a page's source with roff's escapes undone."""
    return pages.man_text(MAN / name)


def test_the_pages_are_those_the_documents_promise() -> None:
    assert [page.name for page in PAGES] == [
        "kvmi-emulated-qemu.1",
        "kvmi-libvirt-agent.8",
        "kvmi-libvirt-policy.5",
        "kvmi-libvirt.1",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_has_nothing_to_warn_of(page: Path) -> None:
    man = require_tool("man", "man-db groff")
    command = [man, "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(page)]
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANROFFSEQ": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert [done.stderr, done.returncode] == ["", 0]
    assert "x trailer" in done.stdout  # it was formatted to its end


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_finds_nothing(page: Path) -> None:
    mandoc = require_tool("mandoc", "mandoc")
    done = subprocess.run(
        [mandoc, "-Tlint", str(page)], capture_output=True, text=True, check=False
    )

    assert [done.stdout, done.returncode] == ["", 0]


def section_of(name: str, heading: str) -> str:
    """Return what stands below a heading of a page, "" where there is none."""
    _, _, rest = text_of(name).partition(f".SH {heading}\n")
    return rest.partition("\n.SH ")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_what_pages_have(page: Path) -> None:
    for heading in ("NAME", "DESCRIPTION", "FILES", "EXAMPLES", "SEE ALSO"):
        assert section_of(page.name, heading), heading
    # The policy's is about files, not a command.
    assert bool(section_of(page.name, "SYNOPSIS")) == (page.suffix != ".5")


def test_the_command_s_page_leads_to_the_others_and_they_to_it() -> None:
    command = MAN / "kvmi-libvirt.1"
    for page in PAGES:
        if page != command:
            for here, there in ((command, page), (page, command)):
                name = f"{there.stem} ({there.suffix[1:]})"

                assert name in section_of(here.name, "SEE ALSO"), f"{here.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_it_names_is_one_of_ours(page: Path) -> None:
    sources = [*SOURCES, *(ROOT / "packaging").rglob("*"), ROOT / "setup.cfg"]
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in sources
        if path.is_file() and path.parent != MAN
    )
    for named in re.findall(r"/(?:etc|run|usr|var)/[\w./-]+", section_of(page.name, "FILES")):
        # A path is made of a directory and a name: the last two parts must be there.
        directory, _, name = named.rstrip("/").removesuffix("/VMID.xml").rpartition("/")
        known = name.replace("emulator-PID", "emulator-")

        assert directory.rpartition("/")[2] in text, named
        assert known.removesuffix(".jsonl") in text, named


def test_every_variable_that_is_read_is_explained_and_no_other() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    read = re.findall(r"""(?:environ|variables)(?:\.get\(|\[)"([A-Z_]+)\"""", code)
    read += re.findall(r"""_VARIABLE: Final = "([A-Z_]+)\"""", code)
    told = "\n".join(section_of(page.name, "ENVIRONMENT") for page in PAGES)
    terms = re.findall(r"^\.TP\n\.BR? (.*)$", told, re.MULTILINE)

    assert {name for term in terms for name in re.findall(r"[A-Z_]{3,}", term)} == set(read)


def test_every_exit_code_is_explained() -> None:
    section = section_of("kvmi-libvirt.1", "EXIT STATUS")
    explained = re.findall(r"^\.TP\n(\d+)$", section, re.MULTILINE)

    assert [int(code) for code in explained] == sorted(ExitCode)


def test_every_element_and_attribute_is_explained() -> None:
    page = text_of("kvmi-libvirt-policy.5")
    missing = []
    for schema in SCHEMAS:
        tree = etree.parse(str(schema))
        for element in tree.iter(f"{RNG}element"):
            if (name := element.get("name")) is not None and f"<{name}" not in page:
                missing.append(f"<{name}>")
        for attribute in tree.iter(f"{RNG}attribute"):
            name = attribute.get("name")
            if name is not None and not re.search(rf"(?<![\w-]){name}(?![\w-])", page):
                missing.append(name)

    assert missing == []


def test_every_group_and_profile_is_explained() -> None:
    terms = re.findall(r"^\.TP\n\.B (\S+)$", text_of("kvmi-libvirt-policy.5"), re.MULTILINE)

    assert set(GROUPS) | set(SHIPPED) <= set(terms)


def test_every_key_of_the_agents_configuration_is_explained() -> None:
    with pytest.raises(UsageError) as refused:
        parse_settings(b"[agent]\nno-such-key = 1\n", source="agent.conf")
    known = str(refused.value).rpartition("known are ")[2].split(", ")
    section = section_of("kvmi-libvirt-agent.8", "CONFIGURATION")
    explained = re.findall(r"^\.TP\n\.B (\S+)$", section, re.MULTILINE)

    assert sorted(explained) == sorted(known)


def test_every_document_in_an_example_is_right() -> None:
    count = 0
    for page in PAGES:
        for example in pages.man_examples(page):
            if not example.lstrip().startswith("<"):
                continue
            count += 1
            text = example
            if "<metadata>" in example:  # of a domain
                text = f"<domain type='kvm'><name>web1</name>{example}</domain>"
            elif "<devices>" in example:
                assert parse(example.encode(), source=page.name).tag == "devices"
                continue
            report = lint(text.encode(), source=page.name, host=HostPolicy())
            assert not report.findings, f"{page.name}: {report.findings}"

    assert count >= 4
