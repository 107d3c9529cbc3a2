# SPDX-License-Identifier: Apache-2.0
"""What tools can check of the sources, and what every file must and must not hold.

A tool that is not installed skips its test; in CI (``CI=true``) that is a failure.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).resolve().parents[2]
SCHEMAS: Final = ROOT / "xml-schemas"
HOOKS: Final = ROOT / "hooks"

LICENCE: Final = "SPDX-License-Identifier: Apache-2.0"
LICENCE_WITHIN_LINES: Final = 5
WITHOUT_COMMENTS: Final = frozenset({".json", ".jsonl", ".md", ".txt", ".Debian", ""})
"""Suffixes of files that cannot, or need not, carry the line: data and prose."""

SPELLINGS_WE_MEAN: Final = ("keypair", "readby", "requird", "re-used", "re-uses")

WORKPLACES: Final = re.compile(
    # Spelt so that this file does not hold them itself.
    r"(?<![\w.~-])/(?:[w]ork|[r]oot|[h]ome/\w+)/|\.[p]yenv\b|/bash_[j]obs"
)


GENERATED: Final = frozenset(
    {
        *(
            ".git",
            ".venv",
            ".venv-nova",
            "__pycache__",
            ".mypy_cache",
            ".pytest_cache",
            ".ruff_cache",
        ),
        *(".hypothesis", "kvmi_libvirt.egg-info", "build", "dist"),
    }
)
"""Directories that are never under version control; .gitignore has them too."""


def run(tool: str, *arguments: str | Path) -> None:
    """Run *tool*, of our own environment if it has it; fail with what it printed."""
    beside = Path(sys.executable).parent / tool
    program = str(beside) if beside.exists() else shutil.which(tool)
    if program is None:
        reason = f"{tool} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and CI=true", pytrace=False)
        pytest.skip(reason)
    done = subprocess.run(
        [program, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{tool}:\n{done.stdout.decode(errors='replace')}", pytrace=False)


@functools.cache
def files() -> tuple[Path, ...]:
    """Return every file that is, or is about to be, under version control."""
    listed = subprocess.run(
        ["/bin/sh", "-c", "git ls-files -z --cached --others --exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if listed.returncode == 0:
        names = {os.fsdecode(name) for name in listed.stdout.split(b"\0") if name}
        paths = [ROOT / name for name in sorted(names)]
    else:  # an unpacked archive, or no git here
        paths = sorted(ROOT.rglob("*"))
    return tuple(path for path in paths if path.is_file() and not GENERATED & set(path.parts))


def shebang(path: Path) -> str:
    with path.open("rb") as file:
        first = file.readline(200)
    return first[2:].decode(errors="replace").strip() if first.startswith(b"#!") else ""


def scripts(interpreter: str) -> list[Path]:
    """Return the files that name *interpreter* in their first line."""
    return [path for path in files() if re.search(rf"\b{interpreter}\b", shebang(path))]


def relative(paths: Sequence[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", ".")


def test_ruff_would_format_nothing() -> None:
    run("ruff", "format", "--check", ".")


@pytest.mark.timeout(600)
def test_mypy_finds_nothing() -> None:
    run("mypy")


def test_codespell_finds_nothing() -> None:
    text = [path for path in files() if path.suffix not in (".json", ".jsonl", ".rng")]
    run(
        "codespell",
        f"--ignore-words-list={','.join(SPELLINGS_WE_MEAN)}",
        *(path for path in text if "examples" not in path.parts and path.name != "LICENSE"),
    )


def test_shellcheck_finds_nothing() -> None:
    found = [*scripts("sh"), *scripts("bash"), *ROOT.glob("*.sh")]

    assert ROOT / ".ci" / "run" in found, "the search for shell scripts finds none"
    run("shellcheck", *sorted(set(found)))


@pytest.mark.parametrize("schema", sorted(SCHEMAS.glob("*.rng")), ids=lambda path: path.name)
def test_a_schema_is_well_formed_and_a_schema(schema: Path, tmp_path: Path) -> None:
    # xmllint reads the schema before the document: 3 says the document is not valid
    # by it, 5 that the schema itself is not one.
    document = tmp_path / "other.xml"
    document.write_text("<other/>", encoding="utf-8")
    run("xmllint", "--noout", schema)
    done = subprocess.run(
        ["xmllint", "--noout", "--relaxng", schema, document], capture_output=True, check=False
    )

    assert done.returncode == 3, done.stderr.decode()


def _examples(kind: str) -> Iterator[Path]:
    return (SCHEMAS / "examples" / kind).rglob("*.xml")


def test_every_valid_example_is_well_formed() -> None:
    examples = sorted(_examples("valid"))

    assert examples
    run("xmllint", "--noout", *examples)


def test_every_valid_element_is_of_the_schema() -> None:
    bare = [
        path
        for path in sorted(_examples("valid"))
        if re.search(rb"<(?:\w+:)?introspection\b", path.read_bytes())
        and not re.search(rb"<domain\b", path.read_bytes())
    ]

    assert bare
    run("xmllint", "--noout", "--relaxng", SCHEMAS / "introspection.rng", *bare)


# -- the hook script, which has no suffix that a tool would know --------------------------


def test_the_python_scripts_without_a_suffix_are_checked_too() -> None:
    found = [path for path in scripts(r"python3?") if path.suffix != ".py"]

    assert HOOKS / "qemu.d" / "50-kvmi-libvirt" in found
    # Annotations would be the only thing of theirs that needs an import.
    run("ruff", "check", "--select", "E,W,F,I,B,UP,C4,RUF", *found)
    run("ruff", "format", "--check", *found)


def test_scripts_can_be_executed_and_other_files_cannot() -> None:
    wrong = [
        path
        for path in files()
        if bool(shebang(path)) != os.access(path, os.X_OK) and path.suffix != ".py"
    ]

    assert relative(wrong) == []


# -- what every file must and must not hold ----------------------------------------------


def test_every_source_file_names_its_licence_at_its_top() -> None:
    wrong = []
    for path in files():
        needed = path.suffix not in WITHOUT_COMMENTS or path.name == "Makefile" or shebang(path)
        # Documents of other projects, and examples that a reader shall copy, are as they are.
        if not needed or {"data", "examples"} & set(path.parts) or path.name.startswith("."):
            continue
        with path.open("rb") as file:
            top = b"".join(file.readline() for _ in range(LICENCE_WITHIN_LINES))
        # An empty __init__.py has nothing to license.
        if LICENCE.encode() not in top and path.stat().st_size:
            wrong.append(path)

    assert relative(wrong) == []


def test_no_file_tells_where_it_was_written() -> None:
    wrong = []
    for path in files():
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if match := WORKPLACES.search(line.decode(errors="replace")):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")

    assert wrong == []


@pytest.mark.parametrize(
    ("form", "word", "is_one"),
    [
        ("/{}/main", "work", True),
        ("x=/{}/me/src", "home", True),
        ("~/.{}/shims", "pyenv", True),
        ("'/{}/x'", "root", True),
        ("docs/{}/x", "work", False),
        ("/proc/PID/{}", "root", False),
        ("net{}/", "work", False),
        ("/{}ing", "work", False),
    ],
)
def test_the_search_for_workplaces_finds_them(form: str, word: str, is_one: bool) -> None:
    assert bool(WORKPLACES.search(form.format(word))) == is_one


def test_text_ends_with_one_newline_and_has_no_trailing_space() -> None:
    wrong = []
    for path in files():
        content = path.read_bytes()
        if b"\0" in content or "examples" in path.parts or not content:
            continue
        if not content.endswith(b"\n") or content.endswith(b"\n\n"):
            wrong.append(f"{path.relative_to(ROOT)}: end of file")
        if re.search(rb"[ \t]\n", content) and path.suffix not in (".md", ".patch"):
            wrong.append(f"{path.relative_to(ROOT)}: trailing space")

    assert wrong == []
