"""``cacheclip tune recipe``: from questions to a setting that works, resumed, and what is bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from cacheclip_eval import grid, pilot, recipe, runner
from cacheclip_eval.choice import Tried, choose
from cacheclip_eval.sources import sources
from cacheclip_eval.systems import parse
from filelock import FileLock
from tiny import PASSAGES, SHAPE, byte_tokenizer, prompt_of, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from cacheclip_rag import Engine
from cacheclip_rag.cli.main import app
from cacheclip_rag.methods import resolve


def near(texts: list[str]) -> list[list[float]]:
    """Embeddings of texts that are all alike."""
    return [[1.0 + text.count(letter) for letter in "abcdefghilmnoprst"] for text in texts]


def far(texts: list[str]) -> list[list[float]]:
    """Embeddings of texts that have nothing in common."""
    return [[float(text == other) for other in PASSAGES] for text in texts]


@pytest.fixture(autouse=True)
def _embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheclip_eval.fusable.mean_pooling", lambda: near)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _saved(tmp_path_factory.mktemp("model"), "llama")


def _saved(folder: Path, kind: str) -> str:
    tiny_model(kind).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def write(path: Path, count: int, **changes: Any) -> Path:
    """Questions without answers, as in a log; each retrieved three of five passages."""
    records = [
        {
            "id": f"q{n}",
            "question": f"Question {n}?",
            "answers": [],
            "passages": [{"title": "", "text": PASSAGES[(n + step) % 5]} for step in range(3)],
        }
        | changes
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tune(*words: object) -> Result:
    return CliRunner().invoke(app, ["tune", "recipe", *map(str, words)])


FAST = ("--method", "epic:fused=False", "--ratios", "0.3")
SMALL = ("--questions", 12, "--ratios", "0.1,0.3", "--neighbours", 2)


@pytest.fixture(scope="module")
def found(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    home = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cacheclip_eval.fusable.mean_pooling", lambda: near)
        done = tune(write(home / "log.jsonl", 12), "--model", model, "--out", home / "out", *SMALL)
    assert done.exit_code == 0, done.output
    return home / "out", done


def test_the_setting_is_written_and_every_engine_takes_it(found: tuple[Path, Result], model: str) -> None:
    out, done = found
    record = json.loads((out / "recipe.json").read_text())
    method = record["method"]
    assert f'method="{method}"' in done.stdout and f'method="{method}"' in (out / "README.md").read_text()
    engine = Engine(model, method=method)
    engine.ensure(PASSAGES)
    answer = engine.generate(prompt_of(engine, PASSAGES), max_new_tokens=2)
    assert answer.report.recomputed > 0 and answer.report.fallbacks == []
    last = record["steps"][-1]
    assert [step["step"] for step in record["steps"]] == ["queries", "layers", "context and ratio"]
    [measured] = parse([last["taken"]])
    assert measured.recipe == resolve(method) and measured.ratio is None
    assert record["chunks"] == (measured.context or "cold")
    # three contexts at two ratios, and the default of each; what costs as much comes in this order
    assert len(last["settings"]) == 9 and sum("context=use" in one["setting"] for one in last["settings"]) == 3


def test_nothing_is_reported_on_that_chose_and_the_kl_decides_without_answers(found: tuple[Path, Result]) -> None:
    out, done = found
    record = json.loads((out / "recipe.json").read_text())
    [choosing], [reporting] = record["questions"]["choosing"].values(), record["questions"]["reporting"].values()
    assert len(choosing) == len(reporting) == 6 and not set(choosing) & set(reporting)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    asked = {row["id"] for row in rows if row["system"] in {one["setting"] for one in record["steps"][0]["settings"]}}
    naive = {row["id"] for row in rows if row["system"] == "naive"}
    assert naive == set(reporting) and asked >= set(choosing)
    compared = record["report"]["settings"]
    assert compared[0]["setting"] == record["steps"][-1]["taken"] and compared[-1]["setting"] == "naive"
    assert all(one["score"] is None for one in compared) and "score" not in done.stdout
    assert all("verdict" in one for one in compared[1:])


def test_a_choice_that_does_not_hold_on_other_questions_says_so_first(found: tuple[Path, Result]) -> None:
    record = json.loads((found[0] / "recipe.json").read_text())
    _, *others = record["report"]["settings"]
    others[0] |= {"kl": 0.01, "verdict": "worse"}
    said = recipe.lines(record)
    before = said[: next(n for n, line in enumerate(said) if line.startswith("## "))]
    assert any(f"is worse than that of {others[0]['setting']}: 0.010 at" in line for line in before)
    others[0]["verdict"] = "undecided"
    assert not any("is worse than that of" in line for line in recipe.lines(record))


def test_what_is_written_follows_from_the_rows(found: tuple[Path, Result]) -> None:
    """The rule decides by ratio and KL of the one half, and the claim is the mean over the other."""
    out, _ = found
    record = json.loads((out / "recipe.json").read_text())
    rows = {(row["system"], row["id"]): row for row in map(json.loads, (out / "rows.jsonl").read_text().splitlines())}
    halves = {half: record["questions"][half]["log"] for half in ("choosing", "reporting")}

    def tried(setting: str, half: str) -> Tried:
        mine = [rows[setting, id] for id in halves[half]]
        return Tried(setting, round(mean(row["ratio"] for row in mine), 2), tuple(row["kl"] for row in mine))

    for step in record["steps"]:
        same = [tried(one["setting"], "choosing") for one in step["settings"]]
        if step["step"] != "context and ratio":  # at one ratio: the number of tokens differs by rounding only
            same = [dataclasses.replace(one, cost=0.0) for one in same]
        assert choose(same).taken.setting == step["taken"]
    for one in record["report"]["settings"]:
        assert one["kl"] == pytest.approx(tried(one["setting"], "reporting").mean)


def test_it_says_first_how_long_it_takes_and_in_the_end_what_few_questions_leave_open(
    found: tuple[Path, Result],
) -> None:
    _, done = found
    said = done.stderr.splitlines()
    time = next(n for n, line in enumerate(said) if "the rest takes some" in line)
    assert "up to 114 answers" in done.stderr and time < next(n for n, line in enumerate(said) if "queries" in line)
    assert "12 questions are few" in done.stdout and "--questions 24" in done.stdout


def test_the_same_command_goes_on_and_ends_alike(
    found: tuple[Path, Result], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write(tmp_path / "log.jsonl", 12), tmp_path / "out"
    real, seen = runner.answers, list[str]()

    def stopped(engine: Any, item: Any, *rest: Any) -> Any:
        seen.append(item.id)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return real(engine, item, *rest)

    monkeypatch.setattr(runner, "answers", stopped)
    done = tune(data, "--model", model, "--out", out, *SMALL)
    assert done.exit_code == 130 and "what was finished is kept" in done.stderr and done.stdout == ""
    assert not (out / "recipe.json").exists()
    kept = (out / "rows.jsonl").read_bytes()
    assert kept.count(b"\n") > 6
    assert tune(data, "--model", model, "--out", out, *SMALL).exit_code == 0
    assert (out / "rows.jsonl").read_bytes().startswith(kept) and len(seen) > 9
    assert json.loads((out / "recipe.json").read_text()) == json.loads((found[0] / "recipe.json").read_text())
    monkeypatch.setattr(runner, "answers", lambda *_: pytest.fail("answered again"))
    assert tune(data, "--model", model, "--out", out, *SMALL).exit_code == 0


def test_contexts_that_make_no_sense_are_left_out_with_the_reason(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cacheclip_eval.fusable.mean_pooling", lambda: far)
    data, out = write(tmp_path / "qa.jsonl", 12), tmp_path / "out"
    with data.open("a") as file:
        file.write("{\n")
    done = tune(data, "--model", model, "--out", out, *SMALL, "--method", "infoflow:queries=last", "--ratios", "0.3")
    assert done.exit_code == 0 and "no neighbour is similar: the nearest one's cosine is 0.00" in done.stdout
    assert "line 13 left out" in caplog.text
    record = json.loads((out / "recipe.json").read_text())
    assert list(record["skipped"]) == ["similar"]
    # What the method was given stays as it is, and is no step.
    assert [step["step"] for step in record["steps"]] == ["layers", "context and ratio"]
    settings = [one["setting"] for step in record["steps"] for one in step["settings"]]
    assert all("queries=last" in setting and "similar" not in setting for setting in settings)
    assert resolve(record["method"]).select.queries == "last"  # type: ignore[attr-defined]


def test_a_method_without_the_parts_is_tried_without_the_steps(tmp_path: Path) -> None:
    """An own selection has no queries and no band, and a method that encodes nothing ahead fuses nothing."""
    data = [str(write(tmp_path / "qa.jsonl", 12))]
    fixed: dict[str, Any] = dict(model="", auxiliary="", out=tmp_path, questions=12, ratios="0.1")
    assert grid.plan(data, "epic", **fixed).choosers() == {}
    craft = grid.plan(data, "cachecraft", **fixed)
    _, skipped = pilot._contexts(craft, {}, lambda _: None)
    assert set(skipped.values()) == {"cachecraft encodes no chunk ahead"}
    assert craft.setting({}, "cold", 0.1).method == "cachecraft:recompute_ratio=0.1"
    _, skipped = pilot._contexts(grid.plan(data, "auto:fused=False", **fixed), {}, lambda _: None)
    assert set(skipped.values()) == {"--method says fused=False"}
    law = grid.plan(data, "auto", **fixed).setting({}, "use", 0.1)
    assert resolve(law.method).fitted_ratio == pytest.approx(0.02) and resolve(law.method).recompute_ratio == 0.1


def test_what_no_other_question_retrieved_is_not_fused_by_use(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in write(tmp_path / "a.jsonl", 12).read_text().splitlines()]
    for n, line in enumerate(lines):
        line["passages"] = [{"title": f"{n} {step}", "text": PASSAGES[step]} for step in range(2)]
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [source] = sources([str(data)])
    reason = pilot.by_use([source], {source.name: source.all()}, 3)
    assert reason == "no passage was retrieved for two questions"
    lines[0]["passages"].append(lines[1]["passages"][0])
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    planners = pilot.by_use([source], {source.name: source.all()}, 3)
    assert not isinstance(planners, str)
    [(text, context)] = planners["a"](source.all()[0]).neighbours.items()
    assert text.startswith("1 0\n") and [other[:3] for other in context] == ["1 1"]


def test_answers_that_fail_leave_the_setting_out_and_are_code_1(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cacheclip_eval import access

    real = access.fuse

    def fuse(engine: Any, method: Any, plan: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(access, "fuse", fuse)
    data, out = write(tmp_path / "log.jsonl", 12), tmp_path / "out"
    done = tune(data, "--model", model, "--out", out, *SMALL)
    assert done.exit_code == 1 and "Left out because it failed" in done.stdout and "no room" in done.stdout
    record = json.loads((out / "recipe.json").read_text())
    assert record["chunks"] == "cold" and len(record["steps"][-1]["settings"]) == 3
    monkeypatch.setattr(access, "fuse", real)
    assert tune(data, "--model", model, "--out", out, *SMALL).exit_code == 0
    assert json.loads((out / "recipe.json").read_text())["left_out"] == {}


def test_a_question_that_full_prefill_cannot_answer_is_left_out_and_too_few_decide_nothing(
    model: str, tmp_path: Path
) -> None:
    data = write(tmp_path / "log.jsonl", 14)
    lines = [json.loads(line) for line in data.read_text().splitlines()]

    def run(out: Path, *long: int) -> Result:
        for number in long:
            lines[number]["question"] = "Why? " * 1000 + str(number)  # beyond the context length of 4,096 bytes
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tune(data, "--model", model, "--out", out, *FAST, "--questions", 14)

    done = run(tmp_path / "some", 0, 1)
    assert done.exit_code == 1 and "Left out because it failed: question q0: full prefill: PromptError" in done.stdout
    record = json.loads((tmp_path / "some" / "recipe.json").read_text())
    assert record["steps"][0]["questions"] == record["report"]["questions"] == 6
    done = run(tmp_path / "many", 3)
    assert done.exit_code == 2 and "full prefill answered 5 of 7 questions, and 6 are needed: full" in done.stderr
    assert not (tmp_path / "many" / "recipe.json").exists()


def test_halves_are_as_large_and_a_repeated_question_is_in_one(tmp_path: Path) -> None:
    given = sources([str(write(tmp_path / f"{name}.jsonl", count)) for name, count in (("a", 7), ("b", 9))])
    choosing, reporting = pilot.split(given, 100)
    assert [sum(map(len, half.values())) for half in (choosing, reporting)] == [8, 8]
    one = {"passages": [{"text": PASSAGES[0]}]}
    with pytest.raises(Exception, match="c: 0 different questions with two passages or more"):
        pilot.split(sources([str(write(tmp_path / "c.jsonl", 40, **one))]), 40)
    with pytest.raises(Exception, match="d: 1 different questions"):
        pilot.split(sources([str(write(tmp_path / "d.jsonl", 40, question="Why?"))]), 40)


def test_twice_as_many_questions_never_report_on_what_has_chosen(tmp_path: Path) -> None:
    """Every question of the smaller pilot is in the half to choose on, and new ones are reported on."""
    given = sources([str(write(tmp_path / "a.jsonl", 100))])
    (first, second), (more, fresh) = pilot.split(given, 12), pilot.split(given, 24)
    assert {i.id for i in more["a"]} == {i.id for half in (first, second) for i in half["a"]}
    assert not {i.id for i in fresh["a"]} & {i.id for i in more["a"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "at least one data set"),
        (("nowhere",), "there is no data nowhere"),
        (("ruler:niah_single:500",), "files and folders of your own questions"),
        (("DATA", "--questions", 11), "--questions 11 are too few: 12 at least"),
        (("DATA", "--questions", 100), "DATA: 11 different questions with two passages or more are too few"),
        (("DATA", "--ratios", "0,0.1"), "--ratios are numbers between 0 and 1"),
        (("DATA", "--ratios", "low"), "--ratios are numbers between 0 and 1"),
        (("DATA", "--method", "autos"), "did you mean"),
        (("DATA", "--method", "auto@0.1"), "--ratios, --neighbours and --auxiliary say"),
        (("DATA", "--method", "auto:recompute_ratio=0.1"), "--ratios, --neighbours and --auxiliary say"),
        (("DATA", "--method", "auto:fused=order"), "fused=False to try no fused chunks"),
        (("DATA", "--method", "naive"), "naive recomputes nothing"),
        (("DATA", "--method", "prefix-cache"), "answers as full prefill does"),
        (("DATA", "--method", "cacheclip"), "needs an auxiliary model: --auxiliary NAME"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    words: tuple[object, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "Engine", None)
    data = write(tmp_path / "DATA", 11)
    done = tune(*(data if word == "DATA" else word for word in words), "--out", tmp_path / "out")
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_composed_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    done = tune(write(tmp_path / "log.jsonl", 12), "--model", folder, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "dynamic" in done.stderr and not (tmp_path / "out" / "recipe.json").exists()


def test_two_pilots_do_not_ask_into_one_folder(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(pilot, "Engine", None)
    with FileLock(out / "lock"):
        done = tune(write(tmp_path / "log.jsonl", 12), "--model", model, "--out", out, *FAST)
    assert done.exit_code == 2 and "another process runs a pilot in" in done.stderr and "--out" in done.stderr
