# SPDX-License-Identifier: Apache-2.0
"""The commands that README.md and the manual pages print, as a reader copies them.

A block of the README whose commands the walkthrough runs has a comment in front,
``<!-- walkthrough: NAME -->``. A command whose comment says ``exit N`` ends with that
code, every other one with 0.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
README: Final = ROOT / "README.md"
MAN: Final = ROOT / "packaging" / "man"

_BLOCK: Final = re.compile(
    r"^(?:<!-- walkthrough: (?P<name>[\w-]+) -->\n)?```sh\n(?P<body>.*?)^```$", re.M | re.S
)
_EXAMPLE: Final = re.compile(r"^\.EX\n(.*?)^\.EE$", re.M | re.S)
_HERE_DOCUMENT: Final = re.compile(r"<<-?'?(\w+)'?")
_COMMENT: Final = re.compile(r"\s+#(?P<comment>[^'\"]*)$")
_EXIT: Final = re.compile(r"\bexit (\d+)\b")


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Parameters
        text  without the comment behind it; of several lines where it is continued
        code  what the page says it ends with
    """

    text: str
    code: int = 0


@dataclass(frozen=True)
class Block:
    """What a reader would copy at once.

    Parameters
        name  by which the walkthrough calls it; None: it is not the walkthrough's
    """

    name: str | None
    commands: tuple[Command, ...]


def readme_blocks() -> list[Block]:
    """Return the README's blocks of commands, in order."""
    text = README.read_text(encoding="utf-8")
    return [Block(found["name"], tuple(commands(found["body"]))) for found in _BLOCK.finditer(text)]


def man_text(page: Path) -> str:
    """Return a manual page's source with roff's escapes undone."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"\\f[BIPR]|\\&", "", text).replace("\\-", "-")


def man_examples(page: Path) -> list[str]:
    """Return a manual page's literal blocks, as a reader copies them: commands or XML."""
    return _EXAMPLE.findall(man_text(page).replace("\\e", "\\"))


def man_commands(page: Path) -> list[Command]:
    """Return the commands that a manual page prints, in order."""
    found: list[Command] = []
    for example in man_examples(page):
        if not example.lstrip().startswith("<"):
            found += commands(example)
    return found


def commands(block: str) -> Iterator[Command]:
    """Return the commands of a block: continued lines joined, comments taken off."""
    lines = iter(block.splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        comment = _COMMENT.search(line)
        code = _EXIT.search(comment["comment"]) if comment else None
        text = line[: comment.start()] if comment else line
        here = _HERE_DOCUMENT.search(text)
        is_whole = here is None and not text.endswith("\\")
        while not is_whole:
            more = next(lines)
            text += f"\n{more}"
            is_whole = more == here[1] if here else not more.endswith("\\")
        yield Command(text, int(code[1]) if code else 0)


def program(command: Command) -> str:
    """Return the program that a command begins with."""
    return shlex.split(command.text.partition("\n")[0].rstrip("\\"))[0]
