# SPDX-License-Identifier: Apache-2.0
"""The table in docs/agent.md and the live tests that show it, held to each other."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
TESTS: Final = (
    ROOT / "tests" / "live" / "test_agent.py",
    ROOT / "tests" / "live" / "test_agent_policy.py",
)
TABLE: Final = "| what happens |"


def lines_told() -> list[str]:
    """Return the first column of the table."""
    lines = (ROOT / "docs" / "agent.md").read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(TABLE))
    rows = lines[begin + 2 :]
    return [row.split("|")[1].strip() for row in rows[: rows.index("")]]


def lines_shown() -> dict[str, list[str]]:
    """Return the tests that say they show a line, by line."""
    found: dict[str, list[str]] = {}
    for path in TESTS:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "shows":
                    for argument in decorator.args:
                        found.setdefault(ast.literal_eval(argument), []).append(node.name)
    return found


def test_every_line_of_the_table_is_shown_by_a_test_and_no_test_shows_another() -> None:
    told = lines_told()
    assert len(told) == len(set(told)) > 25
    assert set(told) == set(lines_shown())


def test_every_test_shows_something() -> None:
    tests = {
        node.name
        for path in TESTS
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert tests == {name for names in lines_shown().values() for name in names}
