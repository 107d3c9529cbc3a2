# SPDX-License-Identifier: Apache-2.0
"""What the schemas in ``xml-schemas/`` accept, once more, in a form that can be explained.

Tables only; a test holds them against the schemas. Pure; imports policy.model.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi.revisions import REVISIONS
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.model import HOST_PATTERN, SECRET_PATTERN

if TYPE_CHECKING:
    from collections.abc import Mapping


class Occurs(enum.Enum):
    """How often a child may stand in its parent."""

    ONCE = "once"
    AT_LEAST_ONCE = "at least once"
    AT_MOST_ONCE = "at most once"
    ANY = "any number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """What one attribute may hold.

    Parameters
        pattern  of the whole value
        write    the right way to write it, for messages
    """

    pattern: re.Pattern[str]
    write: str
    is_required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one element may hold.

    Parameters
        variants   for an element with a compulsory ``type``: the attributes that go
                   with each value of it, beside ``attributes``
        exclusive  of these attributes exactly one must be there
        any_of     of these attributes at least one must be there
        example    the element's attributes, as an example of how to write it
    """

    attributes: Mapping[str, Attribute]
    children: Mapping[str, Occurs] = field(default_factory=lambda: MappingProxyType({}))
    variants: Mapping[str, Mapping[str, Attribute]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    exclusive: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    example: str = ""

    def all_attributes(self) -> Mapping[str, Attribute]:
        """Return the attributes of all variants together."""
        found = dict(self.attributes)
        for variant in self.variants.values():
            found.update(variant)
        return found


def _one_of(name: str, *values: str, is_required: bool = False) -> Attribute:
    write = " or ".join(f'{name}="{value}"' for value in values)
    pattern = re.compile("|".join(map(re.escape, values)))
    return Attribute(pattern=pattern, write=write, is_required=is_required)


def _matching(pattern: str, write: str, *, is_required: bool = False) -> Attribute:
    return Attribute(pattern=re.compile(pattern), write=write, is_required=is_required)


_NONE: Final[Mapping[str, Occurs]] = MappingProxyType({})


def _shape(
    attributes: Mapping[str, Attribute],
    children: Mapping[str, Occurs] = _NONE,
    *,
    exclusive: tuple[str, ...] = (),
    any_of: tuple[str, ...] = (),
    example: str = "",
) -> Shape:
    return Shape(
        attributes=MappingProxyType(dict(attributes)),
        children=MappingProxyType(dict(children)),
        exclusive=exclusive,
        any_of=any_of,
        example=example,
    )


def _required(attribute: Attribute) -> Attribute:
    return Attribute(pattern=attribute.pattern, write=attribute.write, is_required=True)


_MODE: Final = _one_of("mode", "required", "optional")
_EARLY: Final = _one_of("early", "yes", "no")
_DEFAULT: Final = _one_of("default", "allow", "deny")
_NAME: Final = _matching(
    r"[A-Za-z0-9_]{1,64}", "name= with one of the names that 'kvmi-libvirt names' lists"
)
_GROUP: Final = _matching(r"[A-Za-z0-9-]{1,64}", f"group= with one of {', '.join(GROUPS)}")
_PROFILE: Final = Attribute(
    pattern=SECRET_PATTERN,
    write="profile= with a name that 'kvmi-libvirt names' lists, or a file name in profiles.d",
)
_PATH: Final = _matching(
    r"/[^\n\r]+", 'an absolute path such as path="/run/kvmi/NAME.sock"', is_required=True
)
_U32: Final = r"0|[1-9][0-9]{0,9}"
_CID: Final = _matching(_U32, "cid= with the context id of the tool's VM, 2 for this host")
_VSOCK_PORT: Final = _matching(_U32, "port= with a number below 4294967295")
_TCP_PORT: Final = _matching(r"[1-9][0-9]{0,4}", "port= with a number from 1 to 65535")
_HOST: Final = Attribute(
    pattern=HOST_PATTERN, write="host= with a name or an address, without brackets"
)


def _seconds(pattern: str, last: int, *, is_required: bool = True) -> Attribute:
    write = f"timeout= with whole seconds from 1 to {last}"
    return _matching(pattern, write, is_required=is_required)


_RULES: Final = _shape({"default": _DEFAULT}, {"allow": Occurs.ANY, "deny": Occurs.ANY})
_INNER: Final = MappingProxyType(
    {
        "source": Occurs.ONCE,
        "secret": Occurs.AT_MOST_ONCE,
        "handshake": Occurs.AT_MOST_ONCE,
        "unhook": Occurs.AT_MOST_ONCE,
        "commands": Occurs.AT_MOST_ONCE,
        "events": Occurs.AT_MOST_ONCE,
    }
)
_BOTH_RULES: Final = MappingProxyType(
    {"commands": Occurs.AT_MOST_ONCE, "events": Occurs.AT_MOST_ONCE}
)

SHAPES: Final[Mapping[str, Shape]] = MappingProxyType(
    {
        "introspection": _shape({"mode": _MODE, "profile": _PROFILE, "early": _EARLY}, _INNER),
        "source": Shape(
            attributes=MappingProxyType(
                {"type": _one_of("type", "unix", "vsock", "tcp", is_required=True)}
            ),
            children=MappingProxyType({"reconnect": Occurs.AT_MOST_ONCE}),
            variants=MappingProxyType(
                {
                    "unix": MappingProxyType({"path": _PATH}),
                    "vsock": MappingProxyType(
                        {"cid": _required(_CID), "port": _required(_VSOCK_PORT)}
                    ),
                    "tcp": MappingProxyType(
                        {"host": _required(_HOST), "port": _required(_TCP_PORT)}
                    ),
                }
            ),
            example=' type="unix" path="/run/kvmi/NAME.sock"',
        ),
        "reconnect": _shape(
            {
                "enabled": _one_of("enabled", "yes", "no", is_required=True),
                "timeout": _seconds(
                    r"[1-9][0-9]{0,2}|[12][0-9]{3}|3[0-5][0-9]{2}|3600", 3600, is_required=False
                ),
            }
        ),
        "secret": _shape(
            {
                "name": Attribute(
                    pattern=SECRET_PATTERN,
                    write="name= with a file name in /etc/kvmi-libvirt/secrets: letters, digits, "
                    ". _ and -, without a path",
                    is_required=True,
                )
            }
        ),
        "handshake": _shape({"timeout": _seconds(r"[1-9]|[12][0-9]|30", 30)}),
        "unhook": _shape({"timeout": _seconds(r"[1-9][0-9]?|[1-5][0-9]{2}|600", 600)}),
        "commands": _RULES,
        "events": _RULES,
        "allow": _shape(
            {"name": _NAME, "group": _GROUP, "optional": _one_of("optional", "yes", "no")},
            exclusive=("name", "group"),
        ),
        "deny": _shape({"name": _NAME, "group": _GROUP}, exclusive=("name", "group")),
    }
)
"""The introspection element and all below it."""

_SELECTORS: Final = MappingProxyType(
    {
        "uuid": _matching(
            r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", "uuid= with the domain's UUID"
        ),
        "name": _matching(r"[^\n\r]+", 'name= with the domain\'s name, or a pattern like "db-*"'),
        "nova-flavor": _matching(r"[^\n\r]+", 'nova-flavor= with a name or a pattern like "m1.*"'),
        "nova-flavor-id": _matching(r"[^\n\r]+", "nova-flavor-id= with the flavor's id"),
        "nova-extra-spec": _matching(r"[^\n\r=]+=[^\n\r]*", 'nova-extra-spec="KEY=VALUE"'),
        "nova-project": _matching(
            r"[0-9A-Fa-f]{32}|[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
            "nova-project= with the project's id, not its name",
        ),
        "proxmox-vmid": _matching(r"[1-9][0-9]{2,8}", "proxmox-vmid= with a number from 100 on"),
    }
)

HOST_SHAPES: Final[Mapping[str, Shape]] = MappingProxyType(
    {
        "host-policy": _shape(
            {},
            {
                "kernel": Occurs.AT_MOST_ONCE,
                "sockets": Occurs.AT_MOST_ONCE,
                "ceiling": Occurs.AT_MOST_ONCE,
                "assign": Occurs.ANY,
            },
        ),
        "kernel": _shape(
            {"abi": _one_of("abi", *(abi.name for abi in REVISIONS), is_required=True)}
        ),
        "sockets": _shape({}, {"unix": Occurs.ANY, "vsock": Occurs.ANY, "tcp": Occurs.ANY}),
        "unix": _shape(
            {
                "path": _matching(
                    r"/[^\n\r]+", 'a path or pattern such as path="/run/kvmi/*"', is_required=True
                )
            }
        ),
        "vsock": _shape({"cid": _CID, "port": _VSOCK_PORT}),
        "tcp": _shape({"host": _required(_HOST), "port": _TCP_PORT}),
        "ceiling": _shape(
            {"excess": _one_of("excess", "refuse", "trim"), "profile": _PROFILE}, _BOTH_RULES
        ),
        "assign": _shape(
            {"mode": _MODE, "profile": _PROFILE, "early": _EARLY},
            {"match": Occurs.AT_LEAST_ONCE, **_INNER},
        ),
        "match": _shape(_SELECTORS, any_of=tuple(_SELECTORS), example=' name="NAME"'),
        "profile": _shape(
            {
                "name": _required(
                    Attribute(
                        pattern=SECRET_PATTERN, write="name= with the file's name before .xml"
                    )
                ),
                "title": _matching(r"[^\n\r]{1,200}", "title= with one line of text"),
            },
            _BOTH_RULES,
        ),
    }
)
"""What a host policy, or a profile, holds besides."""

ALL_SHAPES: Final[Mapping[str, Shape]] = MappingProxyType({**SHAPES, **HOST_SHAPES})
