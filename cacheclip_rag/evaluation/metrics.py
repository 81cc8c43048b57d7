"""How good an answer is, and how far a model's distribution has moved."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(text: str) -> str:
    """LongBench's (and SQuAD's) normal form: lower case, no punctuation, no articles, single blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Token F1 of the normal forms, the best over ``answers``: 0..1."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not common:
        return 0.0
    return 2 * common / (len(prediction) + len(answer))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def recall(prediction: str, answers: Sequence[str]) -> float:
    """The share of ``answers`` that occur in the prediction, lower-cased (RULER's string_match_all): 0..1."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / max(1, len(answers))


def kl(reference: Tensor, other: Tensor) -> float:
    """Mean over positions of KL(reference || other) in nats, from logits ``[n, V]``.

    Teacher-forced on full prefill's own answer, it tells methods apart on a handful of items where F1 cannot.
    """
    p, q = reference.float().log_softmax(dim=-1), other.float().log_softmax(dim=-1)
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
