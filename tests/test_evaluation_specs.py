"""Systems and data of an evaluation as they are written at the command line, and what is said of bad ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cacheclip_eval import Item
from cacheclip_eval.sources import max_new_tokens, sources
from cacheclip_eval.systems import parse
from eval_data import data, ruler
from tiny import tiny_backbone

from cacheclip_rag import ConfigurationError
from cacheclip_rag.methods import resolve
from cacheclip_rag.spec import PREFIXES


def parsed(
    *specs: str, ratio: float | None = None, sweeps: tuple[str, ...] = ()
) -> dict[str, tuple[Any, float | None]]:
    return {s.label: (s.recipe, s.ratio) for s in parse(specs, ratio, sweeps)}


def test_a_system_is_written_as_a_name_a_ratio_and_parameters() -> None:
    assert parsed("naive", "cacheclip@0.15", "cacheclip:layers=upper", "cacheclip@.3:group_size=4,layers=upper") == {
        "naive": (resolve("naive"), None),
        "cacheclip@0.15": (resolve("cacheclip"), 0.15),
        "cacheclip:layers=upper": (resolve("cacheclip", layers="upper"), None),
        "cacheclip@0.3:group_size=4,layers=upper": (resolve("cacheclip", group_size=4, layers="upper"), 0.3),
    }


def test_values_are_python_s_or_words_and_commas_in_brackets_and_quotes_stay() -> None:
    (one,) = parsed("query_guided: layers = (0.5, 0.75), normalise=chunk ,prefix='Read, please: it\"s @ 5'").values()
    assert one[0] == resolve("query_guided", layers=(0.5, 0.75), normalise="chunk", prefix='Read, please: it"s @ 5')


def test_the_names_of_prefixes() -> None:
    found = {
        label: recipe.encode.prefix
        for label, (recipe, _) in parsed("naive", sweeps=(f"prefix={','.join(PREFIXES)}",)).items()
    }
    assert found["naive:prefix=none"] == "" and found["naive:prefix=newline"] == "\n"
    assert found["naive:prefix=token"] == " " and found["naive:prefix=system"] is None
    assert len(found["naive:prefix=generic"]) > 20 and len(set(found.values())) == 5


def test_full_is_always_there_and_a_system_comes_once() -> None:
    assert list(parsed("full", "naive", "cacheclip@0.2", "naive", "cacheclip@.20")) == ["naive", "cacheclip@0.2"]


def test_a_method_that_finds_its_ratio_out_is_told_one_by_its_own_name_only() -> None:
    assert list(parsed("auto", "auto@0.1", "epic", ratio=0.3)) == ["auto", "auto@0.1", "epic@0.3"]
    assert list(parsed("auto", sweeps=("ratio=0.1,0.2",))) == ["auto@0.1", "auto@0.2"]


def test_the_ratio_for_all_is_for_those_that_recompute_a_share_and_are_not_given_one() -> None:
    assert list(parsed("naive", "cacheclip", "query_guided@0.5", ratio=0.1)) == [
        "naive",
        "cacheclip@0.1",
        "query_guided@0.5",
    ]


def test_sweeps_make_one_system_a_value() -> None:
    specs = ("naive", "cacheclip", "cacheclip@0.5", "query_guided:group_size=2")
    assert list(parsed(*specs, sweeps=("ratio=0.05,.1",))) == [
        "naive",
        "cacheclip@0.05",
        "cacheclip@0.1",
        "cacheclip@0.5",
        "query_guided@0.05:group_size=2",
        "query_guided@0.1:group_size=2",
    ]
    found = parsed(*specs, sweeps=("group_size=4,8",), ratio=0.3)
    assert list(found) == [
        "naive",
        "cacheclip@0.3:group_size=4",
        "cacheclip@0.3:group_size=8",
        "cacheclip@0.5:group_size=4",
        "cacheclip@0.5:group_size=8",
        "query_guided@0.3:group_size=2",
    ]
    assert found["cacheclip@0.5:group_size=4"] == (resolve("cacheclip", group_size=4), 0.5)
    assert len(parsed("cacheclip", sweeps=("group_size=4,8,16", "ratio=0.1,0.2"))) == 6


@pytest.mark.parametrize(
    ("specs", "sweeps", "said"),
    [
        (["cachclip"], [], 'did you mean "cacheclip".*naive'),
        (["cacheclip:windw=3"], [], "group_size, layers, .*prefix, .*threshold"),
        (["cacheclip:group_size=wide"], [], "group_size must be int, not 'wide'"),
        (["cacheclip:group_size=2.5"], [], "group_size must be int"),
        (["cacheclip:group_size=True"], [], "group_size must be int"),
        (["cacheclip:layers=uper"], [], "Literal.'last', 'upper'"),
        (["query_guided:layers=(1,2,3)"], [], "layers must be"),
        (["cacheclip:group_size"], [], "parameter=value"),
        (["cacheclip:group_size="], [], "parameter=value"),
        (["cacheclip:prefix=blank"], [], "none, token, newline, generic, system"),
        (["cacheclip:prefix=None"], [], "none, token, newline, generic, system"),
        (["cacheclip:prefix='open"], [], "left open"),
        (["query_guided:layers=(0.1,0.2"], [], "left open"),
        (["cacheclip@1.5"], [], "from 0"),
        (["cacheclip@"], [], "from 0 to 1"),
        (["cacheclip@much"], [], "from 0 to 1"),
        (["cacheclip"], ["ratio=0.1,2"], "from 0"),
        (["naive"], ["ratio=0.1"], "no method is left to sweep"),
        (["naive", "cacheclip"], ["windw=1"], "ratio, adapter, group_size, layers, prefix, threshold"),
        (["cacheclip"], ["group_size"], "name=value"),
        (["cacheclip"], ["group_size="], "name=value"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_valid(specs: list[str], sweeps: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse(specs, None, sweeps)


def test_data_are_files_folders_and_generated_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cacheclip_eval.ruler", ruler())
    file = data(tmp_path / "hotpot", "Who?")
    odd = data(tmp_path / "a=b", "Who?")
    found = sources([str(file.parent), str(file), f"mine={file}", "ruler:vt:900", str(odd.parent)])
    assert [s.name for s in found] == ["hotpot", "qa", "mine", "ruler:vt:900", "a=b"]
    assert [s.path for s in found] == [file, file, file, None, odd] and (found[3].task, found[3].tokens) == ("vt", 900)


@pytest.mark.parametrize(
    "spec", ["absent.jsonl", "x=absent", ".", "ruler:nope:900", "ruler:vt", "ruler:vt:many", "ruler:vt:9:9"]
)
def test_data_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.setitem(sys.modules, "cacheclip_eval.ruler", ruler())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="niah_single, vt" if "ruler" in spec else "there is no data"):
        sources([spec])


def test_two_sets_of_one_name(tmp_path: Path) -> None:
    one, two = data(tmp_path / "one", "Who?"), data(tmp_path / "two", "Who?")
    with pytest.raises(ConfigurationError, match="name=FILE"):
        sources([str(one), str(two)])


def test_lists_get_longer_answers() -> None:
    question = Item("1", "", (), ())
    backbone = tiny_backbone()
    assert max_new_tokens([question], backbone) == max_new_tokens([], backbone) == 32
    assert max_new_tokens([question, Item("2", "", (), (), meta={"all_answers_required": False})], backbone) == 64
    long = "bb3ba2a5-7de8-434b-a86e-a88bb9fa7289" * 2
    assert max_new_tokens([question, Item("3", "", (long,), ())], backbone) == len(backbone.tokenise(long)) + 8 > 32


def test_a_file_can_be_narrowed_by_its_meta(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    record = {"question": "?", "answers": ["a"], "passages": [{"title": "", "text": "text"}]}
    file.write_text("".join(json.dumps({**record, "id": i, "meta": {"size": 2000 + i % 2}}) + "\n" for i in range(6)))
    (source,) = sources([f"small={file}?size=2000"])
    assert source.name == "small" and [item.id for item in source.items(9, tiny_backbone())] == ["0", "2", "4"]
    with pytest.raises(ConfigurationError, match="holds no item"):
        sources([f"{file}?size=3"])[0].items(9, tiny_backbone())
    with pytest.raises(ConfigurationError, match="key=value"):
        sources([f"{file}?size"])


def test_items_can_be_shortened_to_the_passages_that_matter(tmp_path: Path) -> None:
    passages = [{"title": "", "text": text} for text in ["one", "two", "The ANSWER is here", "four", "five"]]
    passages[4]["is_supporting"] = True
    file = tmp_path / "qa.jsonl"
    records = [
        {"id": i, "question": "?", "answers": ["answer"], "passages": passages, "meta": {"n": i}} for i in (1, 2)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))

    def kept(spec: str) -> list[list[str]]:
        items = sources([f"{file}?{spec}"])[0].items(9, tiny_backbone())
        return [[passage.text for passage in item.passages] for item in items]

    assert kept("passages=1") == [["five"]] * 2  # what is marked, then what holds an answer, then the first
    assert kept("n=2&passages=2") == [["The ANSWER is here", "five"]]
    assert kept("passages=3&n=1") == [["one", "The ANSWER is here", "five"]]
    assert kept("passages=9&n=1") == [[passage["text"] for passage in passages]]
    # What passages are fused with comes from the same set: not from questions left out, not from longer prompts.
    everything = sources([f"{file}?n=2&passages=2"])[0].all()
    assert [(item.id, [p.text for p in item.passages]) for item in everything] == [
        ("2", ["The ANSWER is here", "five"])
    ]
    for wrong in ("passages=0", "passages=many"):
        with pytest.raises(ConfigurationError, match="1 or more"):
            kept(wrong)
