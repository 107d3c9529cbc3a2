# SPDX-License-Identifier: Apache-2.0
"""Measure, print a table, and write the figures to bench/results.json.

    make bench [BENCH="emulator ..."]

Every module ``bench_TOPIC.py`` here is found by its name and has a function
``measure() -> Iterable[Figure]``. A figure that misses its limit makes the run fail, and so
does one that cannot be measured on this machine: the reason is printed, and the file lacks it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from figures import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def topics() -> list[str]:
    """Return the names of what can be measured."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(argv: Sequence[str]) -> int:
    """Measure the topics named, all by default; return the exit code."""
    known = topics()
    unknown = [name for name in argv if name not in known]
    if unknown:
        print(f"no benchmark is called {unknown[0]}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    sys.path[:0] = [str(HERE), str(HERE.parent / "tools")]
    results = {}
    if argv and RESULTS.exists():  # the other topics' stay
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    missed = 0
    for topic in argv or known:
        try:
            for figure in importlib.import_module(f"bench_{topic}").measure():
                print(line(figure), flush=True)
                results[figure.key] = figure.value
                missed += not figure.is_met
        except OSError as error:
            print(f"{topic}: not measured: {error}")
            missed += 1
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if missed else 0


def line(figure: Figure) -> str:
    """Return the table's line of one figure."""
    limit = "" if figure.limit is None else f"limit {figure.limit:g}"
    verdict = "" if figure.limit is None else ("ok" if figure.is_met else "MISSED")
    value = f"{figure.value:.3f}".rstrip("0").rstrip(".")
    return f"{figure.key:36} {value:>10} {figure.unit:5} {limit:12} {verdict:6} {figure.what}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
