"""What a system's ``ask`` returns for each prompt, and the loop of the systems that compute by steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict


class Asked(TypedDict):
    """Seconds from asking to the ``first`` token and in ``total``, waiting included; the answer's ``tokens`` and
    ``text``.
    """

    first: float
    total: float
    tokens: int
    text: str


def by_steps(
    prompts: Sequence[str],
    users: int,
    add: Callable[[int, str], None],
    step: Callable[[], Iterable[tuple[int, int, str | None]]],
) -> list[Asked]:
    """``users`` that each ask one prompt after another, of a system that computes when it is told to.

    ``add(number, prompt)`` queues a request. ``step()`` computes, and gives for each request with something new its
    number, its tokens so far, and its text once it is finished.
    """
    waiting = list(range(len(prompts)))[::-1]
    begun: dict[int, float] = {}
    first: dict[int, float] = {}
    answers: dict[int, Asked] = {}

    def ask() -> None:
        number = waiting.pop()
        begun[number] = time.perf_counter()
        add(number, prompts[number])

    for _ in range(min(users, len(prompts))):
        ask()
    while len(answers) < len(prompts):
        for number, tokens, text in step():
            now = time.perf_counter() - begun[number]
            if tokens:
                first.setdefault(number, now)
            if text is not None:
                answers[number] = {"first": first[number], "total": now, "tokens": tokens, "text": text}
                if waiting:
                    ask()
    return [answers[number] for number in range(len(prompts))]
