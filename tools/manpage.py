# SPDX-License-Identifier: Apache-2.0
"""The verbs' part of kvmi-libvirt(1), made from their argument parsers.

The page's source holds everything else, and for each verb what its options do not
say: the lines after ``.\\" verb NAME``.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from verbs import Argument, Verb

_WIDTH: Final = 68
_PLACE: Final = '.\\" verbs\n'
_PROSE: Final = re.compile(r'^\.\\" verb (\S+)\n(.*?)(?=^\.\\" (?:verb |end))', re.M | re.S)
_END: Final = '.\\" end\n'
_NOTE: Final = '.\\" Made by "make generated" from kvmi-libvirt.1.in: change that instead.\n'


def page(source: str, all_verbs: Sequence[Verb]) -> str:
    """Return the page: *source* with a section for each verb in the place for them."""
    head, _, rest = source.partition(_PLACE)
    described, _, tail = rest.partition(_END)
    prose = dict(_PROSE.findall(described + _END))
    sections = "".join(_section(verb, prose.get(verb.name, "")) for verb in all_verbs)
    first_line, _, head = head.partition("\n")
    return f"{first_line}\n{_NOTE}{head}{sections}{tail}"


def _section(verb: Verb, prose: str) -> str:
    lines = [f".SS {escaped(verb.name)}", *_synopsis(verb), f"{_sentence(verb.summary)}"]
    if prose:
        lines += [".PP", prose.rstrip("\n")]
    for argument in (*verb.positionals, *verb.options):
        if "--help" in argument.flags:
            continue
        lines += [".TP", _term(argument), _sentence(argument.help)]
    if verb.epilog:
        lines += [".PP", _lines(verb.epilog)]
    return "\n".join(lines) + "\n"


def _synopsis(verb: Verb) -> list[str]:
    if verb.usage:
        _, _, rest = verb.usage.partition(" ")
        return [f".B kvmi\\-libvirt {verb.name}", escaped(rest), ".br"]
    words = []
    for option in verb.options:
        if "--help" in option.flags:
            continue
        text = _bold(option.flags[-1]) + _value(option)
        words.append(text if option.required else f"[{text}]")
    for place in verb.positionals:
        text = f"\\fI{escaped(place.value or '')}\\fP"
        words.append(
            {"?": f"[{text}]", "*": f"[{text}...]", "+": f"{text}..."}.get(place.many, text)
        )
    return [f".B kvmi\\-libvirt {verb.name}", *words, ".br"]


def _term(argument: Argument) -> str:
    if not argument.flags:
        return f"\\fI{escaped(argument.value or '')}\\fP"
    return ", ".join(_bold(flag) for flag in argument.flags) + _value(argument)


def _value(argument: Argument) -> str:
    if argument.value is None:
        return ""
    if argument.choices:
        return " " + "|".join(_bold(choice) for choice in argument.choices)
    return f" \\fI{escaped(argument.value)}\\fP"


def _bold(text: str) -> str:
    return f"\\fB{escaped(text)}\\fP"


def _sentence(text: str) -> str:
    if not text.startswith("libvirt"):  # never at a sentence's start with a capital
        text = text[:1].upper() + text[1:]
    return _lines(text if text.endswith((".", ")")) else f"{text}.")


def _lines(text: str) -> str:
    # A sentence a line, none too long: as those who write such pages do.
    sentences = re.split(r"(?<=[a-z)]\.) (?=[A-Z])", text)
    wrapped = (textwrap.fill(one, _WIDTH, break_on_hyphens=False) for one in sentences)
    return "\n".join(escaped(line) for lines in wrapped for line in lines.splitlines())


def escaped(text: str) -> str:
    """Return *text* so that roff prints it as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    text = text.replace("~", "\\(ti").replace("^", "\\(ha")
    return f"\\&{text}" if text.startswith(".") else text
