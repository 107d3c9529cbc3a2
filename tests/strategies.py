# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies shared by tests, and the way back from a policy to XML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

from hypothesis import strategies as st

from kvmi_libvirt.abi.revisions import REVISIONS
from kvmi_libvirt.policy import rules
from kvmi_libvirt.policy.model import (
    NAMESPACE,
    Mode,
    Policy,
    Rights,
    Source,
    TcpSource,
    UnixSource,
    VsockSource,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATH_PART = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x2FF), min_size=1, max_size=20
).filter(lambda part: part.isprintable() and "/" not in part and part not in (".", ".."))


def paths() -> st.SearchStrategy[str]:
    """Absolute, normalised, and short enough for a unix socket."""
    parts = st.lists(_PATH_PART, min_size=1, max_size=2)
    return parts.map(lambda parts: "/run/kvmi/" + "/".join(parts))


@st.composite
def rights(draw: st.DrawFn, vocabulary: rules.Vocabulary) -> Rights:
    """Any rights that rules can amount to."""
    names = sorted(vocabulary.names - vocabulary.always_allowed)
    if draw(st.booleans()):
        allowed = frozenset(draw(st.sets(st.sampled_from(names))))
        everything = False
    else:
        allowed, everything = frozenset(names), draw(st.booleans())
    optional = frozenset(draw(st.sets(st.sampled_from(sorted(allowed))))) if allowed else allowed
    return Rights(allowed=allowed, optional=optional, everything=everything)


