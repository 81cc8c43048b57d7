"""Which rows would have been worth recomputing, and how many of them each selection finds.

    python benchmarks/oracle.py DATA... --out ROWS --systems cacheclip@0.15 "cacheclip@0.15:auxiliary=FOLDER"
    python benchmarks/oracle.py --table ROWS...

The oracle takes a prompt of chunks that were encoded alone, recomputes one of their rows, as the rows outside of chunks
are, and sees by how much that lowers the KL divergence of the answer's tokens from full prefill's (teacher-forced,
float32). It does so for every fourth row (``--stride``). A system is judged by the share of the oracle's best rows it
recomputes, of as many as its ratio is of them: by chance that share is the ratio. Questions of the reporting half are
not asked (`halves`). Rows of both kinds are appended item by item, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from analyses import table as markdown
from cacheclip_eval.data import Item, prompt
from cacheclip_eval.metrics import bootstrap
from cacheclip_eval.sources import sources
from cacheclip_eval.systems import System, parse
from halves import choosing
from torch import Tensor

from cacheclip_rag import Engine
from cacheclip_rag.compute import Part
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.encode import Isolated
from cacheclip_rag.methods import Method
from cacheclip_rag.methods.request import Request, merge_rows
from cacheclip_rag.report.token_sources import TokenSource
from cacheclip_rag.verification import kl

ANSWER = 8
"""Tokens of full prefill's answer that the divergence is averaged over."""


class Noting:
    """A selector that takes nothing and keeps the request it was asked about."""

    needs_auxiliary: ClassVar[bool] = False

    def select(self, request: Request, budget: int) -> Tensor:
        self.request = request
        return request.rows[:0]


def gains(engine: Engine, item: Item, stride: int) -> dict[str, Any]:
    """By how much recomputing each candidate row alone lowers the KL, nats a token."""
    text, noting = prompt(item, engine.backbone), Noting()
    said = engine.generate(text, method="full", max_new_tokens=ANSWER).ids
    answer = torch.tensor(said, dtype=torch.long)
    logits = engine.prefill(text, method="full", room=ANSWER + 1).forced(said)
    engine.prefill(
        text, question=item.question, method=Method("oracle", noting, Isolated()), recompute_ratio=0.5, room=ANSWER + 1
    )
    request = noting.request
    candidates = request.rows[::stride]

    def distance(row: Tensor) -> float:
        rows = merge_rows(row, request.fresh)
        asked = torch.arange(len(request.layout), len(request.layout) + len(answer) - 1)
        ids = torch.cat([request.layout.ids[rows], answer[:-1]])
        places = torch.cat([request.positions[rows], request.positions[-1] + 1 + torch.arange(len(asked))])
        [found] = request.computer.forward(
            [Part(request.workspace, ids, torch.cat([rows, asked]), places)], logits=len(answer)
        )
        assert found is not None
        return float(kl(logits, found))

    base, lowered = distance(candidates[:0]), []
    for row in candidates.split(1):
        kept = [[part[row].clone() for part in request.workspace.placed(n)] for n in range(request.computer.layers)]
        lowered.append(base - distance(row))
        for layer, (keys, values) in enumerate(kept):
            request.workspace.write_layer(layer, row, keys, values)
    return {"stride": stride, "kl": base, "rows": candidates.tolist(), "gains": lowered, "context": len(request.rows)}


def chosen(engine: Engine, item: Item, system: System) -> set[int]:
    """The rows that a system recomputes."""
    text = prompt(item, engine.backbone)
    engine.ensure([passage.chunk for passage in item.passages], method=system.recipe)
    report = engine.prefill(
        text, question=item.question, method=system.recipe, recompute_ratio=system.ratio, room=1
    ).report
    assert not report.fallbacks, report.fallbacks
    assert report.token_sources is not None
    runs = [run for run in report.token_sources.runs() if run.source is TokenSource.RECOMPUTED]
    return {row for run in runs for row in range(run.row, run.row + run.tokens)}


