"""Questions for training, for stopping and for reporting, so that no document is in two of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cacheclip_eval.data import Item

from cacheclip_rag.errors import ConfigurationError


@dataclass(frozen=True)
class Split:
    """Items to ``train`` on, to ``stop`` by, and to ``report`` on; ``documents``: the titles of each part, by data set.

    No passage of a document to report on is in an item of the other two, nor one of a document to stop by in ``train``.
    """

    train: Sequence[Item]
    stop: Sequence[Item]
    report: Sequence[Item]
    documents: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)


def split(sets: Mapping[str, Sequence[Item]], stop: int, report: int, seed: int = 0, answers: bool = True) -> Split:
    """Split each data set by the documents that its questions are about: ``stop`` documents to stop by, ``report`` to
    report on, all others to train on.

    A question is about its first supporting passage's title, else about itself. Questions without an answer are left
    out if ``answers`` are needed. Raises `ConfigurationError` without any, and for a set of too few documents.
    """
    parts: dict[str, list[Item]] = {"train": [], "stop": [], "report": []}
    documents = {}
    for name, given in sets.items():
        items = [item for item in given if item.passages and item.question.strip()]
        if answers:
            items = [item for item in items if any(answer.strip() for answer in item.answers)]
        if not items:
            raise ConfigurationError(
                f"{name} holds no question with {'an answer and ' if answers else ''}passages: training needs lines of "
                '{"id", "question", "answers", "passages"} (docs/evaluation.md)'
            )
        titles = sorted({_document(item) for item in items})
        if len(titles) < stop + report + 1:
            raise ConfigurationError(
                f"{name} asks about {len(titles)} documents: with {stop} to stop by and {report} to report on, at "
                f"least {stop + report + 1} are needed; give more documents, or lower --stop-documents and "
                "--report-documents"
            )
        random.Random(seed).shuffle(titles)
        cuts = {"report": titles[:report], "stop": titles[report : report + stop], "train": titles[report + stop :]}
        documents[name] = {part: sorted(chosen) for part, chosen in cuts.items()}
        for part, chosen in cuts.items():
            unseen = {"train": [*cuts["stop"], *cuts["report"]], "stop": cuts["report"]}.get(part, [])
            parts[part] += [_without(item, unseen) for item in items if _document(item) in set(chosen)]
    return Split(**parts, documents=documents)


def _document(item: Item) -> str:
    return next((passage.title for passage in item.passages if passage.supporting and passage.title), item.id)


def _without(item: Item, titles: Sequence[str]) -> Item:
    return replace(item, passages=tuple(passage for passage in item.passages if passage.title not in titles))
