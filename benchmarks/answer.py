"""The whole answer, not only its first token: this engine beside transformers, OpenVINO GenAI and vLLM on one CPU.

    python benchmarks/answer.py DATA --model qwen2.5-coder-0.5b-instruct

``DATA`` is a folder with ``qa.jsonl`` and, to fill longer contexts, ``corpus.jsonl`` (docs/evaluation.md describes
both). Every system answers the same prompts with 128 tokens, greedily, whatever the model says about the end; half of
the questions want quotations, half an explanation in other words. A measurement is a process of its own on the same
cores; the order is shuffled in every round. OpenVINO and vLLM have environments of their own, made on first use, and
are skipped with the reason where they cannot be had. Rows are appended to a JSONL file; --resume goes on with it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from cacheclip_eval.data import Item, Passage, passages, read, spread
from cacheclip_eval.metrics import recall
from systems.environments import Unavailable, clean, last_line, python_of
from transformers import AutoTokenizer

from cacheclip_rag.weights.pull import resolve

HERE = Path(__file__).parent


@dataclass(frozen=True)
class System:
    """``module``: in the folder systems; ``environment``: of a peer, see `environments.ENVIRONMENTS`.

    ``ablation``: a part off, or an option on; measured at 2,000 tokens and one user only, unless --only names it.
    ``guess``: seconds that a prompt token, and a token of the answer, take a model of 0.5 billion parameters on two
    cores, to say how long a run takes before anything was measured.
    """

    module: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: str = ""
    ablation: bool = False
    guess: tuple[float, float] = (0.001, 0.12)


ENGINE = {"dtype": "bfloat16"}
SYSTEMS = {
    "transformers": System("generate", {"dtype": "bfloat16"}, guess=(0.004, 0.12)),
    "cacheclip": System("embedded", ENGINE),
    "cacheclip, no prompt lookup": System("embedded", {**ENGINE, "prompt_lookup": 0}, ablation=True),
    "cacheclip, unpacked weights": System("embedded", {**ENGINE, "backbone": {"packed": False}}, ablation=True),
    "cacheclip, 4 bits": System("embedded", {**ENGINE, "backbone": {"decode_weights": "int4"}}, ablation=True),
    "cacheclip, nothing reused": System(
        "embedded", {**ENGINE, "request": {"recompute_ratio": 1.0}}, ablation=True, guess=(0.004, 0.12)
    ),
    "OpenVINO": System("openvino_cpu", {"weights": "fp16"}, "openvino", guess=(0.004, 0.08)),
    "OpenVINO, 4 bits": System("openvino_cpu", {"weights": "int4"}, "openvino", guess=(0.004, 0.04)),
    "vLLM": System("vllm_cpu", {"dtype": "bfloat16"}, "vllm", guess=(0.005, 0.1)),
}
BASE = "transformers"

KINDS = {
    "extractive": "Answer the question in a few sentences, and quote the sentences of the passages that say so.",
    "free": "Answer the question and explain in your own words, in a few sentences, what the passages say about it.",
}
SMALLEST = 0.05
"""The share of the cores that other work may take before the table says that the machine was busy."""


@dataclass(frozen=True)
class Cell:
    """One measurement to make."""

    system: str
    tokens: int
    users: int
    round: int

    @property
    def key(self) -> tuple[str, int, int, int]:
        return self.system, self.tokens, self.users, self.round


@dataclass(frozen=True)
class Asking:
    """The prompts of one cell, the same for every system."""

    prompts: list[str]
    kinds: list[str]
    items: list[Item]
    passages: list[str]
    lengths: list[int]


class Prompts:
    """Prompts of a wanted length, of real passages and questions."""

    def __init__(self, data: Path, tokenizer: Any) -> None:
        self._items = read(data / "qa.jsonl")
        corpus = data / "corpus.jsonl"
        texts = passages(corpus) if corpus.is_file() else [p.chunk for item in self._items for p in item.passages]
        self._corpus, self._tokenizer = list(dict.fromkeys(texts)), tokenizer

    def of(self, tokens: int, count: int, rounds: int, number: int) -> Asking:
        """``count`` prompts of about ``tokens`` tokens: other questions in each of ``rounds`` rounds."""
        items = spread(self._items, count * rounds)[number::rounds]
        kinds = [list(KINDS)[i % len(KINDS)] for i in range(len(items))]
        contexts = [self._context(item, tokens) for item in items]
        prompts = [self._prompt(item, kind, texts) for item, kind, texts in zip(items, kinds, contexts, strict=True)]
        used = list(dict.fromkeys(text for texts in contexts for text in texts))
        return Asking(prompts, kinds, items, used, [self._length(prompt) for prompt in prompts])

    def warm_up(self) -> list[str]:
        """A short prompt that shares no passage with any other."""
        item = Item("warm-up", "What is seven times eight?", ("56",), ())
        return [self._prompt(item, "free", ["Seven times eight is fifty-six, as every child learns at school. " * 8])]

    def _context(self, item: Item, tokens: int) -> list[str]:
        """The item's passages, the supporting ones first to be kept, and others up to ``tokens``; shuffled."""
        draw = random.Random(f"{item.id} {tokens}")
        own = sorted(item.passages, key=_supporting)
        texts = list(dict.fromkeys([p.chunk for p in own] + draw.sample(self._corpus, len(self._corpus))))
        chosen, room = list[str](), tokens - self._length(self._prompt(item, "free", []))
        for text in texts:
            length = self._length(text + "\n\n")
            if length <= room or not chosen:
                room -= length
                chosen.append(text)
        return draw.sample(chosen, len(chosen))

    def _prompt(self, item: Item, kind: str, texts: Sequence[str]) -> str:
        content = "\n\n".join(["The following are given passages.", *texts, KINDS[kind], f"Question: {item.question}"])
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _length(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)