def measure(
    engine: Engine, item: Item, systems: Sequence[System], stride: int, done: set[str]
) -> Iterator[dict[str, Any]]:
    engine.ensure([passage.chunk for passage in item.passages])
    own = engine.auxiliary
    if "oracle" not in done:
        yield {"system": "oracle", **gains(engine, item, stride)}
    for system in systems:
        if system.label not in done:
            engine.auxiliary = system.auxiliary or own
            yield {"system": system.label, "ratio": system.ratio, "chosen": sorted(chosen(engine, item, system))}
    engine.auxiliary = own


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; of none, none. What a kill left of a last line is cut off the file."""
    whole = path.read_bytes() if path.is_file() else b""
    if (end := whole.rfind(b"\n") + 1) < len(whole):
        os.truncate(path, end)
    return [json.loads(line) for line in whole[:end].splitlines()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """*found*: the share of the oracle's best rows that the system recomputes, mean over items [95 %]; *gain*: the sum
    of the gains of the candidates it recomputes, as a share of the sum over as many of the best ones, over all items.
    """
    oracle = {(row["dataset"], row["id"]): row for row in rows if row["system"] == "oracle"}
    scored: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for row in rows:
        best = oracle.get((row["dataset"], row["id"]))
        if row["system"] != "oracle" and best is not None:
            scored.setdefault(row["system"], {}).setdefault(row["dataset"], []).append(_judged(best, row["chosen"]))
    sets = list(dict.fromkeys(name for found in scored.values() for name in found))
    lines = [
        [
            f"`{system}`",
            *(cell for name in sets for cell in _cells(found.get(name, []))),
            str(sum(map(len, found.values()))),
        ]
        for system, found in scored.items()
    ]
    return markdown(["system", *(f"{name}: {what}" for name in sets for what in ("found", "gain")), "items"], lines)


def _cells(judged: Sequence[tuple[float, float, float]]) -> tuple[str, str]:
    if not judged:
        return "–", "–"
    shares = [share for share, _, _ in judged]
    low, high = bootstrap(shares)
    mine, best = (sum(one[column] for one in judged) for column in (1, 2))
    return f"{mean(shares):.2f} [{low:.2f}, {high:.2f}]", f"{mine / best:.2f}"


def _judged(best: dict[str, Any], taken: Sequence[int]) -> tuple[float, float, float]:
    """The share of the best rows taken, the gains of those taken, and those of as many of the best."""
    mine = set(taken)
    order = sorted(zip(best["gains"], best["rows"], strict=True), reverse=True)
    count = max(1, round(len(order) * len(mine) / best["context"]))
    has = [gain for gain, row in order if row in mine]
    return mean(row in mine for _, row in order[:count]), sum(has), sum(gain for gain, _ in order[: len(has)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="data sets, as for cacheclip eval")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these rows, and run nothing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--auxiliary", default="smollm2-135m-instruct")
    parser.add_argument("--systems", nargs="*", default=["cacheclip@0.15", "infoflow@0.15", "random@0.15"])
    parser.add_argument("--items", type=int, default=10, help="of each set")
    parser.add_argument("--stride", type=int, default=4)
    args = parser.parse_args()
    if args.table:
        print(table([row for path in args.table for row in read(path)]))
        return
    if not args.data or not args.out:
        parser.error("give data sets, and --out FILE")
    try:
        asked, systems = sources(args.data), parse(args.systems)
    except ConfigurationError as error:
        sys.exit(str(error))
    with Engine(args.model, auxiliary=args.auxiliary, dtype="float32") as engine:
        helpers = {name: engine.open_auxiliary(name) for name in {one.helper for one in systems} if name}
        systems = [dataclasses.replace(one, auxiliary=helpers.get(one.helper)) for one in systems]
        known: dict[tuple[str, str], set[str]] = {}
        for row in read(args.out):
            if (row["model"], row.get("stride", args.stride)) != (args.model, args.stride):
                sys.exit(f"{args.out} has rows of another model or stride: give another --out")
            known.setdefault((row["dataset"], row["id"]), set()).add(row["system"])
        with args.out.open("a", encoding="utf-8") as out:
            for source in asked:
                for item in choosing(source).items(args.items, engine.backbone):
                    key = {"model": args.model, "dataset": source.name, "id": item.id}
                    for row in measure(engine, item, systems, args.stride, known.get((source.name, item.id), set())):
                        out.write(json.dumps({**key, **row}) + "\n")
                        out.flush()
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
