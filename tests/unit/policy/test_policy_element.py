# SPDX-License-Identifier: Apache-2.0
"""Reading the element: where it counts, what else is taken from a domain."""

from __future__ import annotations

import pytest
import strategies
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmi_libvirt.errors import PolicyError, PolicySchemaError, PolicyValueError
from kvmi_libvirt.policy.element import Domain, parse_document, parse_domain
from kvmi_libvirt.policy.model import NAMESPACE, Mode, Policy, Rights, UnixSource

SOURCE = '<source type="unix" path="/run/kvmi/x"/>'
ELEMENT = f'<introspection xmlns="{NAMESPACE}">{SOURCE}</introspection>'
POLICY = Policy(mode=Mode.OPTIONAL, source=UnixSource(path="/run/kvmi/x"))
UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"


def domain(metadata: str = "", more: str = "") -> bytes:
    inner = f"<metadata>{metadata}</metadata>" if metadata else ""
    return f"<domain type='kvm'><name>web1</name>{inner}{more}</domain>".encode()


def read(xml: bytes | str) -> Domain:
    return parse_domain(xml.encode() if isinstance(xml, str) else xml, source="web1.xml")


def test_domain_without_metadata_has_no_policy() -> None:
    assert read(domain()).policy is None


def test_domain_with_foreign_metadata_only_has_no_policy() -> None:
    assert (
        read(domain('<n:instance xmlns:n="urn:nova"><n:introspection/></n:instance>')).policy
        is None
    )


@pytest.mark.parametrize(
    "element",
    [
        ELEMENT,
        (
            f'<kvmi:introspection xmlns:kvmi="{NAMESPACE}">'
            '<kvmi:source type="unix" path="/run/kvmi/x"/></kvmi:introspection>'
        ),
        (
            f'<k:introspection xmlns:k="{NAMESPACE}" xmlns:kvmi="urn:other">'
            f'<l:source xmlns:l="{NAMESPACE}" path="/run/kvmi/x" type="unix"/></k:introspection>'
        ),
        f'<n:instance xmlns:n="urn:nova"/>{ELEMENT}<!-- c --><one:vm xmlns:one="urn:one"/>',
        ELEMENT.replace(SOURCE, f"\n  <!-- c -->{SOURCE}<?pi?>\n"),
    ],
)
def test_element_is_found_by_namespace_and_never_by_prefix(element: str) -> None:
    assert read(domain(element)).policy == POLICY


def test_namespace_declared_on_the_domain_counts() -> None:
    xml = (
        f'<domain xmlns:q="{NAMESPACE}"><metadata><q:introspection>'
        '<q:source type="unix" path="/run/kvmi/x"/></q:introspection></metadata></domain>'
    )
    assert read(xml).policy == POLICY


@pytest.mark.parametrize(
    "xml",
    [
        domain(more=ELEMENT),
        domain(f'<n:instance xmlns:n="urn:nova">{ELEMENT}</n:instance>'),
        domain("<n:x xmlns:n='urn:n'/>", more=f"<metadata>{ELEMENT}</metadata>"),
        domain(more=f"<devices><metadata>{ELEMENT}</metadata></devices>"),
        domain(f"<introspection>{SOURCE}</introspection>"),
        domain(ELEMENT.replace(":1.0", ":2.0")),
        domain(f'<metadata xmlns="">{ELEMENT}</metadata>'),
    ],
    ids=["outside", "nested", "second metadata", "devices", "no namespace", "version", "twice in"],
)
def test_element_elsewhere_than_libvirt_keeps_it_does_not_count(xml: bytes) -> None:
    assert read(xml).policy is None


def test_second_element_is_refused_because_libvirt_would_drop_it() -> None:
    other = ELEMENT.replace("<introspection", '\n<introspection mode="required"')
    with pytest.raises(PolicySchemaError, match="second element of namespace") as caught:
        read(domain(ELEMENT + other))
    assert caught.value.line == 2


def test_other_element_of_our_namespace_is_never_ignored() -> None:
    with pytest.raises(PolicySchemaError, match="unknown element <introspect>"):
        read(domain(f'<introspect xmlns="{NAMESPACE}"/>'))


def test_everything_of_the_element_is_read() -> None:
    xml = f"""<k:introspection xmlns:k="{NAMESPACE}" mode="required">
      <k:events default="allow"/>
      <k:commands>
        <k:allow name="vm_read_physical"/>
        <k:allow name="KVMI_VM_GET_MAX_GFN" optional="yes"/>
        <k:deny name="KVMI_VM_WRITE_PHYSICAL"/>
      </k:commands>
      <k:handshake timeout="30"/>
      <k:source type="unix" path="/run/kvmi/a b"/>
    </k:introspection>"""
    policy = parse_document(xml.encode(), source="x")
    assert policy is not None
    assert policy.mode is Mode.REQUIRED
    assert (policy.line, policy.source.line) == (1, 9)
    assert policy.source == UnixSource(path="/run/kvmi/a b")
    assert policy.handshake_timeout_s == 30.0
    assert policy.events.everything
    assert policy.commands == Rights(
        allowed=frozenset({"KVMI_VM_READ_PHYSICAL", "KVMI_VM_GET_MAX_GFN"}),
        optional=frozenset({"KVMI_VM_GET_MAX_GFN"}),
    )


def test_what_is_left_out_has_its_default() -> None:
    policy = parse_document(ELEMENT.encode(), source="x")
    assert policy == POLICY
    assert policy is not None
    assert (policy.handshake_timeout_s, policy.commands) == (3.0, Rights())


