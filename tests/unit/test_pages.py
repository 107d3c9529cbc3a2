# SPDX-License-Identifier: Apache-2.0
"""The commands that README.md and the manual pages print: none is forgotten, each in its place.

They are run by tests/live/test_printed_commands.py, and those of the quick start in a clean
Debian by ``make test-packages``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import pages
import pytest
import walkthrough
from container import ContainerError
from pages import Command
from printed import BY_CI, NOT_RUN

from kvmi_libvirt.cli import VERBS
from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.installation import AGENT_UNIT
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.profile import SHIPPED
from kvmi_libvirt.snippets import HOOKSCRIPT_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = pages.ROOT
PLACES: Final = re.findall(r"^@([\w-]+)@$", walkthrough.TEMPLATE.read_text(), re.MULTILINE)


def all_commands() -> Iterator[Command]:
    for block in pages.readme_blocks():
        yield from block.commands
    for page in sorted(pages.MAN.glob("*.[1-8]")):
        yield from pages.man_commands(page)


# -- what is read ------------------------------------------------------------------------------


def test_a_command_is_read_as_a_reader_copies_it() -> None:
    block = "# Only there:\na  b   # exit 6: why\n\nc \\\n    d\ncat >x <<'EOF'\n# e\nEOF\nf '#g'\n"

    assert list(pages.commands(block)) == [
        Command("a  b", 6),
        Command("c \\\n    d"),
        Command("cat >x <<'EOF'\n# e\nEOF"),
        Command("f '#g'"),
    ]


def test_every_block_of_commands_is_read() -> None:
    text = pages.README.read_text(encoding="utf-8")

    assert len(pages.readme_blocks()) == text.count("\n```sh\n") > 10
    named = [block.name for block in pages.readme_blocks() if block.name]
    assert len(named) == text.count("<!-- walkthrough: ")
    for page in pages.MAN.glob("*.[1-8]"):
        kinds = [bool(example.lstrip().startswith("<")) for example in pages.man_examples(page)]
        assert len(kinds) == page.read_text(encoding="utf-8").count("\n.EX\n")


# -- what is run -------------------------------------------------------------------------------


def test_what_is_not_run_is_still_printed() -> None:
    printed = [command.text for command in all_commands()]

    for text, reason in NOT_RUN.items():
        assert text in printed, f"not printed any more: {text} ({reason})"


def test_what_is_not_run_names_what_there_is() -> None:
    programs = {text.split()[0] for text in NOT_RUN}
    unit = (ROOT / "packaging" / "systemd" / AGENT_UNIT).read_text(encoding="utf-8")

    assert programs == {"systemctl", "journalctl", "qm"}
    for text, reason in NOT_RUN.items():
        assert AGENT_UNIT.removesuffix(".service") in text or HOOKSCRIPT_NAME in text
        for path in re.findall(r"tests/[\w/]+\.py", reason):
            assert (ROOT / path).exists(), path
    assert "\nExecReload=" in unit
    assert "\n[Install]\n" in unit


def test_ci_runs_what_it_is_said_to_run() -> None:
    first = pages.readme_blocks()[0]
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")

    assert [command.text for command in first.commands] == list(BY_CI)
    for text in (*BY_CI, "make test-packages"):
        assert f"\nstep {text}\n" in steps


# -- the walkthrough ---------------------------------------------------------------------------


def test_every_marked_block_has_its_place_and_every_place_its_block() -> None:
    names = [str(block.name) for block in walkthrough.walkthrough_blocks()]

    assert [place for place in PLACES if place != "second-terminal"] == names
    assert PLACES.index("second-terminal") > PLACES.index(walkthrough.SECOND_TERMINAL)


def test_the_walkthroughs_commands_are_the_readmes() -> None:
    text = walkthrough.PAGE.read_text(encoding="utf-8")
    consoles = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = walkthrough.walkthrough_blocks()

    assert len(consoles) == len(blocks)
    for console, block in zip(consoles, blocks, strict=True):
        after = console
        for command in block.commands:
            before, found, after = after.partition(f"# {command.text}\n")
            assert found, f"next: make walkthrough; not there: {command.text}"
            assert not re.search(r"^# ", before, re.MULTILINE), before
        assert not re.search(r"^# ", after, re.MULTILINE), f"next: make walkthrough; {after}"


def test_the_walkthrough_is_made_from_its_template() -> None:
    template = walkthrough.TEMPLATE.read_text(encoding="utf-8")
    page = walkthrough.PAGE.read_text(encoding="utf-8")
    prose = re.sub(r"^```(?:console|text)\n.*?^```\n", "", page, flags=re.MULTILINE | re.DOTALL)

    said = re.sub(r"^@[\w-]+@\n", "", template, flags=re.MULTILINE)
    assert re.sub(r"\n+", "\n", prose) == re.sub(r"\n+", "\n", said), "next: make walkthrough"


def test_the_walkthrough_shows_a_refusal_and_a_hooked_vm() -> None:
    text = walkthrough.PAGE.read_text(encoding="utf-8")
    first_fail = re.search(r"^.* : FAIL .*$", text, re.MULTILINE)

    assert first_fail is not None
    assert "no tool listens on /run/kvmi/try.sock" in first_fail[0]
    assert "state:     hooked" in text
    assert re.search(r"^KVMI_VM_READ_PHYSICAL +allowed$", text, re.MULTILINE)
    assert re.search(r"^KVMI_VM_WRITE_PHYSICAL +denied$", text, re.MULTILINE)
    assert "kvmi-try stays hooked" in text


def test_what_varies_is_masked() -> None:
    one = (
        "pid:       77\nprocess 5 of root\n2026-11-25 23:30:59,478 kvmi-libvirt[2384]: held 3 us\n"
        "since:     2026-11-25T23:31:01Z\nuuid: 7764d338-6b26-4da7-ae65-981fbcc33d7f  "
    )
    other = (
        "pid:       1\nprocess 4711 of root\n2027-01-02 00:00:00,000 kvmi-libvirt[1]: held 10 us\n"
        "since:     2027-01-02T00:00:00Z\nuuid: 00000000-6b26-4da7-ae65-981fbcc33d7f"
    )

    assert walkthrough.masked(one) == walkthrough.masked(other) != one


def test_what_differs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    page = walkthrough.PAGE.read_text(encoding="utf-8")
    machine = "  KVMI: Checking /dev/kvm : PASS (root:kvm 0660, open to libvirt-qemu)"

    def verify(now: str) -> None:
        monkeypatch.setattr(walkthrough, "transcript", lambda *_: now)
        walkthrough.verify(None, None)  # type: ignore[arg-type] # of no use to the stand-in

    verify(page)
    verify(f"{page}{machine}\n")
    verify(page.replace("version 9.0.0", "version 9.0.1"))
    with pytest.raises(ContainerError, match="next: make walkthrough"):
        verify(page.replace("KVMI_VM_WRITE_PHYSICAL        denied", "KVMI_VM_WRITE_PHYSICAL  ok"))


def test_a_block_without_a_place_is_refused() -> None:
    with pytest.raises(ContainerError, match="has not one line @other@"):
        walkthrough.filled_in("\n@one@\n", "other", "text")
    assert walkthrough.filled_in("\n@one@\n", "one", "text\n") == "\ntext\n"


# -- what the README lists ---------------------------------------------------------------------


def test_the_readme_has_every_verb_exit_code_group_and_profile() -> None:
    text = pages.README.read_text(encoding="utf-8")
    table = text.partition("\n| verb | does |\n")[2].partition("\n\n")[0]
    told = re.findall(r"`([a-z]+)[^`]*`", "\n".join(row.split("|")[1] for row in table.split("\n")))
    codes = re.findall(r"\b(\d)\s\w", text.partition("Exit codes: ")[2].partition(".")[0])

    assert set(told) == set(VERBS)
    assert sorted(map(int, codes)) == sorted(ExitCode)
    for name in (*GROUPS, *SHIPPED):
        assert f"`{name}`" in text


def test_the_readme_links_to_every_page() -> None:
    text = pages.README.read_text(encoding="utf-8")

    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text
