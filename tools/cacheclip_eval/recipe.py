"""What a pilot found, written down: ``recipe.json``, the same for readers, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheclip_rag.store import files

Record = Mapping[str, Any]

FEW = 40
"""Questions below which a pilot says that they are few."""


def write(folder: Path, record: Record) -> None:
    """Write ``README.md`` and ``recipe.json``, whose ``method`` is what ``method=`` takes."""
    files.publish(folder / "README.md", f"# {_title(record)}\n\n{chr(10).join(lines(record))}\n".encode())
    files.publish(folder / "recipe.json", json.dumps(record, indent=1, ensure_ascii=False).encode())


def lines(record: Record) -> list[str]:
    """The record in Markdown, line by line."""
    said = [*_chosen(record), ""]
    for step in record["steps"]:
        said += [f"## Chosen by {step['questions']} questions: {step['step']}", "", *_step(step), ""]
    said += [*_reported(record["report"]), "", "## Use it", "", *_use(record)]
    return said


def _title(record: Record) -> str:
    return f"A setting for {record['model']}"


def _chosen(record: Record) -> list[str]:
    last = record["steps"][-1]
    count = sum(len(ids) for half in record["questions"].values() for ids in half.values())
    same = last["taken"] == last["best"]
    said = [
        f'method="{record["method"]}", chunks {_chunks(record)}',
        "",
        "It has the lowest KL, and every cheaper setting is more than a standard error above it."
        if same
        else f"It is the cheapest setting whose KL is within a standard error of the lowest ({last['best']}).",
    ]
    if undecided := [one["setting"] for one in last["settings"] if one["verdict"] == "undecided"]:
        said.append(f"Undecided: {len(undecided)} of {len(last['settings'])} settings cannot be told from the lowest.")
    said += [_better(one, record["report"]) for one in record["report"]["settings"] if one.get("verdict") == "worse"]
    if count < FEW:
        said.append(
            f"{count} questions are few: twice as many (--questions {2 * count}) decide more, and rows are kept."
        )
    said += [f"Not tried: {context}: {reason}" for context, reason in record["skipped"].items()]
    said += [f"Left out because it failed: {what}: {reason}" for what, reason in record["left_out"].items()]
    return said


def _better(other: Record, report: Record) -> str:
    taken = report["settings"][0]
    return (
        f"On the other questions its KL, {taken['kl']:.3f} at a ratio of {taken['ratio']:.3f}, is worse than that of "
        f"{other['setting']}: {other['kl']:.3f} at {other['ratio']:.3f}."
    )


def _chunks(record: Record) -> str:
    how = {"cold": "each by itself", "similar": "fused with similar ones", "use": "fused with those used together"}
    return how[record["chunks"]]


def _step(step: Record) -> list[str]:
    head = ["setting", "ratio", "KL [95 %]", "minus the lowest [95 %]", ""]
    body = [[_marked(one["setting"], step["taken"]), *_numbers(one), one["verdict"]] for one in step["settings"]]
    return _table(head, body)


def _reported(report: Record) -> list[str]:
    taken = report["settings"][0]
    level = f"{report['level']:.1%}"
    head = ["setting", "ratio", "KL [95 %]", f"the first one's KL minus it [{level}]", "the first one is"]
    body = [[_marked(o["setting"], taken["setting"]), *_numbers(o), o.get("verdict", "–")] for o in report["settings"]]
    if report["score_of_full_prefill"] is not None:
        head.append(f"score (full prefill {report['score_of_full_prefill']:.3f})")
        body = [[*row, f"{one['score']:.3f}"] for row, one in zip(body, report["settings"], strict=True)]
    said = [f"## Measured on {report['questions']} other questions, which chose nothing", "", *_table(head, body)]
    if taken["setting"] == report["default"]:
        said += ["", "It is the default."]
    return said


def _use(record: Record) -> list[str]:
    model, method, count = record["model"], record["method"], record["neighbours"]
    helper = f', auxiliary="{record["auxiliary"]}"' if record["auxiliary"] else ""
    idle = ", fuse_when_idle=True" if record["chunks"] == "use" else ""
    said = [f'    Engine("{model}"{helper}, method="{method}"{idle})']
    if record["chunks"] != "cold":
        similar = " --similar" if record["chunks"] == "similar" else ""
        said.append(f'    cacheclip fuse --model "{model}" --method "{method}"{similar} --count {count}')
    return said


def _marked(setting: str, taken: str) -> str:
    return f"**{setting}**" if setting == taken else setting


def _numbers(one: Record) -> list[str]:
    low, high = one["kl_interval"]
    cells = [f"{one['ratio']:.3f}", f"{one['kl']:.3f} [{low:.3f}, {high:.3f}]"]
    if "difference" not in one:
        return [*cells, "–"]
    low, high = one["difference_interval"]
    return [*cells, f"{one['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body]]
