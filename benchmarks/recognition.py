"""How long recognition takes over a megabyte of the worst texts we know: a Markdown table, in CPU time of one core.

python benchmarks/recognition.py
"""

from __future__ import annotations

import random
import string
import time
from dataclasses import dataclass

from cacheclip_rag.prompt import ChunkIndex, any_of, escaped, recognise

SIZE = 1_000_000
START, END = "<|im_start|>", "<|im_end|>"
RANDOM = random.Random(0)


@dataclass(frozen=True)
class Frame:
    """A chat template's ends, and a tokenizer with as many control tokens as Gemma 3."""

    control_tokens: tuple[str, ...] = (START, END, *(f"<SPECIAL_{number}>" for number in range(6000)))
    opening: str = f"{START}user\n"
    closing: str = f"{END}\n{START}assistant\n"


@dataclass(frozen=True)
class Case:
    """A ``unit`` that is repeated to a prompt of a megabyte, over these known ``texts``."""

    texts: list[str]
    unit: str
    question: str | None = None
    hinted: int = 0


def words(count: int = 20) -> str:
    return " ".join("".join(RANDOM.choices(string.ascii_lowercase, k=RANDOM.randint(2, 9))) for _ in range(count))


def periodic(period: int, length: int, alphabet: str = string.ascii_lowercase) -> str:
    return ("".join(RANDOM.choices(alphabet, k=period)) * (length // period + 1))[:length]


RULED = [f"{words()}\n{'-' * 160}\n{words()}" for _ in range(500)]
BLOCKS = [words(9)[:32].ljust(32, ".") for _ in range(20)]
QUOTING = [f"{words()}{END}{words()}" for _ in range(500)]
STRIPES = periodic(17, 64)  # windows of few chunks and of many in turn, and no match that is long enough
PREFIX = words(2000)
NEARLY = [f"{PREFIX}{number}{words(4)}" for number in range(30)]

CASES: dict[str, Case] = {
    "unknown prose": Case(RULED, words(5000)),
    "known prose": Case(QUOTING, "\n".join(QUOTING)),
    "lines of 62 dashes, 500 chunks with a line": Case(RULED, "-" * 62 + "\n"),
    "dashes, 500 chunks with a line": Case(RULED, "-"),
    "dashes, 500 chunks with a line, all hinted": Case(RULED, "-", hinted=500),
    "dashes and an emoji, 500 chunks with a line": Case(RULED, "-" * 99_999 + "\U0001f98a"),
    "lines of 99 dashes, 200 pieces of them, some before a control token": Case(
        [(f"{'-' * 99}\n" * 200)[n : n + RANDOM.choice([64, 95, 128, 500, 3000])] + END * (n % 2) for n in range(200)],
        f"{'-' * 99}\n",
    ),
    "dashes, one long chunk of them": Case(["-" * 100_000], "-" * 99_999 + "x"),
    "dashes, 500 chunks of many lengths that quote a control token": Case(
        ["-" * (100 + n) + END for n in range(500)], "-" * 4000 + END
    ),
    "dashes, a control token behind up to 500,000 of them": Case(
        ["-" * (n * 5000) + END for n in range(1, 101)], "-" * 499_990 + END
    ),
    "blocks of 32 characters in any order": Case(
        ["".join(RANDOM.choices(BLOCKS, k=40)) for _ in range(500)], "".join(RANDOM.choices(BLOCKS, k=30_000))
    ),
    "500 near-duplicates": Case([f"{'x y ' * 100}{n}{'tail ' * 10}" for n in range(500)], f"{'x y ' * 100}zz"),
    "30 near-duplicates behind one beginning of 13,000 characters": Case(NEARLY, PREFIX + "?"),
    "40 periods at once": Case(
        [periodic(n, 3000, "ab") for n in range(3, 43)], "".join(periodic(n, 500, "ab") for n in range(3, 43))
    ),
    "stripes of windows that few and that many chunks have": Case(
        [STRIPES[:32] + words()[:64] for _ in range(20)] + [STRIPES[16:48] + words()[:64] for _ in range(40)],
        STRIPES[:17],
    ),
    "windows of 20 chunks, nothing longer": Case([STRIPES[:32] + words()[:64] for _ in range(20)], STRIPES[:17]),
    "control tokens, 500 chunks of them": Case([END * n for n in range(10, 510)], END),
    "control tokens between words": Case(QUOTING, f"{END} a"),
    "beginnings of 6,000 control tokens": Case(QUOTING, "<SPECIAL_"),
    "documents as Python's repr": Case(RULED, repr({"page_content": "\n".join(RULED[:50])})),
    "backslashes": Case(["\\" * 500 + "\n" + words()], "\\"),
    "a question of 100,000 letters that does not stand there": Case(RULED, "a", question="ab" + "a" * 100_000),
}


def main() -> None:
    print("| text | characters compared, each | CPU seconds |\n|---|---|---|")
    frame = Frame()
    any_of(frame.control_tokens)  # compiled once for a tokenizer
    for name, case in CASES.items():
        index = ChunkIndex(lambda text: END in text)
        for number, text in enumerate(case.texts):
            index.add(str(number), text)
        prompt = (case.unit * (SIZE // len(case.unit) + 1))[:SIZE]
        start = time.process_time()
        found = recognise(prompt, index, frame, [str(number) for number in range(case.hinted)])
        found.question(case.question)
        escaped(prompt, found.spans, index.text)
        seconds = time.process_time() - start
        print(f"| {name} | {index.compared / len(prompt):.1f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
