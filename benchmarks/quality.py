"""Quality of methods against full prefill, on JSONL data in the format of `cacheclip_eval.data`.

    python benchmarks/quality.py DATA_FOLDER --out benchmarks/results/quality-1.5b.jsonl

Resumable: rows are appended item by item, and a second call continues where the first one stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cacheclip_eval import Item, System, read, run, spread, summarise

from cacheclip_rag import Engine

# Items of each set, fixed before any result was seen.
SETS = {"hotpotqa_distractor": 20, "xquad_fusion": 20, "ruler_2k": 14, "ruler_4k": 14}


def items_of(folder: Path, name: str, count: int) -> list[Item]:
    if not name.startswith("ruler_"):
        return spread(read(folder / name / "qa.jsonl"), count)
    length = int(name.removeprefix("ruler_").removesuffix("k")) * 1000
    items = [i for i in read(folder / "ruler_niah" / "qa.jsonl") if i.meta.get("approx_tokens") == length]
    tasks = sorted({item.meta["task"] for item in items})
    each = max(1, count // len(tasks))
    return [item for task in tasks for item in spread([i for i in items if i.meta["task"] == task], each)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--auxiliary", default="smollm2-135m-instruct")
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--count", type=int, help="items of each set, instead of the fixed numbers")
    args = parser.parse_args()

    engine = Engine(args.model, auxiliary=args.auxiliary, method="cacheclip")
    systems = [
        System(name, name, ratio) for name, ratio in (("naive", None), ("cacheclip", 0.2), ("query_guided", 0.2))
    ]
    for name in args.sets:
        items = items_of(args.data, name, args.count or SETS[name])
        run(engine, items, systems, args.out, dataset=name, max_new_tokens=64 if name.startswith("ruler") else 32)
        print(summarise(args.out), flush=True)


if __name__ == "__main__":
    main()
