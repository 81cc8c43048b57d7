"""Recognition by token ids, as vLLM's scheduler does it: its time, and what it misses of the library's recognition.

    python benchmarks/vllm_recognition.py DATA/xquad_fusion DATA/hotpotqa_distractor DATA/2wikimultihopqa

First the median time (CPU, one thread) to find known chunks in a prompt of 16,000 tokens, with 10,000 chunks known: cut
one behind the other, and each from the middle of the one before. Then, for each
tokenizer and way to cut documents, the share of tokens that `ChunkIndex` and `align` find in chat prompts (by their
text, with offsets) and `TokenIndex` does not. The prompts are the data's questions with their passages; texts are cut
into passages as they are, and into pieces of so many characters. Needs no vLLM.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from cacheclip_eval.sources import sources
from transformers import AutoTokenizer

from cacheclip_rag.chunks import canonical
from cacheclip_rag.model.tokenizer import PromptTokenizer
from cacheclip_rag.prompt import ChunkIndex, align, recognise
from cacheclip_rag.weights.pull import home

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations" / "vllm-cacheclip"))
from cacheclip_vllm.index import TokenIndex

MODELS = ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"]
SIZES = [None, 2000, 1000, 500, 250]
"""Characters of a chunk; None: whole passages."""
JOINS = {"blank lines": "\n\n", "lines": "\n", "numbers": "\n[{}] "}
KNOWN, PROMPT, ROUNDS = 10_000, 16_000, 200


def tokenizer(model: str) -> PromptTokenizer:
    return PromptTokenizer(AutoTokenizer.from_pretrained(home() / "models" / model))


def pieces(text: str, size: int | None) -> Iterator[str]:
    """The text, cut at blanks into pieces of at most ``size`` characters."""
    while size is not None and len(text) > size:
        cut = text.rfind(" ", 1, size + 1)
        cut = size if cut < 0 else cut
        yield canonical(text[:cut])
        text = text[cut:]
    if canonical(text):
        yield canonical(text)


def joined(parts: Sequence[str], join: str) -> str:
    return "".join(join.format(number) + part for number, part in enumerate(parts, start=1)).strip()


def missed(frame: PromptTokenizer, prompts: Sequence[tuple[list[str], str]], join: str) -> tuple[int, int]:
    """Tokens that recognition by text finds, and those of them that recognition by ids does not, in all prompts."""
    texts = list(dict.fromkeys(part for parts, _ in prompts for part in parts))
    by_text, by_ids = ChunkIndex(frame.quotes), TokenIndex()
    stored = {text: frame.tokenise(text, plain=True) for text in texts}
    for text, tokens in stored.items():
        by_text.add(text, text)
        by_ids.add(text, tokens.ids.numpy())
    found = missing = 0
    for parts, question in prompts:
        prompt = frame.chat([{"role": "user", "content": f"{joined(parts, join)}\n\n{question}"}])
        recognised = recognise(prompt, by_text, frame)
        tokens = frame.tokenise_prompt(prompt, recognised.text)
        known = [(stored[span.key].ids, stored[span.key].offsets) for span in recognised.spans]
        theirs = align(prompt, tokens.ids, tokens.offsets, recognised.spans, known).reusable.numpy()
        ours = np.zeros(len(theirs), dtype=bool)
        for match in by_ids.find(tokens.ids.numpy()):
            ours[match.row : match.row + match.length] = True
        found, missing = found + int(theirs.sum()), missing + int((theirs & ~ours).sum())
    return found, missing


def seconds(index: TokenIndex, prompt: np.ndarray) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        index.find(prompt)
        times.append(time.thread_time() - start)
    return median(times)


def timed(frame: PromptTokenizer, texts: Sequence[str]) -> None:
    """Prints the table of times."""
    rng = random.Random(0)
    print("| 10,000 chunks of | cut | tokens | prompt of known chunks | of unknown ones | to add the chunks |")
    print("|---|---|---|---|---|---|")
    for size in (400, 1200):
        for name, step in (("one behind the other", size), ("overlapping by half", size // 2)):
            cut = islice(windows(texts, size, step, rng), KNOWN + 400)
            every = [frame.tokenise(text, plain=True).ids.numpy() for text in cut]
            index = TokenIndex()
            start = time.thread_time()
            for number, ids in enumerate(every[:KNOWN]):
                index.add(str(number), ids)
            index.find(every[0])
            adding = time.thread_time() - start
            known = np.concatenate(rng.sample(every[:KNOWN], 400))[:PROMPT]
            unknown = np.concatenate(every[KNOWN:])[:PROMPT]
            assert len(known) == len(unknown) == PROMPT
            times = (
                f"{seconds(index, known) * 1e3:.1f} ms",
                f"{seconds(index, unknown) * 1e3:.1f} ms",
                f"{adding:.1f} s",
            )
            count = sum(len(ids) for ids in every[:KNOWN])
            print("|", " | ".join([f"{size} characters", name, f"{count:,}", *times]), "|", flush=True)


def windows(texts: Sequence[str], size: int, step: int, rng: random.Random) -> Iterator[str]:
    """``size`` characters of all texts, every ``step``; when they are used up, again with words in another order."""
    while True:
        whole = " ".join(texts)
        for start in range(0, len(whole) - size, step):
            yield canonical(whole[start : start + size])
        texts = [" ".join(rng.sample(words, len(words))) for words in (text.split() for text in texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="what `cacheclip eval` takes")
    parser.add_argument("--items", type=int, default=40, help="questions of each set")
    arguments = parser.parse_args()
    data = {source.name: list(islice(source.all(), arguments.items)) for source in sources(arguments.data)}
    frames = {model: tokenizer(model) for model in MODELS}
    texts = dict.fromkeys(p.chunk for items in data.values() for item in items for p in item.passages)
    timed(frames[MODELS[0]], list(texts))
    print("\n| tokenizer | chunks | joined by | tokens found by text | of these missed by ids |\n|---|---|---|---|---|")
    for model, frame in frames.items():
        for size in SIZES:
            for name, join in JOINS.items():
                prompts = [
                    ([piece for p in item.passages for piece in pieces(p.chunk, size)], item.question)
                    for items in data.values()
                    for item in items
                ]
                found, missing = missed(frame, prompts, join)
                cut = "passages" if size is None else f"{size} characters"
                print(f"| {model} | {cut} | {name} | {found:,} | {missing / found:.2%} |", flush=True)


if __name__ == "__main__":
    main()
