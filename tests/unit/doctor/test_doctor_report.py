# SPDX-License-Identifier: Apache-2.0
"""How findings are printed: one line each, whatever is in them."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmi_libvirt.doctor.report import (
    Check,
    Line,
    Verdict,
    as_json,
    as_text,
    exit_code,
)
from kvmi_libvirt.errors import ExitCode

HOST = Check("hook", "for the libvirt hook")
VM = Check("tool", "for its tool", domain="web1")


def test_a_line_looks_as_virt_host_validate_prints_it() -> None:
    assert as_text(HOST.passed()) == f"  KVMI: Checking {'for the libvirt hook':46} : PASS"
    assert as_text(HOST.passed("v12")).endswith(" : PASS (v12)")
    assert as_text(VM.warn("it is odd")).startswith("  web1: Checking for its tool ")
    assert as_text(VM.warn("it is odd")).endswith(" : WARN (it is odd)")
    assert as_text(VM.fail("it is gone", "start it")).endswith(" : FAIL (it is gone; start it)")


def test_colour_is_round_the_verdict_only() -> None:
    plain, coloured = (as_text(HOST.fail("x"), in_colour=colour) for colour in (False, True))

    assert coloured == plain.replace("FAIL", "\x1b[31mFAIL\x1b[0m")
    assert (
        len({as_text(line, in_colour=True)[-9:] for line in (HOST.passed(), HOST.warn("x"))}) == 2
    )


def test_the_first_fail_decides_the_exit_code() -> None:
    assert exit_code([]) == ExitCode.OK
    assert exit_code([HOST.passed(), HOST.warn("x")]) == ExitCode.OK
    lines = [HOST.warn("x"), VM.fail("a", code=ExitCode.HANDSHAKE), HOST.fail("b")]
    assert exit_code(lines) == ExitCode.HANDSHAKE
    assert exit_code(lines[::-1]) == ExitCode.UNSUPPORTED


def test_as_data_every_field_is_there() -> None:
    assert as_json(VM.fail("it is gone", "start it")) == {
        "domain": "web1",
        "check": "tool",
        "title": "for its tool",
        "verdict": "FAIL",
        "reason": "it is gone",
        "todo": "start it",
    }
    assert set(as_json(HOST.passed())) == {f.name for f in dataclasses.fields(Line)} - {"code"}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    reason=st.text(),
    todo=st.none() | st.text(),
    domain=st.none() | st.text(min_size=1),
    verdict=st.sampled_from(Verdict),
)
def test_whatever_is_in_it_a_line_is_one_printable_line(
    reason: str, todo: str | None, domain: str | None, verdict: Verdict
) -> None:
    line = Line(check="x", title="t", verdict=verdict, reason=reason, todo=todo, domain=domain)

    text = as_text(line)

    assert text.isprintable()
    assert f" : {verdict.value}" in text
