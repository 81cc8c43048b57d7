"""``cacheclip tune blocks``: data, a trained folder with its card, and what is bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cacheclip_eval.data import Item, Passage, read
from cacheclip_train.data import split
from tiny import PASSAGES
from typer.testing import CliRunner

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.cli.main import app

pytest.importorskip("peft")

ANSWERS = ["paraffin", "Visby", "1957", "eleven thousand", "eels"]


def items(count: int = 10) -> list[Item]:
    """Questions about five documents; every prompt has a passage of two of them."""
    made = []
    for n in range(count):
        about, other = n % 5, (n + 1) % 5
        passages = Passage(f"D{about}", PASSAGES[about], True), Passage(f"D{other}", PASSAGES[other])
        made.append(Item(f"q{n}", f"Question {n}?", (ANSWERS[about],), passages))
    return made


def write(path: Path, given: list[Item]) -> Path:
    rows = [
        {
            "id": item.id,
            "question": item.question,
            "answers": item.answers,
            "passages": [{"title": p.title, "text": p.text, "is_supporting": p.supporting} for p in item.passages],
        }
        for item in given
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_no_document_is_in_two_parts():
    found = split({"a": items()}, stop=1, report=2, seed=1)
    documents = found.documents["a"]
    assert sorted(title for titles in documents.values() for title in titles) == [f"D{n}" for n in range(5)]
    assert [len(documents[part]) for part in ("train", "stop", "report")] == [2, 1, 2]
    seen = {p.title for item in found.train for p in item.passages}
    assert seen == set(documents["train"])
    assert not {p.title for item in found.stop for p in item.passages} & set(documents["report"])
    assert len(found.train) + len(found.stop) + len(found.report) == 10
    assert split({"a": items()[::-1]}, 1, 2, 1).documents == found.documents != split({"a": items()}, 1, 2, 2).documents


def test_too_few_documents_and_no_questions_are_said():
    with pytest.raises(ConfigurationError, match=r"asks about 5 documents: .* at least 6"):
        split({"a": items()}, stop=2, report=3)
    with pytest.raises(ConfigurationError, match="b holds no question with an answer"):
        split({"a": items(), "b": [Item("x", "Why?", (" ",), (Passage("", PASSAGES[0]),))]}, 1, 1)


def tune(*words: object, kind: str = "blocks") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["tune", kind, *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


SMALL = ("--stop-documents", 1, "--report-documents", 1, "--every", 2, "--epochs", 4, "--batch", 2, "--rank", 2)


@pytest.fixture(scope="module")
def trained(stand_in: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tune")
    data = write(home / "qa.jsonl", items())
    out = home / "out"
    code, said, errors = tune(data, "--model", stand_in, "--out", out, *SMALL, "--lr", 0.01, "--hours", 0)
    assert code == 0 and "paused" in said, errors
    code, said, errors = tune(data, "--model", stand_in, "--out", out, *SMALL, "--lr", 0.01)
    assert code == 0 and f"adapter={out}" in said, errors
    return out


def test_the_folder_says_on_what_it_was_trained_and_what_it_gained(trained, stand_in):
    card = json.loads((trained / "card.json").read_text())
    assert card["finished"] and card["primary"]["name"] == stand_in and card["uses"] == "blockattention:adapter=FOLDER"
    looks = [row["held_out"]["encoded apart"] for row in card["training"]["history"]]
    assert looks[-1] == min(looks) < looks[0]
    assert set(card["report"]) == {
        f"{a}, {b}" for a in ("tuned", "untuned") for b in ("encoded apart", "full attention")
    }
    page = (trained / "README.md").read_text()
    assert "blockattention:adapter=FOLDER" in page and "1 to report" in page
    kept = read(trained / "held-out.jsonl")
    assert {item.passages[0].title for item in kept} == set(card["data"]["documents"]["qa"]["report"])


def test_the_engine_takes_the_folder_and_another_model_refuses_it(trained, stand_in, smollm2):
    engine = Engine(stand_in, dtype="float32")
    method = f"blockattention:adapter={trained}"
    assert engine.ensure(PASSAGES, method=method).skipped == []
    content = "Read.\n\n" + "\n\n".join(PASSAGES) + "\n\nWho?"
    answer = engine.generate(engine.backbone.chat([{"role": "user", "content": content}]), method=method)
    assert answer.report.fallbacks == [] and answer.report.reused > 100
    with pytest.raises(ConfigurationError, match="trained for another model"):
        Engine(smollm2, method=method)


def test_a_finished_folder_and_other_settings_are_refused(trained, stand_in):
    code, _, said = tune(trained.parent / "qa.jsonl", "--model", stand_in, "--out", trained, *SMALL)
    assert code == 2 and "finished training" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "at least one data set"),
        (("nowhere",), "there is no data nowhere"),
        (("ruler:niah_single:500",), "training takes files"),
        (("DATA", "--method", "auto"), "blockattention or turborag, not auto"),
        (("DATA", "--method", "blockattention:adapter=x"), "leave adapter= out"),
        (("DATA", "--method", "blockatention"), "did you mean"),
        (("DATA",), "asks about 5 documents"),
        (("DATA", "--lr", "0"), "lr must be more than 0"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(words, said, tmp_path):
    data = write(tmp_path / "qa.jsonl", items())
    code, _, errors = tune(*(data if word == "DATA" else word for word in words), "--out", tmp_path / "out")
    assert code == 2 and said in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()
