"""The report: six systems on the reporting half of five sets, against full prefill.

    python benchmarks/report.py DATA --out benchmarks/results/report-1.5b.jsonl
    python benchmarks/report.py --table benchmarks/results/report-1.5b.jsonl

Resumable: a row is appended for every answer, and the same command goes on where it stopped. Full prefill runs once for
each model and question and is kept in ``--references``. With ``--half choosing`` and ``--methods`` it compares ideas on
the other half, which is what the log's verdicts come from. Two processes want two files and other ``--sets``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cacheclip_eval import command, rows
from cacheclip_eval.retained import retained, table
from cacheclip_eval.systems import parse
from halves import SETS, half

from cacheclip_rag.errors import ConfigurationError

COLD = "auto@0.15:fused=False"
SYSTEMS = ("naive", "cacheclip@0.15", "infoflow@0.15", COLD, "auto:context=similar", "auto:context=use")
LENGTH = 32
"""Tokens of an answer at most, fixed so that every run can use the same references."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="the folder of the data sets")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of these rows, and run nothing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--auxiliary", default="smollm2-135m-instruct")
    parser.add_argument("--half", choices=("reporting", "choosing"), default="reporting")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--items", type=int, default=1000, help="of each set, at most")
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
        plan = command.Plan(
            half(args.data, args.half, args.sets),
            parse(args.methods),
            args.model,
            args.auxiliary,
            args.out,
            args.items,
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


def tables(files: list[Path], baseline: str) -> str:
    """The table of all sets together, with equal weights, and one of each set."""
    found = [row for file in files for row in rows.read(file).values()]
    parts = ["### All sets", table(retained(found, baseline), baseline)]
    for name in dict.fromkeys(row["dataset"] for row in found):
        parts += [f"### {name}", table(retained([r for r in found if r["dataset"] == name], baseline), baseline)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