def _supporting(passage: Passage) -> bool:
    return not passage.supporting


def cells(args: argparse.Namespace) -> list[Cell]:
    """What to measure: the order of the systems is shuffled in every round."""
    draw, made = random.Random(0), []
    for number in range(args.rounds):
        mine = [
            Cell(name, tokens, users, number)
            for tokens in args.tokens
            for users in args.users
            for name, system in SYSTEMS.items()
            if (name in args.only if args.only else not system.ablation or (tokens, users) == (2000, 1))
        ]
        made += draw.sample(mine, len(mine))
    return made


def measure(cell: Cell, asking: Asking, args: argparse.Namespace, model: Path, warm_up: list[str]) -> dict[str, Any]:
    """The worker's numbers, or the reason why there are none under "skipped"."""
    system = SYSTEMS[cell.system]
    try:
        python = python_of(system.environment, args.environments) if system.environment else Path(sys.executable)
    except Unavailable as error:
        return {"skipped": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(
            json.dumps(
                {
                    "module": system.module,
                    "model": str(model),
                    "options": system.options,
                    "cores": args.cores,
                    "passages": asking.passages,
                    "prompts": asking.prompts,
                    "users": cell.users,
                    "tokens": args.answer,
                    "warm_up": warm_up,
                }
            )
        )
        environment = (clean() if system.environment else dict(os.environ)) | {
            "OMP_NUM_THREADS": str(len(args.cores)),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        try:
            done = subprocess.run(
                [python, HERE / "systems" / "worker.py", job, result],
                env=environment,
                capture_output=True,
                text=True,
                timeout=args.limit,
            )
        except subprocess.TimeoutExpired:
            return {"skipped": f"it took longer than {args.limit} seconds"}
        if done.returncode:
            return {"skipped": last_line(done.stderr)}
        return json.loads(result.read_text())


def row_of(cell: Cell, asking: Asking, measured: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    row = {
        "model": args.model,
        "system": cell.system,
        "context": cell.tokens,
        "users": cell.users,
        "round": cell.round,
        "cores": len(args.cores),
        "machine": platform.processor() or platform.machine(),
        "answer_tokens": args.answer,
        "questions": [item.id for item in asking.items],
        "kinds": asking.kinds,
        "prompt_tokens": asking.lengths,
        **measured,
    }
    if "texts" in row:
        row["found"] = [recall(text, item.answers[:1]) for text, item in zip(row["texts"], asking.items, strict=True)]
    return row


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The newest row of each measurement; a line that a killed run left incomplete does not count."""
    rows = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["model"], row["answer_tokens"], key_of(row)] = row
    return list(rows.values())


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row on a line of its own, also behind one that was cut short."""
    cut = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(row, ensure_ascii=False) + "\n")


def key_of(row: dict[str, Any]) -> tuple[str, int, int, int]:
    return row["system"], row["context"], row["users"], row["round"]


def same_run(row: dict[str, Any] | None, asking: Asking, cores: int) -> bool:
    """Whether a row is of these questions, on so many cores: of another round's or number's it is another run."""
    return row is not None and row["questions"] == [item.id for item in asking.items] and row["cores"] == cores


# ---- how long it takes ------------------------------------------------------------------------------------------


def expected(cell: Cell, args: argparse.Namespace, rows: Iterable[dict[str, Any]] = ()) -> float:
    """Seconds that a measurement takes: as in an earlier round, or guessed."""
    took = [row["took_s"] for row in rows if key_of(row)[:3] == cell.key[:3] and "took_s" in row]
    if took:
        return median(took)
    size = float(args.model.split("-")[-2].rstrip("b")) / 0.5 if args.model.endswith("b-instruct") else 1.0
    each_prompt, each_token = SYSTEMS[cell.system].guess
    questions = max(args.questions, cell.users)
    prefill = questions * cell.tokens * each_prompt * (1 + cell.tokens / 20_000)
    decode = questions * args.answer * each_token / min(cell.users, 3)
    return 20 + size * (prefill + decode + 0.002 * questions * cell.tokens) * 2 / len(args.cores)


def said(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


# ---- the table --------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Medians over all questions of all rounds, a table for each length and number of users."""
    groups: dict[tuple[str, int, int, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["model"], row["context"], row["users"], row["answer_tokens"]][row["system"]].append(row)
    for (model, context, users, answer), by_system in sorted(groups.items()):
        done = [row for each in by_system.values() for row in each if "first_s" in row]
        length = median(n for row in done for n in row["prompt_tokens"]) if done else context
        yield f"\n{model}, {length:,.0f} prompt tokens, {users} user{'s' * (users > 1)}, {answer} tokens an answer\n"
        yield (
            "| system | first token | whole answer | against transformers | tokens a second | decoding, extractive "
            "| decoding, free | peak memory | before the first question | answers found |"
        )
        yield "|---" * 10 + "|"
        order = {name: number for number, name in enumerate(SYSTEMS)}
        for name in sorted(by_system, key=lambda name: order.get(name, len(order))):
            yield _line(name, by_system[name], by_system.get(BASE, []))
    busy = [row["others"] / row["cores"] for row in rows if "others" in row]
    if busy and max(busy) > SMALLEST:
        yield (
            f"\nThe machine was busy: other work took up to {max(busy):.0%} of its cores during a measurement. "
            "Do not quote these times."
        )


def _line(name: str, rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    done = [row for row in rows if "first_s" in row]
    if not done:
        return f"| {name} | skipped: {rows[-1]['skipped']} |" + " |" * 8
    theirs = _by_question(base, "answer_s")
    ratios = [theirs[key] / seconds for key, seconds in _by_question(done, "answer_s").items() if key in theirs]
    cells = [
        f"{median(s for row in done for s in row['first_s']):.2f} s",
        f"{median(s for row in done for s in row['answer_s']):.1f} s",
        f"{median(ratios):.2f}x" if ratios else "",
        f"{median(sum(row['tokens']) / row['seconds'] for row in done):.1f}",
        *(_decoding(done, kind) for kind in KINDS),
        f"{max(row['peak_bytes'] for row in done) / (1 << 30):.1f} GiB",
        f"{median(row['ingest_s'] for row in done):.0f} s" if median(row["ingest_s"] for row in done) >= 1 else "",
        f"{mean(found for row in done for found in row['found']):.2f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _decoding(rows: list[dict[str, Any]], kind: str) -> str:
    """The median of tokens a second behind the first one, of one answer."""
    rates = [
        (tokens - 1) / (total - first)
        for row in rows
        for mine, tokens, total, first in zip(row["kinds"], row["tokens"], row["answer_s"], row["first_s"], strict=True)
        if mine == kind and total > first
    ]
    return f"{median(rates):.1f}" if rates else ""


def _by_question(rows: list[dict[str, Any]], field: str) -> dict[tuple[int, str], float]:
    return {
        (row["round"], question): seconds
        for row in rows
        if field in row
        for question, seconds in zip(row["questions"], row[field], strict=True)
    }


# ---- the command ------------------------------------------------------------------------------------------------


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with qa.jsonl")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), metavar="SYSTEM", help=", ".join(SYSTEMS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[2000, 6000], help="of a prompt")
    parser.add_argument("--users", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--questions", type=int, default=4, help="of a measurement; at least one a user")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--threads", type=int, help="cores to use; by default all that this process may use")
    parser.add_argument("--limit", type=int, default=1800, help="seconds that a measurement may take")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "answer.jsonl")
    parser.add_argument("--resume", action="store_true", help="measure only what --out does not have yet")
    parser.add_argument("--environments", type=Path, default=HERE.parent, help="the folder of the peers' environments")
    args = parser.parse_args(words)
    available = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    )
    args.cores = available[: args.threads or len(available)]
    if not (args.data / "qa.jsonl").is_file():
        parser.error(f"{args.data} has no qa.jsonl; docs/evaluation.md describes the format")
    return args


def main() -> None:
    args = arguments()
    model = resolve(args.model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    mine = [row for row in rows_of(args.out) if row["model"] == args.model and row["answer_tokens"] == args.answer]
    prompts = Prompts(args.data, AutoTokenizer.from_pretrained(model))

    def asked(cell: Cell) -> Asking:
        return prompts.of(cell.tokens, max(args.questions, cell.users), args.rounds, cell.round)

    done = {key_of(row): row for row in mine if "first_s" in row} if args.resume else {}
    todo = [cell for cell in cells(args) if not same_run(done.get(cell.key), asked(cell), len(args.cores))]
    load = os.getloadavg()[0]
    if load > 0.3:
        print(f"warning: the load average is {load:.1f}: this machine is not idle, and times will tell little")
    print(f"{args.model} on {len(args.cores)} cores: {len(todo)} measurements, about", end=" ")
    print(said(sum(expected(cell, args, mine) for cell in todo)), flush=True)
    warm_up = prompts.warm_up()
    for number, cell in enumerate(todo):
        left = sum(expected(other, args, mine) for other in todo[number:])
        print(
            f"{number + 1} of {len(todo)}: {cell.system}, {cell.tokens} tokens, {cell.users} users; "
            f"about {said(left)} left",
            flush=True,
        )
        asking = asked(cell)
        start = time.perf_counter()
        measured = measure(cell, asking, args, model, warm_up)
        if "skipped" in measured:
            print(f"  skipped: {measured['skipped']}", flush=True)
        else:
            measured["took_s"] = time.perf_counter() - start
        mine.append(row_of(cell, asking, measured, args))
        append(args.out, mine[-1])
    print(*table(rows_of(args.out)), sep="\n")


if __name__ == "__main__":
    main()
