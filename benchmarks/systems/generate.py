"""transformers' own ``generate`` with sdpa; several users are one batch, padded on the left."""

from __future__ import annotations

import time
from typing import Any

import torch
from asked import Asked
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Never ends an answer; notes when its first token was there."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(model: str, options: dict[str, Any], threads: int) -> Any:
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa", **options).eval()


def ingest(system: Any, passages: list[str]) -> None:
    pass


def ask(system: Any, prompts: list[str], users: int, tokens: int) -> list[Asked]:
    tokenizer, model = system
    answers: list[Asked] = []
    for begin in range(0, len(prompts), users):
        clock, start = Clock(), time.perf_counter()
        batch = tokenizer(prompts[begin : begin + users], return_tensors="pt", padding=True, add_special_tokens=False)
        given = batch.input_ids.shape[1]
        ids = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([clock]),
        )[:, given:]
        total = time.perf_counter() - start
        for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
            answers.append({"first": clock.first - start, "total": total, "tokens": ids.shape[1], "text": text})
    return answers
