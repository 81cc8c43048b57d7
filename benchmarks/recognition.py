"""How long recognition takes over a megabyte of the worst texts we know: a Markdown table.

python benchmarks/recognition.py
"""

from __future__ import annotations

import random
import string
import time

from cacheclip_rag.prompt import ChunkIndex, documents

SIZE = 1_000_000
START, END = "<|im_start|>", "<|im_end|>"
RANDOM = random.Random(0)


def words(count: int = 20) -> str:
    return " ".join("".join(RANDOM.choices(string.ascii_lowercase, k=RANDOM.randint(2, 9))) for _ in range(count))


RULED = [f"{words()}\n{'-' * 160}\n{words()}" for _ in range(500)]
BLOCKS = [words(9)[:32].ljust(32, ".") for _ in range(20)]
QUOTING = [f"{words()}{END}{words()}" for _ in range(500)]

CASES: dict[str, tuple[list[str], str]] = {
    "unknown prose": (RULED, words(5000)),
    "known prose": (QUOTING, "\n".join(QUOTING)),
    "lines of 62 dashes, 500 chunks with a line": (RULED, "-" * 62 + "\n"),
    "dashes, 500 chunks with a line": (RULED, "-"),
    "dashes, one long chunk of them": (["-" * 100_000], "-" * 99_999 + "x"),
    "dashes, 500 chunks of many lengths that quote a control token": (
        ["-" * (100 + n) + END for n in range(500)],
        "-" * 4000 + END,
    ),
    "blocks of 32 characters in any order": (
        ["".join(RANDOM.choices(BLOCKS, k=40)) for _ in range(500)],
        "".join(RANDOM.choices(BLOCKS, k=30_000)),
    ),
    "500 near-duplicates": ([f"{'x y ' * 100}{n}{'tail ' * 10}" for n in range(500)], f"{'x y ' * 100}zz"),
    "control tokens, 500 chunks of them": ([END * n for n in range(10, 510)], END),
    "control tokens between words": (QUOTING, f"{END} a"),
}


def main() -> None:
    print("| text | characters compared, each | seconds |\n|---|---|---|")
    for name, (texts, unit) in CASES.items():
        index = ChunkIndex(lambda text: END in text)
        for number, text in enumerate(texts):
            index.add(str(number), text)
        prompt = (unit * (SIZE // len(unit) + 1))[:SIZE]
        start = time.perf_counter()
        spans, quoted = index.find(prompt), index.quoted(prompt)
        documents(prompt, spans, index.whole, [START, END], quoted=quoted)
        seconds = time.perf_counter() - start
        print(f"| {name} | {index.compared / len(prompt):.1f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
