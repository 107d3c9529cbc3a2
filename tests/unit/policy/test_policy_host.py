# SPDX-License-Identifier: Apache-2.0
"""What a host allows: its sockets, its ceiling, its assignments, and whose file that is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmi_libvirt.errors import PolicyError, PolicyRefused
from kvmi_libvirt.policy import rules
from kvmi_libvirt.policy.element import Domain, parse_domain
from kvmi_libvirt.policy.facts import Identity
from kvmi_libvirt.policy.findings import Severity
from kvmi_libvirt.policy.globs import matches, path_matches
from kvmi_libvirt.policy.host import (
    HOST_POLICY_PATH,
    HostPolicy,
    load_host_policy,
    parse_host_policy,
)
from kvmi_libvirt.policy.limits import Assignment, Ceiling, Match
from kvmi_libvirt.policy.lint import lint
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
from kvmi_libvirt.policy.resolve import decide, decide_for, permit, resolve, trim

UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
PROJECT = "b1d2c3e4f5a647b8a9c0d1e2f3a4b5c6"
SOURCE = '<source type="unix" path="/run/kvmi/assigned"/>'
OWNER = os.geteuid()


def host(inner: str) -> HostPolicy:
    xml = f'<host-policy xmlns="{NAMESPACE}">{inner}</host-policy>'
    return parse_host_policy(xml.encode(), source="host-policy.xml")


def domain(path: str | None, *, origin: str = "") -> Domain:
    policy = None
    if path is not None:
        policy = Policy(mode=Mode.REQUIRED, source=UnixSource(path=path, line=4), line=3)
    return Domain(
        name="web1", uuid="", vcpus=1, memory_bytes=0, machine="", policy=policy, origin=origin
    )


def permits(some: HostPolicy, source: Source) -> bool:
    return some.refusal(source) is None


# -- sockets -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/run/kvmi/x", "/run/kvmi/a/b.sock", "/run/kvmi/..x"])
def test_sockets_below_run_kvmi_are_allowed(path: str) -> None:
    asked = domain(path)
    assert resolve(asked, HostPolicy()) == asked.policy is not None


@pytest.mark.parametrize(
    "path", ["/run/kvmi", "/run/kvmi2/x", "/run/kvm/x", "/tmp/x", "/var/run/kvmi/x", "/RUN/KVMI/x"]
)
def test_sockets_elsewhere_are_refused_with_their_line(path: str) -> None:
    with pytest.raises(PolicyRefused, match="only sockets below /run/kvmi/") as caught:
        resolve(domain(path, origin="web1.xml"), HostPolicy())
    assert (caught.value.source, caught.value.line) == ("web1.xml", 4)


def test_refusal_names_the_domain_when_there_is_no_file() -> None:
    with pytest.raises(PolicyRefused, match=r"^domain XML of web1:4: "):
        resolve(domain("/tmp/x"), HostPolicy())


def test_host_without_policy_allows_vsock_but_no_tcp() -> None:
    assert permits(HostPolicy(), VsockSource(cid=3, port=1))
    assert not permits(HostPolicy(), TcpSource(host="localhost", port=1))


def test_sockets_that_are_written_replace_the_defaults() -> None:
    some = host('<sockets><unix path="/srv/*/t?.sock"/><vsock cid="3"/></sockets>')
    assert permits(some, UnixSource(path="/srv/a/t1.sock"))
    assert not permits(some, UnixSource(path="/srv/a/b/t1.sock"))
    assert not permits(some, UnixSource(path="/run/kvmi/x"))
    assert permits(some, VsockSource(cid=3, port=9))
    assert not permits(some, VsockSource(cid=4, port=9))
    nothing = host("<sockets/>")
    assert not permits(nothing, UnixSource(path="/run/kvmi/x"))
    assert not permits(nothing, VsockSource(cid=3, port=9))


def test_tcp_is_allowed_where_it_is_named_and_nowhere_else() -> None:
    some = host('<sockets><tcp host="fe80:0::1" port="9"/><tcp host="Tool.example"/></sockets>')
    assert permits(some, TcpSource(host="FE80::1", port=9))
    assert not permits(some, TcpSource(host="fe80::1", port=8))
    assert permits(some, TcpSource(host="tool.EXAMPLE", port=1))
    assert not permits(some, TcpSource(host="tool.example.evil", port=1))


@given(st.text("ab*?", max_size=8), st.text("ab", max_size=8))
def test_patterns_match_as_a_regular_expression_would(pattern: str, text: str) -> None:
    import re

    regex = "".join({"*": ".*", "?": "."}.get(c, c) for c in pattern)
    assert matches(pattern, text) == bool(re.fullmatch(regex, text))


def test_no_pattern_is_slow() -> None:
    assert not matches("a*" * 2000 + "b", "a" * 4000)


def test_two_stars_at_the_end_are_everything_below_but_not_the_place_itself() -> None:
    assert path_matches("/a/**", "/a/b/c")
    assert not path_matches("/a/**", "/a")
    assert not path_matches("/a/**", "/ab/c")


# -- ceiling -----------------------------------------------------------------------------

READ, WRITE = "KVMI_VM_READ_PHYSICAL", "KVMI_VM_WRITE_PHYSICAL"


def asking(*names: str, everything: bool = False) -> Policy:
    rights = Rights(allowed=frozenset(names), everything=everything)
    source = UnixSource(path="/run/kvmi/x")
    return Policy(mode=Mode.REQUIRED, source=source, commands=rights, origin="x", line=2)


CEILING = '\n<ceiling{}><commands><allow group="memory-read"/></commands></ceiling>'


def test_request_below_the_ceiling_is_permitted_as_it_is() -> None:
    policy = asking(READ)
    assert permit(policy, host(CEILING.format("")), source="x") is policy


def test_request_above_the_ceiling_is_refused_by_default() -> None:
    with pytest.raises(PolicyRefused, match=f"^x:2: {WRITE} is above .*host-policy.xml:2"):
        permit(asking(READ, WRITE), host(CEILING.format("")), source="x")


def test_request_above_the_ceiling_is_cut_where_the_host_says_so() -> None:
    cut = permit(asking(READ, WRITE), host(CEILING.format(' excess="trim"')), source="x")
    assert cut.commands.allowed == {READ}
    assert cut.commands.why[WRITE].rule.startswith("cut by the ceiling")
    assert cut.commands.cut == {WRITE}
    assert not cut.events.cut


def test_check_warns_of_what_the_ceiling_will_cut() -> None:
    element = (
        f'<introspection xmlns="{NAMESPACE}">{SOURCE}<commands>\n<allow name="{READ}"/>\n'
        f'<allow name="{WRITE}"/></commands></introspection>'
    )
    trimming = host(CEILING.format(' excess="trim"'))
    report = lint(element.encode(), source="x", host=trimming)
    (finding,) = report.findings
    assert (finding.severity, finding.line) == (Severity.WARNING, 3)
    told = f"{WRITE} is above this host's ceiling (host-policy.xml:2); not granted here"
    assert finding.message == told
    assert report.policy is not None
    # The same for what the host itself assigns: it holds, but not as it is written.
    assign = (
        f'<assign><match name="x"/>{SOURCE}<commands><allow name="{WRITE}"/></commands></assign>'
    )
    inner = CEILING.format(' excess="trim"') + assign
    xml = f'<host-policy xmlns="{NAMESPACE}">{inner}</host-policy>'
    (finding,) = lint(xml.encode(), source="host-policy.xml", host=HostPolicy()).findings
    assert (finding.severity, finding.message) == (Severity.WARNING, told)


def test_everything_is_above_every_ceiling_that_is_not_everything() -> None:
    # Also what has no name: "all ids" must not slip below a list of all names.
    names = rules.COMMANDS.names - rules.COMMANDS.always_allowed
    allows = "".join(f'<allow name="{name}"/>' for name in sorted(names))
    limited = host(f"<ceiling><commands>{allows}</commands></ceiling>")
    with pytest.raises(PolicyRefused, match="commands without a name"):
        permit(asking(*names, everything=True), limited, source="x")
    full = host('<ceiling profile="full"/>')
    assert permit(asking(*names, everything=True), full, source="x").commands.everything


def test_ceiling_without_events_grants_none() -> None:
    policy = dataclasses.replace(
        asking(READ), events=Rights(allowed=frozenset({"KVMI_VM_EVENT_UNHOOK"}))
    )
    with pytest.raises(PolicyRefused, match="KVMI_VM_EVENT_UNHOOK is above"):
        permit(policy, host(CEILING.format("")), source="x")


@given(strategies.policies(), strategies.rights(rules.COMMANDS), strategies.rights(rules.EVENTS))
@settings(deadline=None)
def test_trimmed_policy_is_a_subset_of_both(
    policy: Policy, commands: Rights, events: Rights
) -> None:
    ceiling = Ceiling(commands=commands, events=events, trim=True)
    cut = trim(policy, ceiling)
    for got, asked, limit in (
        (cut.commands, policy.commands, commands),
        (cut.events, policy.events, events),
    ):
        assert got.allowed == asked.allowed & limit.allowed
        assert got.optional == asked.optional & limit.allowed
        assert got.everything == (asked.everything and limit.everything)
    assert trim(cut, ceiling) == cut
    assert dataclasses.replace(cut, commands=policy.commands, events=policy.events) == policy


def test_kernel_abi_of_the_host_reaches_the_policy() -> None:
    assert permit(asking(READ), host('<kernel abi="v11"/>'), source="x").kernel_abi == "v11"


# -- assignments -------------------------------------------------------------------------


def nova(inner: str, *, namespace: str = "1.1", project: str = PROJECT) -> str:
    uri = f"http://openstack.org/xmlns/libvirt/nova/{namespace}"
    return (
        f'<n:instance xmlns:n="{uri}"><n:name>guarded</n:name>{inner}'
        f'<n:image uuid="x"><n:properties><n:property name="k">v</n:property></n:properties>'
        f'</n:image><n:owner><n:project uuid="{project}">payments</n:project></n:owner>'
        "</n:instance>"
    )


OLD = nova('<n:flavor name="m1.small"/>', namespace="1.0")
NEW = nova(
    '<n:flavor name="m1.small" id="7"><n:extraSpecs><n:extraSpec name="k:p">a=b</n:extraSpec>'
    "</n:extraSpecs></n:flavor>"
)


def xml(metadata: str = "", name: str = "db-1") -> bytes:
    return (
        f"<domain><name>{name}</name><uuid>{UUID}</uuid><metadata>{metadata}</metadata></domain>"
    ).encode()


@pytest.mark.parametrize(
    ("match", "metadata", "fits"),
    [
        (f'uuid="{UUID.upper()}"', "", True),
        (f'uuid="{UUID[:-1]}1"', "", False),
        ('name="db-1"', "", True),
        ('name="db-*"', "", True),
        ('name="db"', "", False),
        ('nova-flavor="m1.*"', OLD, True),
        ('nova-flavor="m1.small"', NEW, True),
        ('nova-flavor="small"', NEW, False),
        ('nova-flavor="*"', "", False),
        ('nova-flavor-id="7"', NEW, True),
        ('nova-flavor-id="7"', OLD, False),
        ('nova-extra-spec="k:p=a=b"', NEW, True),
        ('nova-extra-spec="k:p=a"', NEW, False),
        ('nova-extra-spec="k=v"', NEW, False),  # an image property: the tenant's
        (f'nova-project="{PROJECT}"', OLD, True),
        (f'nova-project="{PROJECT.replace("b1", "b2")}"', OLD, False),
        (f'nova-project="{PROJECT}" nova-flavor="x*"', NEW, False),
        ('proxmox-vmid="104"', "", False),
    ],
)
def test_selectors(match: str, metadata: str, fits: bool) -> None:
    some = host(f"<assign><match {match}/>{SOURCE}</assign>")
    policy = decide(xml(metadata), some, source="x")[1]
    assert (policy is not None) == fits


def test_vmid_of_a_proxmox_machine_is_a_selector() -> None:
    some = host(f'<assign><match proxmox-vmid="104"/>{SOURCE}</assign>')
    machine = dataclasses.replace(domain(None), vmid=104)
    assert resolve(machine, some) is not None
    assert resolve(dataclasses.replace(machine, vmid=105), some) is None


@pytest.mark.parametrize(
    ("match", "who", "fits"),
    [
        ('proxmox-vmid="104"', Identity(vmid=104), True),
        ('proxmox-vmid="104"', Identity(vmid=1040), False),
        ('proxmox-vmid="104"', Identity(name="104", uuid=UUID), False),
        ('name="db-*"', Identity(vmid=104, name="db-1"), True),
        ('name="db-*"', Identity(vmid=104), False),
        (f'uuid="{UUID}"', Identity(vmid=104, uuid=UUID.upper().replace("-", "")), True),
        (f'uuid="{UUID}"', Identity(vmid=104), False),
        ('proxmox-vmid="104" name="db-*"', Identity(vmid=104, name="web"), False),
        ('nova-flavor="*"', Identity(vmid=104, name="db-1", uuid=UUID), False),
    ],
)
def test_machine_without_domain_xml_gets_what_the_host_assigns(
    match: str, who: Identity, fits: bool
) -> None:
    some = host(f'<assign mode="required"><match {match}/>{SOURCE}</assign>')
    policy = decide_for(who, some)
    assert policy == (some.assignments[0].policy if fits else None)


def test_machine_without_domain_xml_is_held_against_the_ceiling_too() -> None:
    # parse_host_policy() refuses such a file; a host policy built otherwise must not slip by.
    limit = Ceiling(commands=Rights(allowed=frozenset({READ})), events=Rights(), trim=True)
    assigned = Assignment(matches=(Match(proxmox_vmid=104),), policy=asking(READ, WRITE))
    some = HostPolicy(assignments=(assigned,), ceiling=limit, kernel_abi="v7")
    policy = decide_for(Identity(vmid=104), some)
    assert policy is not None
    assert policy.commands.allowed == {READ}
    assert policy.kernel_abi == "v7"
    strict = dataclasses.replace(some, ceiling=dataclasses.replace(limit, trim=False))
    with pytest.raises(PolicyRefused, match=f"{WRITE} is above this host's ceiling"):
        decide_for(Identity(vmid=104), strict)


def test_machine_without_domain_xml_gets_nothing_on_a_host_without_a_policy() -> None:
    assert decide_for(Identity(vmid=104, name="db-1", uuid=UUID), HostPolicy()) is None


def test_nova_metadata_elsewhere_than_libvirt_keeps_it_does_not_count() -> None:
    nested = f'<x:y xmlns:x="urn:x">{NEW}</x:y>'
    some = host(f'<assign><match nova-flavor="*"/>{SOURCE}</assign>')
    assert decide(xml(nested), some, source="x")[1] is None


def test_first_assignment_that_fits_wins_and_beats_the_element() -> None:
    some = host(
        f'<assign mode="required"><match name="other"/><match name="db-*"/>{SOURCE}</assign>'
        f'<assign><match name="db-1"/>{SOURCE.replace("assigned", "second")}</assign>'
    )
    own = f'<introspection xmlns="{NAMESPACE}"><source type="unix" path="/run/kvmi/own"/>'
    policy = decide(xml(own + "</introspection>"), some, source="x")[1]
    assert policy is not None
    assert (policy.source, policy.mode) == (UnixSource(path="/run/kvmi/assigned"), Mode.REQUIRED)


def test_element_that_is_wrong_does_not_keep_an_assignment_from_its_effect() -> None:
    some = host(f'<assign><match name="db-*"/>{SOURCE}</assign>')
    wrong = xml(f'<introspection xmlns="{NAMESPACE}"/>')
    with pytest.raises(PolicyError):
        parse_domain(wrong, source="x")
    assert decide(wrong, some, source="x")[1] is not None


# -- the file ----------------------------------------------------------------------------


def test_host_policy_path_is_the_documented_one() -> None:
    assert Path("/etc/kvmi-libvirt/host-policy.xml") == HOST_POLICY_PATH


def test_host_without_a_policy_file_has_the_defaults(tmp_path: Path) -> None:
    assert load_host_policy(tmp_path / "none" / "host-policy.xml") == HostPolicy()


GOOD = f'<host-policy xmlns="{NAMESPACE}"><sockets/></host-policy>'


def write(tmp_path: Path, text: str = GOOD, mode: int = 0o644) -> Path:
    path = tmp_path / "host-policy.xml"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_file_of_its_owner_is_read(tmp_path: Path) -> None:
    assert load_host_policy(write(tmp_path), owner=OWNER).unix == ()


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o1777])
def test_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(PolicyRefused, match="is writable by others"):
        load_host_policy(write(tmp_path, mode=mode), owner=OWNER)


def test_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match=f"belongs to uid {OWNER}, not to uid {OWNER + 1}"):
        load_host_policy(write(tmp_path), owner=OWNER + 1)


def test_file_in_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(PolicyRefused, match="its directory is writable by others"):
        load_host_policy(path, owner=OWNER)
    # Whoever can write there can have taken a file away, and its limits with it.
    path.unlink()
    with pytest.raises(PolicyRefused, match="its directory is writable by others"):
        load_host_policy(path, owner=OWNER)
    tmp_path.chmod(0o755)
    assert load_host_policy(path, owner=OWNER) == HostPolicy()


@pytest.mark.parametrize("kind", ["directory", "dangling link", "link", "pipe", "below a file"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "host-policy.xml"
    if kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        os.symlink("nowhere", path)
    elif kind == "link":
        (tmp_path / "real").write_text(GOOD, encoding="utf-8")
        os.symlink("real", path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
        path = path / "host-policy.xml"
    with pytest.raises(PolicyRefused) as caught:
        load_host_policy(path, owner=OWNER)
    assert caught.value.source == str(path)


@pytest.mark.parametrize(
    "text", ["", "<host-policy/>", GOOD.replace("sockets", "socket"), "<!DOCTYPE x><x/>"]
)
def test_wrong_file_is_never_passed_over(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PolicyError) as caught:
        load_host_policy(path, owner=OWNER)
    assert caught.value.source == str(path)


@given(st.binary() | strategies.near_elements(strategies.ROOTS[1:]).map(str.encode))
@settings(deadline=None, max_examples=200)
def test_arbitrary_bytes_give_a_host_policy_or_an_error_with_a_line(data: bytes) -> None:
    error: PolicyError | None = None
    try:
        assert isinstance(parse_host_policy(data, source="some file"), HostPolicy)
    except PolicyError as caught:
        error = caught
    if error is not None:
        assert str(error).startswith(f"some file:{error.line or 0}: ")
        assert str(error).isprintable()
