"""Trained weights beside untrained ones: the evaluation, and what the papers claim of them.

    python benchmarks/trained.py DATA --adapters adapters --out ROWS [--model NAME] [--sets ...] [--items 20]
    python benchmarks/trained.py --cards adapters > benchmarks/results/trained-cards.json

``--adapters``: a folder of folders that ``cacheclip tune`` wrote, relative to where the command runs, since labels of
rows have the path. Those are run whose answers ``--model`` gives. No training had a question about the documents that
these are about; XQuAD's are those that it kept apart. Questions of the reporting half are not asked (`halves`).
Resumable, as `report`. `results.py` makes the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from analyses import table
from cacheclip_eval import command, paired, rows
from cacheclip_eval.sources import Source, sources
from cacheclip_eval.systems import parse
from cacheclip_train.loop import CHECKPOINT
from claims import Scores
from halves import choosing

from cacheclip_rag.errors import ConfigurationError

SMALL = "smollm2-135m-instruct"
OWN = "xquad_held_out"
"""The set of the trained domain."""
SETS = {
    OWN: "",
    "hotpotqa_distractor": "?passages=4",
    "2wikimultihopqa": "?passages=4",
    "nq_multidoc": "?passages=4",
    "ruler_niah": "?approx_tokens=2000",
}
COLD = "auto@0.15:fused=False"
BARE = "promptcache"
BASELINES = ((BARE, "without a prefix"), ("naive", "behind a shared prefix"))
"""Plain reuse: as in the papers that train, and as it is here."""
SELECTED = "cacheclip@0.15"
TOKENS = 32
"""Of an answer, at most."""


def cards(folder: Path) -> dict[str, dict[str, Any]]:
    """The cards in ``folder``, by the name of their folders, without the titles of documents."""
    found = {}
    for path in sorted(folder.glob("*/card.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        card["data"].pop("documents")
        log = path.parent / CHECKPOINT / "log.jsonl"
        if log.is_file():  # the card's own history ends at the best look
            card["training"]["history"] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        found[path.parent.name] = card
    return found


def systems(folder: Path, model: str) -> list[str]:
    """What to compare for the finished trainings of ``folder`` that ``model`` answers with."""
    finished = {name: card for name, card in cards(folder).items() if card["finished"]}
    mine = {name: card for name, card in finished.items() if card.get("fitted_to", card["primary"])["name"] == model}
    selecting = [name for name, card in mine.items() if "fitted_to" in card]
    found = ["naive", COLD, *([] if selecting else [BARE])]
    if selecting:
        found += [SELECTED, "infoflow@0.15", "query_guided@0.15", "random@0.15"]
    for name, card in mine.items():
        uses = card["uses"].replace("FOLDER", str(folder / name))
        found.append(uses.replace("cacheclip:", f"{SELECTED}:") if name in selecting else uses)
        if card["kind"] == "blocks":
            found.append(f"full:adapter={folder / name}")
    return found


def asked(data: Path, adapters: Path, names: Sequence[str]) -> list[Source]:
    """The sets, without questions of the reporting half; XQuAD's from what the first training kept apart."""
    held_out = next(iter(sorted(adapters.glob("*/held-out.jsonl"))), None)
    if held_out is None:
        raise ConfigurationError(f"no training in {adapters}")
    parts = []
    for name in names:
        [source] = sources([f"{name}={held_out if name == OWN else data / name}{SETS[name]}"])
        if name == OWN:  # the trainings kept apart questions about PEPs, too
            ids = frozenset(item.id for item in source.all() if item.id.startswith("xquad"))
            source = dataclasses.replace(source, ids=ids)
        parts.append(choosing(source))
    return parts