@given(strategies.policies())
@settings(deadline=None)
def test_policy_survives_being_written_as_xml(policy: Policy) -> None:
    assert parse_document(strategies.to_xml(policy), source="x") == policy


@given(strategies.policies())
@settings(deadline=None)
def test_domain_and_bare_element_mean_the_same(policy: Policy) -> None:
    element = strategies.to_xml(policy).decode()
    assert read(domain(element)).policy == policy
    assert parse_document(domain(element), source="x") == policy


@given(
    st.binary()
    | st.text().map(str.encode)
    | strategies.near_elements().map(str.encode)
    | strategies.near_elements().map(domain)
)
@example(domain(ELEMENT))
@example(b"\xff\xfe")
@settings(deadline=None, max_examples=400)
def test_arbitrary_bytes_give_a_policy_none_or_an_error_with_a_line(data: bytes) -> None:
    lines = data.count(b"\n") + data.count(b"\r") + 1
    for parser in (parse_document, parse_domain):
        error: PolicyError | None = None
        result: Policy | Domain | None = None
        try:
            result = parser(data, source="some file")
        except PolicyError as caught:
            error = caught
        assert result is None or isinstance(result, (Policy, Domain))
        if error is not None:
            assert error.line in range(1, lines + 1)
            assert str(error).startswith(f"some file:{error.line}: ")
            assert str(error).isprintable()


def test_facts_of_a_domain() -> None:
    facts = """
      <uuid>4DEA22B31d52d8f32516782e98ab3fa0</uuid>
      <memory unit='MiB'>512</memory><currentMemory unit='KiB'>1</currentMemory>
      <vcpu placement='static' current='2'>4</vcpu>
      <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>"""
    found = read(domain(more=facts))
    assert found == Domain(
        name="web1",
        uuid=UUID,
        vcpus=2,
        memory_bytes=512 * 1024 * 1024,
        machine="pc-q35-7.2",
        policy=None,
    )
    assert found.origin == "web1.xml"


def test_facts_that_a_domain_leaves_out() -> None:
    assert read("<domain/>") == Domain(
        name="", uuid="", vcpus=1, memory_bytes=0, machine="", policy=None
    )


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("<memory>1</memory>", 1024),
        ("<memory unit='b'> 7 </memory>", 7),
        ("<memory unit='bytes'>7</memory>", 7),
        ("<memory unit='KB'>7</memory>", 7000),
        ("<memory unit='KiB'>7</memory>", 7168),
        ("<memory unit='k'>7</memory>", 7168),
        ("<memory unit='M'>7</memory>", 7 << 20),
        ("<memory unit='GiB'>7</memory>", 7 << 30),
        ("<memory unit='gib'>7</memory>", 7 << 30),
        ("<memory unit='TB'>7</memory>", 7 * 10**12),
        ("<memory unit='EiB'>7</memory>", 7 << 60),
    ],
)
def test_memory_is_read_in_every_unit_libvirt_knows(memory: str, size: int) -> None:
    assert read(domain(more=memory)).memory_bytes == size


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("<memory unit='furlong'>1</memory>", 'unit="furlong" on <memory>'),
        ("<memory>-1</memory>", '<memory> is "-1", which is no number'),
        ("<memory/>", "no number"),
        (f"<memory>{'9' * 5000}</memory>", "no number"),
        ("<vcpu>two</vcpu>", '<vcpu> is "two"'),
        ("<vcpu>\u0662</vcpu>", "no number"),
        ("<uuid>web1</uuid>", '<uuid> is "web1", which is no UUID'),
        ("<uuid/>", "no UUID"),
    ],
)
def test_facts_that_cannot_be_read_are_refused(more: str, reason: str) -> None:
    with pytest.raises(PolicyValueError) as caught:
        read(domain(more=f"\n{more}"))
    assert reason in caught.value.message
    assert (caught.value.source, caught.value.line) == ("web1.xml", 2)


def test_status_file_of_libvirt_is_a_domain() -> None:
    status = b"<!--\nWARNING\n-->\n<domstatus state='running' pid='7'>" + domain(ELEMENT)
    found = read(status + b"</domstatus>")
    assert (found.name, found.policy) == ("web1", POLICY)


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("<network/>", "root element is <network>, not <domain>"),
        ("<domstatus/>", "root element is <domstatus>, not <domain>"),
        (
            "<domain xmlns='urn:x'/>",
            '<domain> is of namespace "urn:x"; libvirt has none, remove it',
        ),
        (ELEMENT, "root element is <introspection>, not <domain>"),
    ],
)
def test_parse_domain_refuses_other_documents(root: str, reason: str) -> None:
    with pytest.raises(PolicySchemaError) as caught:
        read(root)
    assert caught.value.message == reason


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("<network/>", "root element is <network>; expected <domain> or <introspection xmlns="),
        ("<d:domain xmlns:d='urn:x'/>", "<d:domain> is of namespace"),
        ("<introspection/>", "has no namespace; write <kvmi:introspection xmlns:kvmi="),
        ("<introspection xmlns='urn:x'/>", f'is of namespace "urn:x"; write "{NAMESPACE}"'),
        (f"<introspection xmlns='{NAMESPACE[:-3]}9.9'/>", "this version knows only"),
        (f"<commands xmlns='{NAMESPACE}'/>", "root element is <commands>; expected <domain>"),
    ],
)
def test_parse_document_refuses_other_documents(root: str, reason: str) -> None:
    with pytest.raises(PolicySchemaError) as caught:
        parse_document(root.encode(), source="x")
    assert reason in caught.value.message
    assert caught.value.line == 1
