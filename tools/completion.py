# SPDX-License-Identifier: Apache-2.0
"""Completion for bash, zsh and fish, made from the verbs' argument parsers.

The scripts ask virsh for domains, quietly and for two seconds at most, and need
nothing else: what has a fixed set of values stands in them.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from verbs import GLOBAL_OPTIONS, Argument, Verb

from kvmi_libvirt.emulator.faults import FAULTS
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.profile import SHIPPED
from kvmi_libvirt.policy.rules import COMMANDS, EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "DOMAIN": "domain",
        "FILE|DOMAIN": "file-or-domain",
        "FILE": "file",
        "FILE.jsonl": "file",
        "DIR": "directory",
        "DIRECTORY": "directory",
        "URI": "uri",
        "COMMAND": "command",
        "unix:PATH": "socket",
        "PID": "nothing",
        "S": "nothing",
        "SECONDS": "nothing",
    }
)
"""What a value is, by the word that stands for it in the help."""

_OF_RUNNING_DOMAINS: Final = ("hook", "unhook", "apply", "allow", "deny")

KINDS_OF: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        **{(verb, "domain"): "running-domain" for verb in _OF_RUNNING_DOMAINS},
        ("start", "domain"): "stopped-domain",
        ("names", "names"): "name",
        ("allow", "names"): "right",
        ("deny", "names"): "right",
        ("emulate", "fault"): "fault",
    }
)
"""The same, by verb and argument, where the word alone does not tell."""

RIGHTS: Final = (*sorted(COMMANDS.names), *sorted(EVENTS.names), *GROUPS)
URIS: Final = ("qemu:///system", "qemu:///session", "qemu+ssh://", "test:///default")

_TEMPLATES: Final = Path(__file__).resolve().parent / "templates"


class UnknownValue(Exception):
    """An argument whose values nobody has described: add it to KINDS or KINDS_OF."""


def kind_of(verb: Verb, argument: Argument) -> str:
    """Return what the values of *argument* are; "choices" when it lists them itself."""
    if argument.choices:
        return "choices"
    found = KINDS_OF.get((verb.name, argument.name)) or KINDS.get(argument.value or "")
    if found is None:
        raise UnknownValue(f"{verb.name}: {argument.value} ({argument.name})")
    return found


def _words(words: Iterable[str]) -> str:
    return " ".join(words)


def _filled(template: str, **parts: str) -> str:
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    common = {
        "PROFILES": _words(SHIPPED),
        "URIS": _words(URIS),
        "FAULTS": _words(FAULTS),
        "RIGHTS": _words(RIGHTS),
        "ZSH_URIS": _ZSH_ACTIONS["uri"],
    }
    for name, value in {**common, **parts}.items():
        text = text.replace(f"@{name}@", value)
    return text


# -- bash --------------------------------------------------------------------------------


def bash(all_verbs: Sequence[Verb]) -> str:
    """Return the completion script for bash."""
    return _filled(
        "completion.bash",
        VERBS=_words(verb.name for verb in all_verbs),
        GLOBAL=_words(flag for flag, _ in GLOBAL_OPTIONS),
        CASES="\n".join(_bash_case(verb) for verb in all_verbs),
    )


def _bash_kind(verb: Verb, argument: Argument) -> str:
    kind = kind_of(verb, argument)
    return f"choices:{' '.join(argument.choices)}" if kind == "choices" else kind


def _bash_place(verb: Verb, argument: Argument) -> str:
    kind = _bash_kind(verb, argument)
    if kind == "command":  # its own arguments follow
        return "command;file+"
    return f"{kind}+" if argument.many in "*+" else kind


def _bash_case(verb: Verb) -> str:
    flags = _words(flag for option in verb.options for flag in option.flags)
    valued = [option for option in verb.options if option.value is not None]
    places = ";".join(_bash_place(verb, argument) for argument in verb.positionals)
    lines = [
        f"\t{verb.name})",
        f'\t\toptions="{flags}"',
        f'\t\tvalued="{_words(flag for option in valued for flag in option.flags)}"',
        f'\t\tplaces="{places}"',
    ]
    if valued:
        lines.append("\t\tcase $prev in")
        for option in valued:
            pattern = " | ".join(option.flags)
            lines.append(f'\t\t{pattern}) value="{_bash_kind(verb, option)}" ;;')
        lines.append("\t\tesac")
    lines.append("\t\t;;")
    return "\n".join(lines)


# -- zsh ---------------------------------------------------------------------------------

_ZSH_ACTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "domain": "_kvmi_libvirt_domains",
        "running-domain": "_kvmi_libvirt_running",
        "stopped-domain": "_kvmi_libvirt_stopped",
        "file": "_files",
        "file-or-domain": "_kvmi_libvirt_files_or_domains",
        "directory": "_directories",
        "uri": f"({' '.join(uri.replace(':', chr(92) + ':') for uri in URIS)})",
        "command": "_normal",
        "socket": r"(unix\:/run/kvmi/)",
        "fault": f"({' '.join(FAULTS)})",
        "right": "_kvmi_libvirt_rights",
        "name": "_kvmi_libvirt_names",
        "nothing": " ",
    }
)


def zsh(all_verbs: Sequence[Verb]) -> str:
    """Return the completion script for zsh."""
    summaries = (_zsh_quoted(f"{verb.name}:{verb.summary}") for verb in all_verbs)
    globals_ = (_zsh_quoted(f"({flag}){flag}[{what}]") for flag, what in GLOBAL_OPTIONS)
    return _filled(
        "completion.zsh",
        VERBS="\n".join(f"    {line}" for line in summaries),
        GLOBAL="\n".join(f"    {line} \\" for line in globals_),
        CASES="\n".join(_zsh_case(verb) for verb in all_verbs),
    )


def _zsh_case(verb: Verb) -> str:
    specs = []
    for option in verb.options:
        what = _zsh_text(option.help)
        value = "" if option.value is None else f":{_zsh_text(option.value)}:"
        if value:
            value += _zsh_action(verb, option)
        flags = " ".join(option.flags)
        for flag in option.flags:
            joint = "=" if value and flag.startswith("--") else ""
            specs.append(_zsh_quoted(f"({flags}){flag}{joint}[{what}]{value}"))
    for number, place in enumerate(verb.positionals, start=1):
        where = "*" if place.many in "*+" else str(number)
        optional = ":" if place.many == "?" else ""
        action = _zsh_action(verb, place)
        specs.append(_zsh_quoted(f"{where}:{optional}{_zsh_text(place.value or '')}:{action}"))
    joined = " \\\n        ".join(specs)
    return f"    {verb.name})\n      _arguments -s \\\n        {joined}\n      ;;"


def _zsh_action(verb: Verb, argument: Argument) -> str:
    kind = kind_of(verb, argument)
    return f"({' '.join(argument.choices)})" if kind == "choices" else _ZSH_ACTIONS[kind]


def _zsh_text(text: str) -> str:
    for special in "\\[]:":
        text = text.replace(special, f"\\{special}")
    return text


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# -- fish --------------------------------------------------------------------------------

_FISH_VALUES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "domain": "(__kvmi_libvirt_domains --all)",
        "running-domain": "(__kvmi_libvirt_domains)",
        "stopped-domain": "(__kvmi_libvirt_domains --inactive)",
        "file": "",
        "file-or-domain": "(__kvmi_libvirt_domains --all)",
        "directory": "(__fish_complete_directories)",
        "uri": _words(URIS),
        "command": "(complete -C (commandline -ct))",
        "socket": "unix:/run/kvmi/",
        "fault": _words(FAULTS),
        "right": _words(RIGHTS),
        "name": f"{_words(RIGHTS)} (__kvmi_libvirt_profiles)",
        "nothing": "",
    }
)
_FISH_FILES: Final = ("file", "file-or-domain")


def fish(all_verbs: Sequence[Verb]) -> str:
    """Return the completion script for fish."""
    lines = [_filled("completion.fish")]
    no_verb = "-n 'not __kvmi_libvirt_verb'"
    for flag, what in GLOBAL_OPTIONS:
        lines.append(f"complete -c kvmi-libvirt {no_verb} -l {flag[2:]} -d {shlex.quote(what)}")
    for verb in all_verbs:
        summary = shlex.quote(verb.summary)
        lines.append(f"complete -c kvmi-libvirt {no_verb} -a {verb.name} -d {summary}")
    for verb in all_verbs:
        using = f"complete -c kvmi-libvirt -n '__kvmi_libvirt_using {verb.name}'"
        for option in verb.options:
            flags = " ".join(
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                for flag in option.flags
            )
            lines.append(
                f"{using} {flags} -d {_quoted_part(option.help)}{_fish_value(verb, option)}"
            )
        for place in verb.positionals:
            # Fish does not count places: each verb offers all that any of them may be.
            lines.append(f"{using}{_fish_words(verb, place)}")
    return "\n".join(lines) + "\n"


def _fish_value(verb: Verb, option: Argument) -> str:
    if option.value is None:
        return ""
    return f" -r{_fish_words(verb, option)}"


def _fish_words(verb: Verb, argument: Argument) -> str:
    kind = kind_of(verb, argument)
    words = _words(argument.choices) if kind == "choices" else _FISH_VALUES[kind]
    return (f" -a '{words}'" if words else "") + (" -F" if kind in _FISH_FILES else " -f")


def _quoted_part(text: str) -> str:
    return shlex.quote(text.partition(";")[0].partition(":")[0] if len(text) > 80 else text)