# ---- claims --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """``mine`` minus ``theirs`` in a ``measure`` is below 0 on the ``sets`` (all, the trained domain, the others).

    Both are systems; of a pair ``(system, reference)`` it is the difference between its two, item by item. ``trained``:
    the trainings that the claim is about. ``null``: the claim is that there is no difference, or one above 0.
    """

    source: str
    words: str
    trained: tuple[str, ...]
    mine: str | tuple[str, str]
    theirs: str | tuple[str, str]
    measure: str = "nll"
    sets: str = "all"
    null: bool = False


def _published(names: dict[str, str]) -> list[Claim]:
    """The claims, for adapters by name; those without rows are left out later."""

    def loses(name: str) -> tuple[str, str]:
        return names.get(name, ""), f"full:adapter=adapters/{name}"

    auxiliary, block, turbo, packet, study = (
        "CacheClip, arXiv 2510.10129",
        "Block-Attention, arXiv 2409.15355",
        "TurboRAG, arXiv 2410.07590",
        "KV Packet, arXiv 2604.13226",
        "the study, arXiv 2603.20218",
    )
    found = []
    for name, what in (("auxiliary", "a tuned auxiliary model"), ("head", "a tuned head (ours)")):
        for sets, where in (("own", "in the trained domain"), ("other", "in other domains")):
            words = f"{what} selects better, {where}"
            found.append(Claim(auxiliary, words, (name,), names.get(name, ""), SELECTED, "kl", sets))
    for plain, prefix in BASELINES:
        lost = (plain, "full")
        words = f"recovers what plain reuse {prefix} loses"
        found.append(Claim(block, words, ("blockattention",), loses("blockattention"), lost))
        found.append(Claim(turbo, words, ("turborag",), loses("turborag"), lost))
        words = f"nearer to full prefill than plain reuse {prefix}"
        found.append(Claim(packet, words, ("packet",), names.get("packet", ""), plain, "kl"))
        words = f"an adapter trained on few samples loses as much as plain reuse {prefix}"
        found.append(Claim(study, words, ("few",), loses("few"), lost, null=True))
    for other in ("blockattention", "turborag"):
        words = f"better than {'Block-Attention' if other == 'blockattention' else 'TurboRAG'}"
        theirs = names.get(other, "")
        found.append(Claim("KVLink, arXiv 2502.16002", words, ("links", other), names.get("links", ""), theirs))
    return found


def claims(models: Sequence[Scores], known: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, of the scores of each of ``models``: each claim, the numbers, and *shown*, *not shown at N
    tokens* or *contradicted*, by whether the 95 % interval of the paired difference excludes 0.
    """
    names = {}
    for name, card in known.items():
        uses = card["uses"].replace("FOLDER", f"adapters/{name}")
        names[name] = uses.replace("cacheclip:", f"{SELECTED}:") if "fitted_to" in card else uses
    lines = []
    for claim, scores in ((claim, scores) for claim in _published(names) for scores in models):
        mine, theirs = (_values(scores, side, claim) for side in (claim.mine, claim.theirs))
        both = [key for key in mine if key in theirs]
        if not both or any(name not in known for name in claim.trained):
            continue
        gap = paired([mine[key] for key in both], [theirs[key] for key in both])
        tokens = " and ".join(f"{known[name]['training']['tokens']:,}" for name in claim.trained)
        so = "not shown" if not gap.found else "shown" if (gap.low > 0) == claim.null else "**contradicted**"
        numbers = f"{mean(mine[k] for k in both):.3f} for {mean(theirs[k] for k in both):.3f}"
        what = {"nll": "NLL", "kl": "KL"}[claim.measure] + (" lost" if isinstance(claim.mine, tuple) else "")
        lines.append(
            [
                claim.source,
                claim.words,
                f"{what} {numbers}",
                f"{gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]",
                str(len(both)),
                f"{so} at {tokens} tokens",
            ]
        )
    return table(["source", "says", "here", "difference", "items", "so"], lines)


def _values(scores: Scores, side: str | tuple[str, str], claim: Claim) -> dict[tuple[str, str], float]:
    if isinstance(side, tuple):
        mine, theirs = (_values(scores, one, claim) for one in side)
        return {key: mine[key] - theirs[key] for key in mine if key in theirs}
    wanted = {"all": lambda name: True, "own": OWN.__eq__, "other": OWN.__ne__}[claim.sets]
    asked = scores.get(side, {}).items()
    return {key: row[claim.measure] for key, row in asked if wanted(key[0]) and row.get(claim.measure) is not None}


# ---- tables --------------------------------------------------------------------------------------------------------


def overview(scores: Scores) -> str:
    """A Markdown table: score, the right answer's NLL and KL of each system, set by set, over the items that all have
    answered; and the median of its time to first token as a share of full prefill's.
    """
    sets = list(dict.fromkeys(data for mine in scores.values() for data, _ in mine))
    common = set.intersection(*(set(mine) for mine in scores.values()))
    head = ["system", *(f"{name} ({sum(data == name for data, _ in common)})" for name in sets), "TTFT"]
    lines = []
    for system, mine in scores.items():
        cells = [f"`{system}`"]
        for name in sets:
            part = [row for key, row in mine.items() if key in common and key[0] == name]
            cells.append(" / ".join(_mean(row.get(what) for row in part) for what in ("score", "nll", "kl")))
        time = median(mine[key]["ttft"] / scores["full"][key]["ttft"] for key in common)
        lines.append([*cells, f"{time:.2f}"])
    return table(head, lines)


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.3f}" if known else "–"


def curves(known: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: the losses on the questions to stop by, over training tokens."""
    lines = []
    for name, card in known.items():
        history = card["training"]["history"]
        for what in history[0]["held_out"]:
            series = ", ".join(f"{row['held_out'][what]:.3f}" for row in history)
            lines.append([name, what, series, ", ".join(f"{row['tokens'] / 1000:.0f}" for row in history)])
    return table(["trained", "loss", "looks", "at thousand tokens"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="the folder of the data sets")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default=SMALL)
    parser.add_argument("--auxiliary", default=SMALL)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--references", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--cards", type=Path, help="print the cards of a folder of adapters, and run nothing")
    args = parser.parse_args()
    if args.cards:
        print(json.dumps(cards(args.cards), indent=1))
        return
    if not args.data or not args.out or args.adapters.is_absolute():
        parser.error("give the folder of the data sets, --out FILE, and a relative --adapters")
    try:
        found = systems(args.adapters, args.model)
        sets = asked(args.data, args.adapters, args.sets)
        plan = command.Plan(
            sets, parse(found), args.model, args.auxiliary, args.out, args.items, TOKENS, args.references, args.store
        )
        rows.prepare(args.out)
        status = command.execute(plan)
    except ConfigurationError as error:
        sys.exit(str(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
