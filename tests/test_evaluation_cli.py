"""`cacheclip eval` and `cacheclip analyse`: from data to tables and figures; interrupted, repeated, misused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cacheclip_eval import Item, command, runner
from eval_data import data, ruler
from tiny import PASSAGES, byte_tokenizer, tiny_model
from typer.testing import CliRunner, Result

from cacheclip_rag.cli import main as cli


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


class Eval:
    """The command with a model, a file to write to, and short answers."""

    def __init__(self, model: str, out: Path) -> None:
        self.model, self.out = model, out

    def __call__(self, *arguments: str) -> Result:
        fixed = ["--model", self.model, "--auxiliary", self.model, "--max-new-tokens", "3", "--out", str(self.out)]
        return CliRunner().invoke(cli.app, ["eval", *arguments, *fixed])

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]


@pytest.fixture
def evaluate(model: str, tmp_path: Path) -> Eval:
    return Eval(model, tmp_path / "out" / "rows.jsonl")


def test_from_data_to_tables(evaluate: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cacheclip_eval.ruler", ruler())
    file = data(tmp_path / "set", "Who?", "When?", "Where?")
    arguments = [
        str(file.parent),
        "ruler:vt:300",
        "--items",
        "2",
        "--methods",
        "naive",
        "cacheclip:layers=upper",
        "--ratio",
        "0.3",
    ]
    done = evaluate(*arguments)
    assert done.exit_code == 0, done.output
    labels = ["full", "naive", "cacheclip@0.3:layers=upper"]
    assert [(r["dataset"], r["id"], r["system"]) for r in evaluate.rows()] == [
        (name, item, label)
        for name, ids in (("set", "01"), ("ruler:vt:300", ("vt-0", "vt-1")))
        for item in ids
        for label in labels
    ]
    assert {r["requested_ratio"] for r in evaluate.rows()} == {1.0, 0.0, 0.3}
    assert all(r["max_new_tokens"] == 3 and r["fallbacks"] == [] for r in evaluate.rows())
    tables = done.stdout
    assert tables.startswith("### set\n\n| system |") and "### ruler:vt:300\n" in tables and "it/s" not in tables
    before = evaluate.out.read_bytes()
    again = evaluate(*arguments, "--baseline", "naive")
    assert (again.exit_code, evaluate.out.read_bytes()) == (0, before)
    assert again.stdout.startswith(tables + "\n### set, minus naive\n")
    printed = evaluate("--no-run", "--json", "--baseline", "naive")
    found = json.loads(printed.stdout)
    assert printed.exit_code == 0 and [r["system"] for r in found["summary"]] == labels * 2
    assert [r["system"] for r in found["comparison"]] == [labels[0], labels[2]] * 2
    assert evaluate("--no-run").stdout == tables
    assert evaluate(*arguments, "--no-table").stdout == ""


def test_sweeps_and_options_take_several_words_or_are_repeated(evaluate: Eval, tmp_path: Path) -> None:
    file = data(tmp_path / "set", "Who?")
    done = evaluate(
        str(file),
        "--methods=naive",
        "query_guided",
        "--sweep",
        "ratio=0.1,0.3",
        "--sweep",
        "group_size=2,4",
        "--items",
        "1",
    )
    assert done.exit_code == 0, done.output
    assert [r["system"] for r in evaluate.rows()] == [
        "full",
        "naive",
        *(f"query_guided@{ratio}:group_size={size}" for ratio in ("0.1", "0.3") for size in (2, 4)),
    ]


def test_passages_are_embedded_once_for_all_numbers_of_neighbours(
    evaluate: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> list[list[float]]:
        asked.append(texts)
        return [[1.0, len(text)] for text in texts]

    monkeypatch.setattr("cacheclip_eval.command.mean_pooling", lambda: embed)
    systems = [f"naive:context=similar,neighbours={count}" for count in (1, 2)]
    done = evaluate(str(data(tmp_path / "set", "Who?")), "--methods", *systems)
    assert done.exit_code == 0, done.output
    assert [row["system"] for row in evaluate.rows()] == ["full", *systems] and asked == [list(PASSAGES[:2])]


def test_chunks_in_8_bits_are_systems_of_their_own_in_the_same_file(evaluate: Eval, tmp_path: Path) -> None:
    file = data(tmp_path / "set", "Who?")
    for kind in ("auto", "int8"):
        done = evaluate(str(file), "--methods", "naive", "--kv-dtype", kind)
        assert done.exit_code == 0, done.output
    full, plain, small = evaluate.rows()
    assert [row["system"] for row in (full, plain, small)] == ["full", "naive", "naive+int8"]
    assert plain["stored_tokens"] == small["stored_tokens"] and small["stored_bytes"] < 0.65 * plain["stored_bytes"]
    assert small["kl"] != plain["kl"] and small["model"] == plain["model"]


def test_answers_that_failed_are_code_1_until_they_succeed(
    evaluate: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = data(tmp_path / "set", "Who?")
    with monkeypatch.context() as patch:
        patch.setattr("cacheclip_eval.access.ensure", lambda *_: 1 / 0)
        done = evaluate(str(file), "--methods", "naive")
    assert done.exit_code == 1 and "1 answers failed" in done.stderr and "| naive | 0 (1 failed) |" in done.stdout
    done = evaluate(str(file), "--methods", "naive")
    assert done.exit_code == 0 and "| naive | 1 |" in done.stdout


def test_ctrl_c_says_how_to_go_on(evaluate: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = data(tmp_path / "set", "Who?", "When?")
    real, seen = runner.answers, []

    def stopped(engine: Any, item: Item, *rest: Any) -> Any:
        seen.append(item.id)
        if item.id == "1":
            raise KeyboardInterrupt
        return real(engine, item, *rest)

    monkeypatch.setattr(runner, "answers", stopped)
    done = evaluate(str(file), "--methods", "naive")
    assert done.exit_code == command.INTERRUPTED and "the same command goes on" in done.stderr and done.stdout == ""
    assert len(evaluate.rows()) == 2
    monkeypatch.setattr(runner, "answers", real)
    assert evaluate(str(file), "--methods", "naive").exit_code == 0 and len(evaluate.rows()) == 4


def test_bad_input_is_one_line_before_a_model_is_loaded(
    evaluate: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "Engine", None)
    file = str(data(tmp_path / "set", "Who?"))
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "in-the-way").write_text("")
    for arguments, said in [
        ([], "at least one data set"),
        (["--methods", "naive", file], "before the options"),
        ([str(tmp_path / "absent")], "there is no data"),
        ([file, "--methods", "cacheclip:windw=3"], "reorder, threshold"),
        ([file, "--sweep", "windw=3"], "group_size"),
        ([file, "--ratio", "3"], "recompute_ratio"),
        ([file, "--kv-dtype", "int4"], "auto or int8"),
        ([file, "--methods", "naive", "--baseline", "nave"], "full, naive"),
        ([file, "--no-run"], "no rows"),
    ]:
        done = evaluate(*arguments)
        assert done.exit_code == 2 and said in done.stderr and done.stderr.startswith("cacheclip: "), arguments
        assert done.stderr.count("\n") == 1 and done.stdout == ""
        evaluate.out.unlink(missing_ok=True)
    for out, said in [("bad.jsonl", "line 1"), ("in-the-way/rows.jsonl", "cannot be written")]:
        evaluate.out = tmp_path / out
        done = evaluate(file)
        assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("origin", ["model", "version"])
def test_rows_of_another_model_or_version_are_bad_input(evaluate: Eval, tmp_path: Path, origin: str) -> None:
    file = str(data(tmp_path / "set", "Who?"))
    assert evaluate(file, "--methods", "naive").exit_code == 0
    rows = [json.loads(line) for line in evaluate.out.read_text().splitlines()]
    evaluate.out.write_text("".join(json.dumps(row | {origin: "another"}) + "\n" for row in rows))
    done = evaluate(file, "--methods", "naive", "link0")
    assert done.exit_code == 2 and f"belongs to another {origin} (another, now " in done.stderr


def test_a_row_without_numbers_is_no_row(evaluate: Eval, tmp_path: Path) -> None:
    evaluate.out.parent.mkdir()
    evaluate.out.write_text(json.dumps({"dataset": "set", "id": "0", "system": "full"}) + "\n")
    done = evaluate(str(data(tmp_path / "set", "Who?")), "--methods", "naive")
    assert done.exit_code == 2 and "line 1 is no row" in done.stderr


def test_more_items_go_on_with_the_length_that_rows_have(evaluate: Eval, tmp_path: Path) -> None:
    """How long answers may be is derived from the right ones, and a longer one may come with more items."""
    file = data(tmp_path / "set", "Who?", "When?")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["answers"] = ["a much longer answer than the first " * 3]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate(str(file), "--methods", "naive", "--items", "1").exit_code == 0
    assert evaluate(str(file), "--methods", "naive", "--items", "2").exit_code == 0
    rows = [json.loads(line) for line in evaluate.out.read_text().splitlines()]
    assert len(rows) == 4 and len({row["max_new_tokens"] for row in rows}) == 1


def test_an_auxiliary_model_is_asked_for_where_it_is_needed(evaluate: Eval, tmp_path: Path) -> None:
    file = str(data(tmp_path / "set", "Who?"))
    arguments = ["eval", file, "--model", evaluate.model, "--auxiliary", "", "--out", str(evaluate.out)]
    done = CliRunner().invoke(cli.app, [*arguments, "--methods", "naive", "cacheclip"])
    assert done.exit_code == 2 and "cacheclip need an auxiliary model" in done.stderr
    done = CliRunner().invoke(cli.app, [*arguments, "--methods", "naive", "--max-new-tokens", "2"])
    assert done.exit_code == 0


def test_a_question_is_answered_by_a_figure_and_its_numbers(model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = data(tmp_path / "set", "Who?", "When?")

    def analyse(*arguments: str) -> Result:
        fixed = ["--model", model, "--auxiliary", model, "--out", str(tmp_path / "figure.svg")]
        return CliRunner().invoke(cli.app, ["analyse", *arguments, *fixed])

    done = analyse("agreement", str(file))
    assert done.exit_code == 0 and "</svg>" in (tmp_path / "figure.svg").read_text()
    numbers = [json.loads(line) for line in (tmp_path / "figure.jsonl").read_text().splitlines()]
    assert {row["model"] for row in numbers} == {"primary", model} and {row["id"] for row in numbers} == {"0", "1"}
    assert analyse("deviation", str(file), "--method", "link0").exit_code == 0
    before = (tmp_path / "figure.svg").read_text()
    shares = analyse("hits", str(file)).stdout
    assert "share of prompt tokens" in (tmp_path / "figure.svg").read_text() != before
    assert (
        "chunks anywhere: " in shares
        and "prefix-cache: " in shares
        and "% of the prompt tokens of 2 questions" in shares
    )
    for arguments, said in [
        (["agreemnt", str(file)], "agreement, deviation, hits, pareto"),
        (["agreement"], "needs a data set"),
        (["pareto"], "--rows FILE"),
        (["deviation", str(file), "--method", "linko"], 'did you mean "link0"'),
    ]:
        done = analyse(*arguments)
        assert done.exit_code == 2 and said in done.stderr, arguments


def test_a_figure_that_cannot_be_is_refused_before_anything_runs(evaluate: Eval, tmp_path: Path) -> None:
    file = data(tmp_path / "set", "Who?")
    assert evaluate(str(file), "--methods", "naive").exit_code == 0
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for arguments, said in [
        (["deviation", str(file), "--out", str(tmp_path / "figure.xyz")], ".svg, .png, .pdf"),
        (["pareto", "--rows", str(evaluate.out), "--measure", "foo"], "kl, score, adjusted, agree"),
        (["pareto", "--rows", str(empty)], "holds no rows"),
        (["length", "--rows", str(evaluate.out), "--measure", "adjusted"], "length draws kl, score or agree"),
        (["pareto", "--rows", str(evaluate.out), "--out", str(empty / "figure.svg")], "cannot be written"),
    ]:
        done = CliRunner().invoke(cli.app, ["analyse", *arguments])
        assert done.exit_code == 2 and said in done.stderr, arguments
    arguments = ["--rows", str(evaluate.out), "--out", str(tmp_path / "new" / "figure.svg")]
    assert CliRunner().invoke(cli.app, ["analyse", "length", *arguments]).exit_code == 0


def test_rows_are_drawn(evaluate: Eval, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = data(tmp_path / "set", "Who?", "When?")
    assert evaluate(str(file), "--methods", "naive", "query_guided", "--sweep", "ratio=0.1,0.5").exit_code == 0
    for question in ("pareto", "sweep", "length"):
        figure = tmp_path / f"{question}.png"
        arguments = ["analyse", question, "--rows", str(evaluate.out), "--out", str(figure)]
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0 and figure.read_bytes().startswith(b"\x89PNG"), done.output
