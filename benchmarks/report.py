"""The report: seven systems on the reporting half of five sets, against full prefill.

    python benchmarks/report.py DATA --out benchmarks/results/report-1.5b.jsonl
    python benchmarks/report.py --table benchmarks/results/report-1.5b.jsonl

Resumable: a row is appended for every answer, and the same command goes on where it stopped. Full prefill runs once for
each model and question and is kept in ``--references``. Two processes want two files and other ``--sets``. ``--orders``
asks 24 questions with their passages in three other orders. With ``--half choosing`` and ``--methods`` it compares
ideas on the other half, which is what the log's verdicts come from.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from cacheclip_eval import command, rows
from cacheclip_eval.metrics import normalise
from cacheclip_eval.retained import retained, table
from cacheclip_eval.rows import Row
from cacheclip_eval.sources import Source
from cacheclip_eval.systems import parse
from halves import SETS, half

from cacheclip_rag.errors import ConfigurationError

COLD = "auto@0.15:fused=False"
SYSTEMS = (
    "naive",
    "cacheclip@0.15",
    "infoflow@0.15",
    COLD,
    "auto@0.3:fused=False",
    "auto:context=similar",
    "auto:context=use",
)
IN_ORDERS = ("infoflow@0.15", COLD, "auto:context=use")
"""The systems of ``--orders``."""
ORDERS = (1, 2, 3)
"""Seeds of the orders that ``--orders`` asks in."""
ORDERED = ("hotpotqa_distractor", "nq_multidoc")
"""The sets of which ``--orders`` asks twelve questions each."""
LENGTH = 32
"""Tokens of an answer at most, fixed so that every run can use the same references."""
_ORDER = "_order"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="the folder of the data sets")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of these rows, and run nothing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--auxiliary", default="smollm2-135m-instruct")
    parser.add_argument("--half", choices=("reporting", "choosing"), default="reporting")
    parser.add_argument("--sets", nargs="+", choices=list(SETS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--items", type=int, help="of each set, at most")
    parser.add_argument("--orders", action="store_true", help="24 questions, passages in three other orders")
    parser.add_argument("--references", type=Path, help="folder of full prefill's answers; by default beside the rows")
    parser.add_argument("--store", type=Path, help="folder to keep encoded chunks in")
    parser.add_argument("--baseline", default=COLD)
    args = parser.parse_args()
    if args.table:
        print(tables(args.table, args.baseline))
        return
    if not args.data or not args.out:
        parser.error("give the folder of the data sets, and --out FILE")
    try:
        asked = half(args.data, args.half, args.sets or (ORDERED if args.orders else SETS))
        if args.orders:
            asked = [in_order(source, seed) for seed in ORDERS for source in asked]
        plan = command.Plan(
            asked,
            parse(args.methods or (IN_ORDERS if args.orders else SYSTEMS)),
            args.model,
            args.auxiliary,
            args.out,
            args.items or (12 if args.orders else 1000),
            LENGTH,
            args.references,
            args.store,
        )
        rows.prepare(args.out)
        status = command.execute(plan)
    except ConfigurationError as error:
        sys.exit(str(error))
    print(tables([args.out], args.baseline))
    sys.exit(status)


def in_order(source: Source, seed: int) -> Source:
    return dataclasses.replace(source, name=f"{source.name}{_ORDER}{seed}", order=seed)


def tables(files: list[Path], against: str) -> str:
    """The table of all sets together, with equal weights, and one of each set. Differences are those from ``against``,
    where it was run.
    """
    found = [row for file in files for row in rows.read(file).values()]
    baseline = against if any(row["system"] == against for row in found) else None
    parts = ["### All sets", table(retained(found, baseline), baseline)]
    if any(_ORDER in row["dataset"] for row in found):
        parts += ["### Orders", orders(found)]
    for name in dict.fromkeys(row["dataset"] for row in found):
        parts += [f"### {name}", table(retained([r for r in found if r["dataset"] == name], baseline), baseline)]
    return "\n\n".join(parts)


def orders(found: Iterable[Row]) -> str:
    """What another order of the passages changes: the share of questions with more than one answer (in SQuAD's normal
    form), and between the lowest and the highest of a question the mean difference in score and in KL.
    """
    by_question: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in found:
        name, mark, _ = row["dataset"].partition(_ORDER)
        if mark and "error" not in row:
            by_question.setdefault(row["system"], {}).setdefault((name, row["id"]), []).append(row)
    lines = ["| system | questions | several answers | score differs by | KL differs by |", "|---|---|---|---|---|"]
    for system, questions in by_question.items():
        whole = [asked for asked in questions.values() if len(asked) == len(ORDERS)]
        if whole:
            several = mean(len({normalise(row["answer"]) for row in asked}) > 1 for asked in whole)
            score, kl = (mean(_range(row[name] for row in asked) for asked in whole) for name in ("score", "kl"))
            lines.append(f"| {system} | {len(whole)} | {several:.0%} | {score:.3f} | {kl:.3f} |")
    return "\n".join(lines)


def _range(values: Iterable[float]) -> float:
    low, *_, high = sorted(values)
    return high - low


if __name__ == "__main__":
    main()
