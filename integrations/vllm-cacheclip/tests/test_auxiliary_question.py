"""What the auxiliary model is asked: the question, without what tokens at a border have of a chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cacheclip_vllm.auxiliary import question_of
from cacheclip_vllm.plan import Place, Plan

from cacheclip_rag import methods
from cacheclip_rag.chunks import ChunkKV

CHUNK = ["The", " light", " went", " out", "."]


class Vocabulary:
    """Tokens by number, as a model says them."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens

    def say(self, ids: np.ndarray) -> str:
        return "".join(self._tokens[number] for number in ids)


def chunk() -> ChunkKV:
    ends = np.cumsum([len(token) for token in CHUNK])
    offsets = torch.from_numpy(np.stack([ends - [len(token) for token in CHUNK], ends], axis=1))
    empty = torch.zeros(1, 1, len(CHUNK), 1)
    return ChunkKV("".join(CHUNK), torch.arange(len(CHUNK)), offsets, empty, empty, 0)


@pytest.mark.parametrize(
    ("prompt", "run", "question"),
    [
        ([*CHUNK, "\n\n", "Who?"], (0, 0, 5), (5, 7)),
        ([*CHUNK[:4], ".\n\n", "Who?"], (0, 0, 4), (4, 6)),
        (["Who?", "\n\n", *CHUNK], (2, 0, 5), (0, 2)),
        (["Who?", "\n\nThe", *CHUNK[1:]], (2, 1, 4), (0, 2)),
    ],
)
def test_a_chunks_end_is_no_part_of_the_question(
    prompt: list[str], run: tuple[int, int, int], question: tuple[int, int]
) -> None:
    plan = Plan(
        request="r",
        ids=np.arange(len(prompt)),
        tenant="",
        method=methods.resolve("cacheclip"),
        ratio=0.2,
        prefix=0,
        places=[Place("".join(CHUNK), "key", (run,)), Place("gone", None, ((0, 0, 1),))],
        question=np.arange(*question),
        question_ids=np.arange(0),
    )
    model: Any = Vocabulary(prompt)
    assert question_of(plan, {"key": chunk()}, model) == "Who?"
