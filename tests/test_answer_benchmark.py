"""benchmarks/answer.py: every system gets the same prompts, and what cannot run is said, not left away."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import PASSAGES, byte_tokenizer, tiny_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import answer

    return answer


@pytest.fixture
def by_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "systems"))
    from asked import by_steps

    return by_steps


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments for a tiny model and a data set of four questions."""
    model, data = tmp_path / "tiny", tmp_path / "data"
    tiny_model("llama").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    data.mkdir()
    items = [
        {
            "id": f"q{number}",
            "question": f"What is number {number}?",
            "answers": ["paraffin"],
            "passages": [
                {"title": "", "text": text, "is_supporting": not place} for place, text in enumerate(PASSAGES)
            ],
        }
        for number in range(4)
    ]
    (data / "qa.jsonl").write_text("\n".join(map(json.dumps, items)))
    out = tmp_path / "rows.jsonl"
    sizes = ["--tokens", "1200", "--users", "2", "--questions", "2", "--answer", "5", "--threads", "1", "--rounds", "2"]
    return [str(data), "--model", str(model), "--out", str(out), *sizes]


def run(answer: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["answer.py", *words])
    answer.main()
    return answer.rows_of(Path(words[words.index("--out") + 1]))


def test_systems_answer_the_same_prompts_and_a_second_run_measures_what_is_missing(answer, words, monkeypatch, capsys):
    words += ["--only", "transformers", "cacheclip"]
    rows = run(answer, words, monkeypatch)
    assert {answer.key_of(row) for row in rows} == {
        (system, 1200, 2, number) for system in ("transformers", "cacheclip") for number in (0, 1)
    }
    for number in (0, 1):
        one, other = (row for row in rows if row["round"] == number)
        assert one["questions"] == other["questions"] and one["prompt_tokens"] == other["prompt_tokens"]
        assert one["tokens"] == other["tokens"] == [5, 5]
    assert len({question for row in rows for question in row["questions"]}) == 4, "each round has its own questions"
    assert all(900 < count <= 1200 for row in rows for count in row["prompt_tokens"])
    assert all(0 < first <= total for row in rows for first, total in zip(row["first_s"], row["answer_s"], strict=True))
    assert "4 measurements" in capsys.readouterr().out
    path = Path(words[words.index("--out") + 1])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:40]]))  # as a killed run leaves it
    assert len(run(answer, [*words, "--resume"], monkeypatch)) == 4
    assert "1 measurements" in capsys.readouterr().out
    rows = run(answer, [*words, "--resume", "--rounds", "1", "--questions", "3"], monkeypatch)
    assert "2 measurements" in capsys.readouterr().out, "of three questions, those of two are other ones"
    assert [len(row["questions"]) for row in rows if row["round"] == 0] == [3, 3]


def test_a_peer_that_cannot_be_had_is_in_the_table_with_the_reason(answer, words, monkeypatch, capsys):
    def none(name: str, folder: Path) -> Path:
        raise answer.Unavailable(f"no {name} for this machine")

    monkeypatch.setattr(answer, "python_of", none)
    (row,) = run(answer, [*words, "--rounds", "1", "--only", "vLLM"], monkeypatch)
    assert row["skipped"] == "no vllm for this machine"
    assert "| vLLM | skipped: no vllm for this machine |" in capsys.readouterr().out


def test_a_system_that_fails_is_in_the_table_with_the_reason(answer, words, monkeypatch, capsys):
    broken = answer.System("embedded", {"method": "no such method"})
    monkeypatch.setitem(answer.SYSTEMS, "broken", broken)
    (row,) = run(answer, [*words, "--rounds", "1", "--only", "broken"], monkeypatch)
    assert "no such method" in row["skipped"]


def test_each_user_asks_the_next_question_when_the_last_is_answered(by_steps):
    """Three questions of two users, answered in two steps each: the third waits for a user who is free."""
    running: dict[int, int] = {}
    most = 0

    def step():
        nonlocal most
        most = max(most, len(running))
        for number in list(running):
            running[number] += 1
            if running[number] == 2:
                del running[number]
                yield number, 2, f"answer {number}"
            else:
                yield number, 1, None

    answers = by_steps(["a", "b", "c"], 2, lambda number, prompt: running.update({number: 0}), step)
    assert [answer["text"] for answer in answers] == ["answer 0", "answer 1", "answer 2"]
    assert most == 2
    assert all(0 < answer["first"] < answer["total"] for answer in answers)
