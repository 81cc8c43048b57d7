"""Sources of items: files in our format, and generated RULER tasks."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.model.backbone import Backbone

from .data import Item, passages, read, shortened, shuffled, spread


@dataclass(frozen=True)
class Source:
    """A data set by ``name``: the file ``path``, or the RULER ``task`` at a length of ``tokens``.

    ``only``: keys of the items' ``meta``, and the values they must have, as text. ``passages``: the maximum number of
    passages per item (`shortened`). ``ids``: the items that may be asked, None for all; the others' passages still
    belong to the knowledge base. ``order``: the seed of another order of each item's passages (`shuffled`).
    """

    name: str
    path: Path | None = None
    task: str = ""
    tokens: int = 0
    only: Mapping[str, str] = field(default_factory=dict)
    passages: int | None = None
    ids: Collection[str] | None = None
    order: int = 0

    def all(self) -> list[Item]:
        """All items of the file that meet the conditions, shortened; empty for a generated set."""
        if self.path is None:
            return []
        wanted = (shortened(item, self.passages) for item in read(self.path) if self._wanted(item))
        return [shuffled(item, self.order) for item in wanted]

    def corpus(self) -> list[str]:
        """The passages of ``corpus.jsonl`` beside the file: further passages of the same knowledge base."""
        file = None if self.path is None else self.path.parent / "corpus.jsonl"
        return [] if file is None or not file.is_file() else passages(file)

    def items(self, count: int, backbone: Backbone) -> list[Item]:
        """``count`` items: spread evenly over the file, or generated with the seeds 0.. and lengths in the model's
        tokens. Raises `ConfigurationError` if there are none.
        """
        if self.path is not None:
            asked = [item for item in self.all() if self.ids is None or item.id in self.ids]
            items = spread(asked, count)
        else:
            items = [
                _ruler().generate(
                    self.task, tokens=self.tokens, seed=seed, count=lambda text: len(backbone.tokenise(text))
                )
                for seed in range(count)
            ]
        if not items:
            raise ConfigurationError(f"{self.name} holds no item")
        return items

    def _wanted(self, item: Item) -> bool:
        return all(str(item.meta.get(key)) == value for key, value in self.only.items())


def max_new_tokens(items: Sequence[Item], backbone: Backbone) -> int:
    """The maximum length of an answer: 32 tokens (as in CacheBlend), or 8 more than the longest right answer; 64 for
    RULER's lists.
    """
    if any(item.contained for item in items):
        return 64
    return max(32, *(len(backbone.tokenise(answer)) + 8 for item in items for answer in item.answers), 0)


def sources(specs: Sequence[str]) -> list[Source]:
    """The sources of ``specs``: ``[name=]FILE``, ``[name=]FOLDER`` (that contains ``qa.jsonl``), ``ruler:TASK:TOKENS``.

    ``?key=value&key=value`` behind a file or folder takes only items with these values in ``meta``; ``?passages=5``
    keeps five passages of each item. The default name of a file is its stem, of a folder its own name.

    Raises `ConfigurationError` for missing files, an unknown task, and two sets with one name.
    """
    found = [_source(spec) for spec in specs]
    names = [source.name for source in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigurationError(f"two data sets are called {', '.join(sorted(twice))}: write name=FILE")
    return found


def _source(spec: str) -> Source:
    if spec.startswith("ruler:"):
        return _generated(spec)
    spec, asks, conditions = spec.partition("?")
    only = dict(_condition(spec, condition) for condition in conditions.split("&")) if asks else {}
    passages = _passages(spec, only.pop("passages", None))
    name, _, rest = spec.rpartition("=") if not Path(spec).exists() else ("", "", spec)
    path = Path(rest)
    file = path / "qa.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ConfigurationError(
            f"there is no data {file}: give JSONL files, folders with a qa.jsonl, ruler:TASK:TOKENS"
        )
    name = name or (path.resolve().name if path.is_dir() else path.stem)
    return Source(name, file, only=only, passages=passages)


def _condition(spec: str, condition: str) -> tuple[str, str]:
    key, _, value = condition.partition("=")
    if not (key and value):
        raise ConfigurationError(f"{spec}?{condition}: write FILE?key=value, a key of the items' meta and its value")
    return key, value


def _passages(spec: str, written: str | None) -> int | None:
    if written is not None and not (written.isdecimal() and int(written) > 0):
        raise ConfigurationError(f"{spec}?passages={written}: write how many passages to keep, 1 or more")
    return None if written is None else int(written)


def _generated(spec: str) -> Source:
    tasks: Sequence[str] = _ruler().TASKS
    _, task, tokens = (*spec.split(":"), "", "")[:3]
    if task not in tasks or not tokens.isdecimal() or spec.count(":") != 2:
        raise ConfigurationError(f"{spec}: write ruler:TASK:TOKENS, TASK being one of {', '.join(tasks)}")
    return Source(spec, task=task, tokens=int(tokens))


def _ruler() -> Any:
    return importlib.import_module(".ruler", __package__)
