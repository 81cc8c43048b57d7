"""CacheClip's auxiliary model beside vLLM's worker, on its CPU.

It reads text: chunks have theirs, and the question's is decoded from the prompt's tokens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.errors import PromptError
from cacheclip_rag.methods.auxiliary import Auxiliary, CharacterScores
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.weights.pull import resolve

from .libraries import Libraries
from .plan import Plan
from .served import ServedModel

log = logging.getLogger("cacheclip_rag")


class WorkerAuxiliary:
    """The auxiliary model ``name`` for the chunks of all tenants; they are stored and forgotten with the model's own.

    Thread-safe. Raises what loading a `Backbone` raises.
    """

    def __init__(self, name: str, libraries: Libraries) -> None:
        self._backbone = Backbone.load(resolve(name), device="cpu")
        self._libraries = libraries
        self._of: dict[str, Auxiliary] = {}
        self._lock = threading.Lock()

    def prepare(self, tenant: str, texts: Sequence[str]) -> None:
        """Encode the chunks that the auxiliary model does not have yet, while no step waits for it."""
        for text in texts:
            try:
                with self._lock:
                    self._for(tenant).library.ensure(text)
            except PromptError:  # too long for it: scored 0
                continue
            except Exception:  # tried again when the chunk is scored
                log.exception("cacheclip: the auxiliary model could not encode a chunk")

    def score(self, plan: Plan, chunks: Mapping[str, ChunkKV], layers: str) -> list[CharacterScores]:
        """Scores of each place in the plan, as its layout counts: a character of that is one of the chunk's tokens."""
        question = question_of(plan, chunks, self._libraries.model)
        texts = [place.text for place in plan.places]
        with self._lock:
            found = self._for(plan.tenant).score(texts, question, layers)
        return [
            _by_token(scores, None if place.key is None else chunks[place.key])
            for scores, place in zip(found, plan.places, strict=True)
        ]

    def _for(self, tenant: str) -> Auxiliary:
        if tenant not in self._of:
            self._of[tenant] = Auxiliary(self._libraries.beside(tenant, self._backbone))
        return self._of[tenant]


def question_of(plan: Plan, chunks: Mapping[str, ChunkKV], model: ServedModel) -> str:
    """The question's text. Its first token may hold the last chunk's end, as in ".\\n\\n", and its last one the
    first chunk's beginning.
    """
    rows, text = plan.question, model.say(plan.ids[plan.question])
    for place in plan.places if len(rows) else ():
        if place.key is None:
            continue
        offsets, whole = chunks[place.key].offsets, chunks[place.key].text
        (begin, first, _), (row, offset, length) = place.runs[0], place.runs[-1]
        if row + length == rows[0]:
            text = text.removeprefix(whole[int(offsets[offset + length - 1, 1]) :])
        if begin == rows[-1] + 1:
            text = text.removesuffix(whole[: int(offsets[first, 0])])
    return text.strip()


def _by_token(scores: CharacterScores, chunk: ChunkKV | None) -> CharacterScores:
    offsets = np.zeros((0, 2), dtype=np.int64) if chunk is None else chunk.offsets.numpy()
    each = np.arange(len(offsets))
    return CharacterScores(" " * len(offsets), np.stack([each, each + 1], axis=1), scores.over(offsets))
