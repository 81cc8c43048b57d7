"""Writes the table in docs/frameworks.md, of what is tested with each framework, from a run of these tests.

    python tools/scripts/behaviours.py          run every test marked `behaviour`, and write the table if all pass
    python tools/scripts/behaviours.py --check  collect them only, and fail if the table differs

A test is marked with the framework and a line of the table: ``@pytest.mark.behaviour("LlamaIndex", "router engine")``.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "frameworks.md"
BEGIN, END = "<!-- behaviours: written by tools/scripts/behaviours.py -->", "<!-- /behaviours -->"
FRAMEWORKS = ("LlamaIndex", "LangChain")

Cases = dict[str, list[str]]
"""The ids of a test's cases, by `file::function`."""


class Behaviours:
    """A pytest plugin that records the marked tests, and which of their cases did not pass."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[str, Cases]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("behaviour"):
                framework, what = mark.args
                self.lines[what][framework][item.nodeid.partition("[")[0]].append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.failed.append(report.nodeid)

    def table(self) -> str:
        rows = [f"| what the application does | {' | '.join(FRAMEWORKS)} |", f"|---|{'---|' * len(FRAMEWORKS)}"]
        for what in sorted(self.lines, key=_order):
            rows.append(f"| {what} | {' | '.join(_cell(self.lines[what][name]) for name in FRAMEWORKS)} |")
        return "\n".join(rows)


def _order(what: str) -> tuple[bool, str]:
    return what.startswith("ingestion"), what.lower().strip("`")


def _cell(cases: Cases) -> str:
    links = []
    for test in sorted(cases):
        path, _, name = test.partition("::")
        number = len(cases[test])
        links.append(f"[{name.removeprefix('test_')}](../{path}){f' ({number})' if number > 1 else ''}")
    return ", ".join(links)


def main(check: bool) -> int:
    plugin = Behaviours()
    arguments = [
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
        "-m",
        "behaviour",
        "-p",
        "no:cacheprovider",
    ]
    arguments += ["--collect-only", "-qq"] if check else []
    code = pytest.main([*arguments, str(ROOT / "integrations")], plugins=[plugin])
    if code or plugin.failed:
        print("not all of them pass:", *plugin.failed, sep="\n  ")
        return 1
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    now = f"{head}{BEGIN}\n\n{plugin.table()}\n\n{END}{rest.partition(END)[2]}"
    if check and now != page:
        print("docs/frameworks.md is out of date: make behaviours")
        return 1
    PAGE.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
