"""Generated long-context tasks after RULER (hsiehjackson/RULER, arXiv:2404.06654), of any length, without data files.

Needles are hidden in prose, each in a passage of its own, so that a question about several cannot be answered from one
chunk. Numbers of needles, wordings and scoring are RULER's. Differences: the prose is generated unless the caller
provides some, and variable names consist of consonants only, so that they do not occur in prose by chance.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import TypeVar

from cacheclip_rag.errors import ConfigurationError

from .data import Item, Passage

T = TypeVar("T")

STOPS = ".!?"

TOLERANCE = 0.02
"""The maximum relative error of an item's length."""

LEAST = 150
"""Characters of the shortest passage: a needle (at most 70), its title, and as much prose."""

_SHAPES = {  # keys (of vt: variables), values a key, keys asked for
    "niah_single": (1, 1, 1),
    "niah_multikey": (4, 1, 1),
    "niah_multivalue": (1, 4, 1),
    "niah_multiquery": (4, 1, 4),
    "vt": (5, 1, 5),
}
TASKS: tuple[str, ...] = tuple(_SHAPES)

# No word of a key occurs in the prose, and none begins or ends another, so that no key occurs in another.
KEYS = (
    "amber brisk cobalt dusky eager frosty gentle hollow ivory jolly keen lunar mellow nimble opaque placid quaint "
    "rustic silent tender urban velvet wistful young zesty",
    "anchor beacon cactus dolphin ember falcon glacier hammock island jigsaw kettle lagoon magnet nutmeg orchid "
    "pelican quartz raven saddle tulip urchin violin walnut yacht zeppelin",
)
_PROSE = {
    "who": "baker carpenter clerk doctor driver farmer gardener judge mason miller nurse painter pilot potter sailor",
    "what": "basket bell boat bottle broom candle cart chair clock coat door drum fence ladder lamp map net wheel",
    "how": "cheap clean dark dusty familiar grey heavy large narrow new plain rough small strange thin wet wide wooden",
    "did": "bought carried cleaned counted dropped fetched found lifted lost mended moved noticed repaired sold",
    "where": "at the market|behind the mill|beside the road|by the river|in the square|on the hill|under the trees",
    "when": "after dinner|at dawn|before noon|during the rain|every autumn|late at night|on Monday|on the way home",
}
_WORDS = {name: words.split("|" if "|" in words else " ") for name, words in _PROSE.items()}
_SENTENCES = (
    "The <who> <did> the <how> <what> <where>.",
    "The <who> and the <who> <did> a <what> <when>.",
    "Nobody knew who <did> the <what> <where>.",
    "It was the <who> who <did> every <how> <what> <when>.",
    "A <how> <what> stood <where>, and the <who> <did> it.",
    "When the <who> <did> the <what>, the <who> was still <where>.",
    "Some said that the <what> was <how>, others that it was only <how>.",
    "The <what> looked <how> <when>, but the <who> never <did> it.",
)


@dataclass(frozen=True)
class _Riddle:
    """A question and its needles: the first ``asked`` needles contain the answers, the others are distractors."""

    question: str
    answers: list[str]
    needles: list[str]
    asked: int


