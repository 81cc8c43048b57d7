"""RULER's tasks, made on the spot: what is hidden where, how long it is, and that it is the same every time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from cacheclip_eval import Item, read, ruler
from cacheclip_eval.answers import score
from cacheclip_eval.ruler import LEAST, TASKS, TOLERANCE, generate, write
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheclip_rag.errors import ConfigurationError

MAGIC = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")
ASSIGNMENT = re.compile(r"VAR ([A-Z]{5}) = (?:(\d{5})|VAR ([A-Z]{5}))\.")
NIAH = tuple(task for task in TASKS if task != "vt")
NEEDLES = {"niah_single": 1, "niah_multikey": 4, "niah_multivalue": 4, "niah_multiquery": 4, "vt": 5}


def context(item: Item) -> str:
    """The passages as they stand in a prompt."""
    return "\n\n".join(passage.chunk for passage in item.passages)


def holding(item: Item, text: str) -> list[int]:
    return [i for i, passage in enumerate(item.passages) if text in passage.text]


def supporting(item: Item) -> list[int]:
    return [i for i, flag in enumerate(item.meta["supporting"]) if flag]


def needles(item: Item) -> list[tuple[int, re.Match[str]]]:
    """Every needle with the number of its passage, in the order of the text."""
    pattern = ASSIGNMENT if item.meta["task"] == "vt" else MAGIC
    return [(i, match) for i, passage in enumerate(item.passages) for match in pattern.finditer(passage.text)]


@cache
def items(*tasks: str, seeds: int = 4) -> list[Item]:
    return [
        generate(task, tokens=tokens, seed=seed)
        for task in tasks
        for tokens in (500, 1500, 9000)
        for seed in range(seeds)
    ]


# ---- what is hidden where ----------------------------------------------------------------------------------------


def test_the_tasks() -> None:
    assert TASKS == ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt")


@pytest.mark.parametrize("task", TASKS)
def test_every_needle_is_whole_and_has_a_passage_of_its_own(task: str) -> None:
    for item in items(task):
        found = needles(item)
        assert len(found) == len({i for i, _ in found}) == NEEDLES[task]
        assert context(item).count("VAR " if task == "vt" else "magic") == (9 if task == "vt" else NEEDLES[task])


@pytest.mark.parametrize("task", NIAH)
def test_every_answer_stands_once_and_in_a_supporting_passage(task: str) -> None:
    for item in items(task):
        assert len(set(item.answers)) == len(item.answers)
        places = [holding(item, answer) for answer in item.answers]
        assert sorted(places) == [[i] for i in supporting(item)]
        assert all(context(item).count(answer) == 1 for answer in item.answers)
        assert len(item.meta["supporting"]) == len(item.passages)


@pytest.mark.parametrize("task", TASKS)
def test_keys_and_values_are_unique(task: str) -> None:
    for item in items(task):
        keys, values = zip(*(match.groups()[:2] for _, match in needles(item)), strict=True)
        assert len(set(keys)) == (1 if task == "niah_multivalue" else NEEDLES[task])
        assert all(a not in b for a in set(keys) for b in set(keys) - {a})
        assert len(set(values) - {None}) == (1 if task == "vt" else NEEDLES[task])


def test_keys_are_unique_however_few_words_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler, "KEYS", ("mute shy", "bee fly"))
    item = generate("niah_multikey", tokens=500, seed=0)
    assert {match[1] for _, match in needles(item)} == {"mute-bee", "mute-fly", "shy-bee", "shy-fly"}


@pytest.mark.parametrize("task", ["niah_single", "niah_multikey"])
def test_one_number_is_asked_for(task: str) -> None:
    for item in items(task):
        numbers = {match[1]: match[2] for _, match in needles(item)}
        [key] = [key for key in numbers if key in item.question]
        assert item.question == f"What is the special magic number for {key} mentioned in the provided text?"
        assert item.answers == (numbers[key],)
        assert supporting(item) == holding(item, key)  # the others' needles distract
        assert not item.all_answers


def test_all_numbers_of_a_key_are_asked_for() -> None:
    for item in items("niah_multivalue"):
        [key] = {match[1] for _, match in needles(item)}
        assert item.question == f"What are all the special magic numbers for {key} mentioned in the provided text?"
        assert set(item.answers) == {match[2] for _, match in needles(item)}
        assert item.all_answers


def test_the_numbers_of_several_keys_are_asked_for() -> None:
    for item in items("niah_multiquery"):
        numbers = {match[1]: match[2] for _, match in needles(item)}
        a, b, c, d = (key for answer in item.answers for key, number in numbers.items() if number == answer)
        keys = f"{a}, {b}, {c}, and {d}"
        assert item.question == f"What are all the special magic numbers for {keys} mentioned in the provided text?"
        assert item.all_answers


def test_executing_the_assignments_gives_the_answers() -> None:
    for item in items("vt"):
        variables: dict[str, str] = {}
        names = [match[1] for _, match in needles(item)]
        assert [match[3] for _, match in needles(item)] == [None, *names[:-1]]  # one chain, four hops
        for i, match in needles(item):
            name, value, source = match.groups()
            assert name not in variables and item.meta["supporting"][i]
            variables[name] = value or variables[source]  # KeyError: used before it was assigned
        [value] = re.findall(r"\d+", item.question)
        assert item.question == f"Find all variables that are assigned the value {value} in the text above."
        assert item.answers == tuple(name for name in variables if variables[name] == value)
        assert len(item.answers) == 5 and item.all_answers
        assert context(item).count(value) == 1


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_scored_as_rulers(task: str) -> None:
    item = generate(task, tokens=1000, seed=0)
    assert item.contained
    assert score(item, f"They are {' and '.join(item.answers)}, I think.".lower()) == 1.0
    assert score(item, item.answers[-1]) == pytest.approx(1 / len(item.answers))
    others = {match[2] for _, match in needles(item)} - set(item.answers) if task in NIAH else set()
    assert score(item, f"{others} {item.question}") == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_needles_stand_between_sentences(task: str) -> None:
    for item in items(task):
        for i, match in needles(item):
            before = item.passages[i].text[: match.start()]
            assert before.endswith(". ") and len(before) > 10
            assert item.passages[i].text[match.end() :][:1] in ("", " ")


def test_passages_but_the_last_end_with_a_sentence() -> None:
    for item in items(*TASKS):
        assert all(passage.text.endswith(".") for passage in item.passages[:-1])


def test_the_depth_is_where_the_first_needle_asked_for_begins() -> None:
    for item in items(*TASKS):
        text = context(item)
        starts = [text.index(match[0]) for i, match in needles(item) if item.meta["supporting"][i]]
        assert item.meta["depth"] == pytest.approx(min(starts) / len(text), abs=1e-3)


def test_needles_lie_at_all_depths() -> None:
    depths = [generate("niah_single", tokens=4000, seed=seed).meta["depth"] for seed in range(40)]
    assert {int(4 * depth) for depth in depths} == {0, 1, 2, 3}


def test_numbers_are_not_asked_for_in_the_order_of_the_text() -> None:
    for task in ("niah_multivalue", "niah_multiquery"):
        in_order = [tuple(match[2] for _, match in needles(item)) == item.answers for item in items(task)]
        assert sum(in_order) < len(in_order) / 3


# ---- how long it is ----------------------------------------------------------------------------------------------


def words(text: str) -> int:
    return len(text.split())


def pieces(text: str) -> int:
    """Much like a tokenizer: digits count one each."""
    return len(re.findall(r"\d|[^\W\d]{1,6}|[^\w\s]", text))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [500, 777, 2000, 16_000, 128_000])
def test_an_item_is_as_long_as_asked_for(task: str, tokens: int) -> None:
    item = generate(task, tokens=tokens, seed=tokens)
    assert 0 <= 4 * tokens - len(context(item)) < 30  # a quarter of the characters, to the word
    assert item.meta["approx_tokens"] == tokens and item.meta["task"] == task


@given(
    task=st.sampled_from(TASKS),
    tokens=st.integers(500, 4000),
    seed=st.integers(),
    count=st.sampled_from([words, pieces]),
    passage_chars=st.integers(LEAST, 4000),
)
@settings(max_examples=40, deadline=None)
def test_tokens_are_counted_as_the_caller_says(
    task: str, tokens: int, seed: int, count: Callable[[str], int], passage_chars: int
) -> None:
    item = generate(task, tokens=tokens, seed=seed, count=count, passage_chars=passage_chars)
    assert abs(count(context(item)) - tokens) <= TOLERANCE * tokens
    assert len({i for i, _ in needles(item)}) == NEEDLES[task]
    assert all(len(passage.text) >= LEAST / 3 for passage in item.passages)


@pytest.mark.parametrize("passage_chars", [LEAST, 600, 2000, 5000])
def test_passages_have_about_the_length_asked_for(passage_chars: int) -> None:
    item = generate("vt", tokens=8000, seed=1, passage_chars=passage_chars)
    lengths = [len(passage.chunk) for passage in item.passages]
    assert sum(lengths) / len(lengths) == pytest.approx(passage_chars, rel=0.12)
    assert all(abs(length - passage_chars) <= max(160, 0.2 * passage_chars) for length in lengths)
    assert [passage.title for passage in item.passages] == [f"part {i + 1}" for i in range(len(lengths))]


@pytest.mark.parametrize("tokens", [320, 330, 500, 510, 740, 760, 1100])
@pytest.mark.parametrize("passage_chars", [LEAST, 2000])
def test_no_passage_is_far_from_that_length(tokens: int, passage_chars: int) -> None:
    number = len(generate("niah_single", tokens=tokens, seed=0, passage_chars=passage_chars).passages)
    mean = 4 * tokens / number
    assert mean >= LEAST and (number == 1 or mean >= 0.7 * passage_chars) and mean <= 2 * passage_chars


def test_a_passage_is_cut_back_to_half_at_most() -> None:
    texts = ["Yes. " + "word " * 200]
    item = generate("niah_multikey", tokens=4000, seed=0, passage_chars=1000, haystack=texts)
    assert all(500 <= len(passage.chunk) <= 1550 for passage in item.passages)


def test_prose_does_not_repeat_itself() -> None:
    texts = [passage.text for passage in generate("niah_single", tokens=32_000, seed=0).passages]
    assert all(a[:200] != b[:200] for a, b in combinations(texts, 2))


# ---- the same every time -----------------------------------------------------------------------------------------


def test_an_item_is_the_same_forever() -> None:
    # Published rows name items by task, length and seed; another Python, machine or hash seed must not change them.
    text = json.dumps([[i.id, i.question, i.answers, context(i), i.meta] for i in items(*TASKS, seeds=1)])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "1fb81cfd6da5232663218b40a62f2413e24af2131ab29ee6f8ce78a9dbf05194"
    )


def test_items_differ() -> None:
    made = items(*TASKS)
    assert len({i.id for i in made}) == len({i.passages[0].text[:100] for i in made}) == len(made)
    assert len({i.answers for i in made}) == len(made)


def test_how_length_is_measured_does_not_change_what_is_hidden() -> None:
    for task in TASKS:
        one, two = generate(task, tokens=900, seed=5), generate(task, tokens=900, seed=5, count=words)
        assert len(context(one)) < 0.9 * len(context(two))
        assert (one.question, one.answers) == (two.question, two.answers)


# ---- the caller's haystack ---------------------------------------------------------------------------------------

RULERS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def prose(item: Item) -> str:
    """What is no needle."""
    return re.sub(r"(VAR|One of the special magic)[^.]*\. ?", "", " ".join(p.text for p in item.passages))


@pytest.mark.parametrize("task", TASKS)
def test_needles_are_hidden_in_the_callers_texts(task: str) -> None:
    item = generate(task, tokens=1200, seed=2, haystack=[RULERS])
    found = prose(item).split()
    assert found == (RULERS.split() * 60)[: len(found)] and len(found) > 800
    assert len({i for i, _ in needles(item)}) == NEEDLES[task]


def test_the_texts_follow_each_other_from_one_chosen_by_the_seed() -> None:
    texts = ["One, then.", " two \n two", "", "3 3 3!"]
    order = "One, then. two two 3 3 3! " * 2
    starts = set()
    for seed in range(20):
        text = prose(generate("niah_single", tokens=300, seed=seed, haystack=texts))
        starts.add(text[:3])
        assert text[:24] in order
    assert starts == {"One", "two", "3 3"}


ODD = {
    "no punctuation": ["word " * 7],
    "no blanks": ["字" * 3000],
    "one long text": ["Some words, and then some more. " * 5000],
    "line and paragraph ends": ["one\n\ntwo\r\nthree\u2028four. five\u0085six"],
    "one letter": ["a"],
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("task", TASKS)
def test_any_haystack_will_do(task: str, name: str) -> None:
    item = generate(task, tokens=1000, seed=3, haystack=ODD[name], passage_chars=700)
    assert abs(len(context(item)) / 4 - 1000) <= TOLERANCE * 1000
    assert len({i for i, _ in needles(item)}) == NEEDLES[task]
    assert all(set(supporting(item)) >= set(holding(item, answer)) != set() for answer in item.answers)


def test_no_key_and_no_answer_occurs_in_the_haystack() -> None:
    plain = generate("niah_multiquery", tokens=2000, seed=4)
    taken = [match[n] for _, match in needles(plain) for n in (1, 2)]
    item = generate("niah_multiquery", tokens=2000, seed=4, haystack=[f"It says {' or '.join(taken).title()} here."])
    assert not any(word in item.question or word in item.answers for word in taken)
    chain = generate("vt", tokens=2000, seed=4)
    taken = [*chain.answers, *re.findall(r"\d+", chain.question)]
    item = generate("vt", tokens=2000, seed=4, haystack=[f"It says {' or '.join(taken).lower()} here."])
    assert not any(word in item.question or word in item.answers for word in taken)


# ---- what cannot be made -----------------------------------------------------------------------------------------


def test_an_unknown_task_is_told_the_valid_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'qa'.*niah_single, niah_multikey, .*, vt"):
        generate("qa", tokens=1000, seed=0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [-5, 0, 10, 30])
def test_too_short_for_the_needles(task: str, tokens: int) -> None:
    with pytest.raises(
        ConfigurationError, match=f"{task} cannot have {tokens} tokens.*needles take {LEAST * NEEDLES[task]}"
    ):
        generate(task, tokens=tokens, seed=0)


@pytest.mark.parametrize("task", TASKS)
def test_where_too_short_begins(task: str) -> None:
    tokens = LEAST * NEEDLES[task] // 4
    assert len(generate(task, tokens=tokens + 1, seed=0).passages) == NEEDLES[task]
    with pytest.raises(ConfigurationError, match="cannot have"):
        generate(task, tokens=int(0.9 * tokens), seed=0)


@pytest.mark.parametrize("passage_chars", [-1, 0, LEAST - 1])
def test_passages_too_short_for_a_needle(passage_chars: int) -> None:
    with pytest.raises(ConfigurationError, match=f"at least {LEAST}, not {passage_chars}"):
        generate("niah_single", tokens=1000, seed=0, passage_chars=passage_chars)


@pytest.mark.parametrize("haystack", [[], ["", " \n"], "one text is no list of texts"])
def test_no_haystack(haystack: Any) -> None:
    with pytest.raises(ConfigurationError, match="list of texts"):
        generate("vt", tokens=1000, seed=0, haystack=haystack)


def test_a_haystack_that_leaves_no_number_to_hide() -> None:
    every = "".join(f"{n:05}" for n in range(10_000, 100_000))
    with pytest.raises(ConfigurationError, match="choose another"):
        generate("vt", tokens=200_000, seed=0, haystack=[" ".join(every[i : i + 5] for i in range(0, len(every), 5))])


@pytest.mark.parametrize("constant", [0, 1, 10**9])
def test_a_count_that_does_not_count(constant: int) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot have 500 tokens.* have {constant},"):
        generate("vt", tokens=500, seed=0, count=lambda text: constant)


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("haystack", [None, ["Où est\u2028le 🦊? Là."]])
def test_what_is_written_is_read(tmp_path: Path, haystack: list[str] | None) -> None:
    path = tmp_path / "made" / "qa.jsonl"
    made = write(path, TASKS, [500, 1000], 2, 7, passage_chars=900, haystack=haystack)
    assert read(path) == made
    assert made == [
        generate(task, tokens=tokens, seed=seed, passage_chars=900, haystack=haystack)
        for task in TASKS
        for tokens in (500, 1000)
        for seed in (7, 8)
    ]
    assert len({item.id for item in made}) == 20


def test_the_count_is_passed_on(tmp_path: Path) -> None:
    [item] = write(str(tmp_path / "qa.jsonl"), ["vt"], [700], 1, 0, count=words)
    assert words(context(item)) == pytest.approx(700, rel=TOLERANCE)


def test_nothing_is_written_if_anything_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "made" / "qa.jsonl"
    with pytest.raises(ConfigurationError):
        write(path, ["vt"], [1000, 10], 1, 0)
    assert not path.parent.exists()