def sources() -> st.SearchStrategy[Source]:
    """Any place a tool can be at."""
    hosts = st.sampled_from(("localhost", "tool.example", "10.0.0.5", "::1", "fe80::a:1"))
    return st.one_of(
        st.builds(UnixSource, path=paths()),
        st.builds(VsockSource, cid=st.integers(1, 0xFFFFFFFE), port=st.integers(0, 0xFFFFFFFE)),
        st.builds(TcpSource, host=hosts, port=st.integers(1, 65535)),
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that an element can express."""
    return Policy(
        mode=draw(st.sampled_from(Mode)),
        source=draw(sources()),
        handshake_timeout_s=float(draw(st.integers(1, 30))),
        unhook_timeout_s=float(draw(st.integers(1, 600))),
        reconnect_s=draw(st.none() | st.integers(1, 3600).map(float)),
        early=draw(st.booleans()),
        secret=draw(st.none() | st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")),
        commands=draw(rights(rules.COMMANDS)),
        events=draw(rights(rules.EVENTS)),
    )


def revisions() -> st.SearchStrategy[str]:
    """Name of a revision."""
    return st.sampled_from([abi.name for abi in REVISIONS])


def to_xml(policy: Policy) -> bytes:
    """Return an element that means *policy*, written out at length."""
    secret = "" if policy.secret is None else f'<secret name="{policy.secret}"/>'
    return (
        f'<introspection xmlns="{NAMESPACE}" mode="{policy.mode.value}"'
        f' early="{"yes" if policy.early else "no"}">'
        f"{_source(policy)}{secret}"
        f'<handshake timeout="{policy.handshake_timeout_s:.0f}"/>'
        f'<unhook timeout="{policy.unhook_timeout_s:.0f}"/>'
        f"{_rules('commands', policy.commands)}{_rules('events', policy.events)}"
        "</introspection>"
    ).encode()


def _source(policy: Policy) -> str:
    source = policy.source
    if isinstance(source, UnixSource):
        where = f'type="unix" path={quoteattr(source.path)}'
    elif isinstance(source, VsockSource):
        where = f'type="vsock" cid="{source.cid}" port="{source.port}"'
    else:
        where = f'type="tcp" host="{source.host}" port="{source.port}"'
    if policy.reconnect_s is None:
        return f'<source {where}><reconnect enabled="no"/></source>'
    timeout = f"{policy.reconnect_s:.0f}"
    return f'<source {where}><reconnect enabled="yes" timeout="{timeout}"/></source>'


def _rules(element: str, some: Rights) -> str:
    default = "allow" if some.everything else "deny"
    allows = "".join(
        f'<allow name="{name}" optional="{"yes" if name in some.optional else "no"}"/>'
        for name in sorted(some.allowed)
        if not some.everything or name not in some.optional
    )
    return f'<{element} default="{default}">{allows}</{element}>'


_VALUES = {
    "mode": ("required", "optional", " required", "Required", ""),
    "early": ("yes", "no", "true", ""),
    "profile": ("observe", "a" * 64, "a" * 65, "../x", ".x", "", "a b"),
    "type": ("unix", "vsock", "tcp", "udp", "unix ", ""),
    "path": ("/run/kvmi/x", "/", "x", "", "/a\nb", "/a\rb", "/\u2028", " /x", "/run//x"),
    "cid": ("3", "0", "4294967295", "99999999999", "03", "-1", "", "0x3"),
    "port": ("1", "65535", "65536", "0", "", "01", "9" * 10, "9" * 11, "x"),
    "host": ("::1", "db1.example", "10.0.0.1", "", "a b", "-x", "[::1]", "x" * 254, "\u00e4"),
    "enabled": ("yes", "no", "true", ""),
    "timeout": (
        *("1", "9", "10", "29", "30", "0", "31", "03", "3.0", "+3", " 3", "-1", "\u0663"),
        *("100", "600", "601", "999", "1000", "3599", "3600", "3601"),
    ),
    "default": ("allow", "deny", "ALLOW", ""),
    "name": ("VM_GET_INFO", "kvmi_x", "x" * 64, "x" * 65, "", "a b", "A-B", "\u0131", "x\n"),
    "group": ("query", "memory-read", "x" * 64, "x" * 65, "", "a b", "a_b"),
    "optional": ("yes", "no", "true", ""),
    "abi": ("v12", "v11", "v7", "v13", ""),
    "excess": ("refuse", "trim", "Trim", ""),
    "title": ("for tests", "x" * 200, "x" * 201, "", "a\nb"),
    "uuid": ("4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "4dea22b31d52d8f32516782e98ab3fa0", "x", ""),
    "nova-flavor": ("m1.*", "", "a\nb"),
    "nova-flavor-id": ("42", "", "a\nb"),
    "nova-extra-spec": ("k:p=v", "k=", "k=a=b", "=v", "k", "", "k=a\nb", "k\n=a"),
    "nova-project": ("b1d2c3e4f5a647b8a9c0d1e2f3a4b5c6", "payments", ""),
    "proxmox-vmid": ("100", "99", "999999999", "1000000000", "", "0100"),
    "bogus": ("x",),
    "xml:lang": ("en",),
    "f:foreign": ("x",),
}
_ELEMENT_ATTRIBUTES = {
    "introspection": ("mode", "profile"),
    "source": ("type", "path"),
    "reconnect": ("enabled", "timeout"),
    "secret": ("name",),
    "handshake": ("timeout",),
    "unhook": ("timeout",),
    "commands": ("default",),
    "events": ("default",),
    "allow": ("name", "optional"),
    "deny": ("group",),
}
_HOST_ATTRIBUTES = {
    "host-policy": (),
    "kernel": ("abi",),
    "sockets": (),
    "unix": ("path",),
    "vsock": ("cid", "port"),
    "tcp": ("host", "port"),
    "ceiling": ("excess", "profile"),
    "assign": ("mode", "profile"),
    "match": (
        *("uuid", "name", "nova-flavor", "nova-flavor-id", "nova-extra-spec"),
        *("nova-project", "proxmox-vmid"),
    ),
    "profile": ("name", "title"),
}
_ATTRIBUTES = {**_ELEMENT_ATTRIBUTES, **_HOST_ATTRIBUTES}
_INNER = ("source", "secret", "handshake", "unhook", "commands", "events")
_CHILDREN = {
    "introspection": _INNER,
    "source": ("reconnect",),
    "commands": ("allow", "deny", "allow"),
    "events": ("deny", "allow"),
    "host-policy": ("kernel", "sockets", "ceiling", "assign"),
    "sockets": ("unix", "vsock", "tcp"),
    "ceiling": ("commands", "events"),
    "assign": ("match", *_INNER),
    "profile": ("commands", "events"),
}
ROOTS = ("introspection", "host-policy", "profile")
_STRAYS = ("text", "<!-- c -->", " \n\t", "<f:x/>", '<source xmlns=""/>', "\u00a0", "<?p?>", "]")


@dataclass
class _Node:
    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    inner: list[_Node | str] = field(default_factory=list)

    @classmethod
    def valid(cls, tag: str) -> _Node:
        attributes = {name: _VALUES[name][0] for name in _ATTRIBUTES[tag]}
        return cls(tag, attributes, [cls.valid(child) for child in _CHILDREN.get(tag, ())])

    def all(self) -> list[_Node]:
        return [self, *(n for child in self.inner if isinstance(child, _Node) for n in child.all())]

    def __str__(self) -> str:
        entities = {"\n": "&#10;", "\r": "&#13;"}
        items = self.attributes.items()
        written = "".join(f" {name}={quoteattr(value, entities)}" for name, value in items)
        return f"<{self.tag}{written}>{''.join(map(str, self.inner))}</{self.tag}>"


@st.composite
def near_elements(draw: st.DrawFn, roots: tuple[str, ...] = ROOTS[:1]) -> str:
    """Return an element of the schema's shape after up to three changes, most of them mistakes."""
    root = _Node.valid(draw(st.sampled_from(roots)))
    for _ in range(draw(st.integers(0, 3))):
        node = draw(st.sampled_from(root.all()))
        change = draw(st.sampled_from(("value", "add", "drop", "child", "childless", "order")))
        names = sorted(node.attributes)
        if change == "value" and names:
            name = draw(st.sampled_from(names))
            node.attributes[name] = draw(st.sampled_from(_VALUES[name]))
        elif change == "add":
            name = draw(st.sampled_from(sorted(_VALUES)))
            node.attributes[name] = _VALUES[name][0]
        elif change == "drop" and names:
            del node.attributes[draw(st.sampled_from(names))]
        elif change == "child":
            tag = draw(st.sampled_from((*_ATTRIBUTES, *_STRAYS)))
            at = draw(st.integers(0, len(node.inner)))
            node.inner.insert(at, _Node.valid(tag) if tag in _ATTRIBUTES else tag)
        elif change == "childless" and node.inner:
            node.inner.pop(draw(st.integers(0, len(node.inner) - 1)))
        elif change == "order":
            node.inner = draw(st.permutations(node.inner))
    return _document(root)


def single_changes(of: str = "introspection") -> list[str]:
    """Return a complete element, and every one that is one change away from it."""
    complete = _Node.valid(of)
    found = [_document(complete)]
    for index, node in enumerate(complete.all()):
        found += [_document(changed) for changed in _changed(of, index, node)]
    return found


def _changed(of: str, index: int, node: _Node) -> Iterator[_Node]:
    def copy() -> tuple[_Node, _Node]:
        root = _Node.valid(of)
        return root, root.all()[index]

    for name, values in _VALUES.items():
        for value in values if name in node.attributes else values[:1]:
            root, target = copy()
            target.attributes[name] = value
            yield root
    for name in node.attributes:
        root, target = copy()
        del target.attributes[name]
        yield root
    for position in range(len(node.inner) + 1):
        for tag in (*_own_tags(of), *_STRAYS):
            root, target = copy()
            target.inner.insert(position, _Node.valid(tag) if tag in _ATTRIBUTES else tag)
            yield root
    for position in range(len(node.inner)):
        root, target = copy()
        target.inner.pop(position)
        yield root
    root, target = copy()
    target.inner.reverse()
    yield root


def _document(root: _Node) -> str:
    declared = f' xmlns="{NAMESPACE}" xmlns:f="urn:foreign"'
    return str(root).replace(f"<{root.tag}", f"<{root.tag}{declared}", 1)


def _own_tags(of: str) -> tuple[str, ...]:
    # An insertion of each of the others' elements would only repeat "unknown element".
    return tuple(_ELEMENT_ATTRIBUTES if of == "introspection" else _HOST_ATTRIBUTES)