def generate(
    task: str,
    *,
    tokens: int,
    seed: int,
    count: Callable[[str], int] | None = None,
    passage_chars: int = 2000,
    haystack: Sequence[str] | None = None,
) -> Item:
    """One item whose passages, as they stand in a prompt, have ``tokens`` tokens within ``TOLERANCE``.

    ``count`` says how many tokens a text has (default: a quarter of its characters). Passages have about
    ``passage_chars`` characters, fewer where there would otherwise not be one for every needle. ``haystack``: texts to
    hide the needles in, from one that ``seed`` chooses onwards, round and round; no key or answer occurs in what is
    used of them. The same arguments give the same item on every machine and Python.

    ``meta``: ``task``, ``approx_tokens``, ``all_answers_required``, ``supporting`` (for each passage, whether it holds
    a needle that the answers depend on) and ``depth`` (0..1, where the first of these needles begins).

    Raises ConfigurationError for an unknown task, a length or passage too short, and an unusable haystack or count.
    """
    if task not in TASKS:
        raise ConfigurationError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    if passage_chars < LEAST:
        raise ConfigurationError(f"passage_chars must be at least {LEAST}, not {passage_chars}")
    if isinstance(haystack, str) or (haystack is not None and not any(text.split() for text in haystack)):
        raise ConfigurationError("a haystack is a list of texts, at least one of them not blank")
    least = LEAST * _SHAPES[task][0] * _SHAPES[task][1]
    chars = max(least, 4 * tokens)
    for _ in range(10):  # tokens are nearly proportional to characters, so two or three rounds suffice
        item, context = _item(task, tokens, seed, chars, passage_chars, haystack)
        counted = count(context) if count else len(context) // 4
        if abs(counted - tokens) <= TOLERANCE * tokens:
            return item
        last, chars = chars, max(least, min(chars * tokens // max(1, counted), 100 * tokens))
        if chars == last:
            break
    raise ConfigurationError(
        f"{task} cannot have {tokens} tokens: {len(context)} characters have {counted}, and its needles take {least}"
    )


def write(
    path: str | Path,
    tasks: Sequence[str],
    lengths: Sequence[int],
    per_cell: int,
    seed: int,
    *,
    count: Callable[[str], int] | None = None,
    passage_chars: int = 2000,
    haystack: Sequence[str] | None = None,
) -> list[Item]:
    """Write ``per_cell`` items for every task and length (tokens) as JSONL for ``data.read``, and return them.

    Their seeds are ``seed``, ``seed + 1``, ...; the rest is ``generate``'s. Nothing is written if it raises.
    """
    items = [
        generate(task, tokens=tokens, seed=seed + i, count=count, passage_chars=passage_chars, haystack=haystack)
        for task in tasks
        for tokens in lengths
        for i in range(per_cell)
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(asdict(item)).encode() + b"\n" for item in items))
    return items


def _item(
    task: str, tokens: int, seed: int, chars: int, passage_chars: int, haystack: Sequence[str] | None
) -> tuple[Item, str]:
    """An item whose passages have ``chars`` characters, up to a word, and these passages as in ``data.prompt``."""
    words = _words(sentences(random.Random(f"prose {task} {tokens} {seed}"), haystack), chars)
    rng = random.Random(f"{task} {tokens} {seed}")  # another, so that the needles stay the same in every round
    text = " ".join(words).lower()
    riddle = (_variables if task == "vt" else _magic)(rng, text, *_SHAPES[task])
    number = max(len(riddle.needles), min(round(chars / passage_chars), chars // LEAST))
    places = sorted(range(number), key=lambda _: rng.random())[: len(riddle.needles)]
    if task == "vt":
        places.sort()  # a variable is assigned before it is used
    needles = dict(zip(places, riddle.needles, strict=True))

    ends = list(accumulate(len(word) + 1 for word in words))
    passages, start, other = [], 0, 0
    for i in range(number):
        title, needle = f"part {i + 1}", needles.get(i, "")
        other += len(title) + 2 + (len(needle) + 1 if needle else 0)  # characters that are no prose
        stop = bisect_right(ends, chars * (i + 1) // number - other)
        if i + 1 < number:  # end with a sentence, if one ends in the second half, and leave the rest to the next
            stop = next((j for j in range(stop, (start + stop) // 2, -1) if words[j - 1][-1] in STOPS), stop)
        prose, start = words[start:stop], stop
        if needle:
            gaps = [j + 1 for j, word in enumerate(prose) if word[-1] in STOPS]
            prose.insert(_pick(rng, gaps or range(len(prose) + 1)), needle)
        passages.append(Passage(title, " ".join(prose)))

    context, required = "\n\n".join(passage.chunk for passage in passages), len(riddle.answers) > 1
    meta = {
        "task": task,
        "approx_tokens": tokens,
        "all_answers_required": required,
        "supporting": [i in places[: riddle.asked] for i in range(number)],
        "depth": round(min(context.index(needle) for needle in riddle.needles[: riddle.asked]) / len(context), 3),
    }
    identity = f"{task}-{tokens}-{seed}"
    return Item(identity, riddle.question, tuple(riddle.answers), tuple(passages), required, meta), context


def _magic(rng: random.Random, text: str, keys: int, values_each: int, queries: int) -> _Riddle:
    adjectives, nouns = (words.split() for words in KEYS)
    names = _distinct(lambda: f"{_pick(rng, adjectives)}-{_pick(rng, nouns)}", keys, text)
    values = _distinct(lambda: str(1_000_000 + int(rng.random() * 9_000_000)), keys * values_each, text)
    needles = [f"One of the special magic numbers for {names[i // values_each]} is: {v}." for i, v in enumerate(values)]
    asked = queries * values_each
    what = "What are all the special magic numbers" if asked > 1 else "What is the special magic number"
    query = ", ".join(names[: queries - 1]) + f", and {names[queries - 1]}" if queries > 1 else names[0]
    return _Riddle(f"{what} for {query} mentioned in the provided text?", values[:asked], needles, asked)


def _variables(rng: random.Random, text: str, number: int, *_: int) -> _Riddle:
    names = _distinct(lambda: "".join(_pick(rng, "BCDFGHJKLMNPQRSTVWXZ") for _ in range(5)), number, text)
    [value] = _distinct(lambda: str(10_000 + int(rng.random() * 90_000)), 1, text)
    sources = [value, *(f"VAR {name}" for name in names)]
    needles = [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]
    question = f"Find all variables that are assigned the value {value} in the text above."
    return _Riddle(question, names, needles, len(needles))


def _distinct(draw: Callable[[], str], number: int, text: str) -> list[str]:
    """Different draws that do not occur in ``text``, which is lower case as in scoring."""
    draws = (draw() for _ in range(1000))
    found = list(islice(dict.fromkeys(word for word in draws if word.lower() not in text), number))
    if len(found) < number:
        raise ConfigurationError("the haystack is full of what needles are made of: choose another")
    return found


def _words(texts: Iterator[str], chars: int) -> list[str]:
    """Words of ``chars`` characters in total; longer ones are split at 24, for scripts without blanks."""
    words: list[str] = []
    while chars > 0:
        for word in next(texts).split():
            words += [word[i : i + 24] for i in range(0, len(word), 24)]
            chars -= len(word) + 1
    return words


def sentences(rng: random.Random, haystack: Sequence[str] | None = None) -> Iterator[str]:
    """An endless sequence of sentences: generated, or the haystack's, from a random place in it on."""
    if haystack is not None:
        yield from islice(cycle(haystack), int(rng.random() * len(haystack)), None)
    while True:
        yield re.sub(r"<(\w+)>", lambda slot: _pick(rng, _WORDS[slot[1]]), _pick(rng, _SENTENCES))


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    # Python guarantees reproducible numbers across versions for `random()`, but not for `choice` and `sample`.
    return options[int(rng.random() * len(options))]
