"""``cacheclip eval``: how systems and data are written, and whole runs on a tiny random model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cacheclip_eval import Item, Passage, command, runner
from cacheclip_eval.sources import max_new_tokens, sources
from cacheclip_eval.systems import parse
from tiny import PASSAGES, byte_tokenizer, tiny_backbone, tiny_model
from typer.testing import CliRunner, Result

from cacheclip_rag import ConfigurationError
from cacheclip_rag.cli import main as cli
from cacheclip_rag.methods import resolve
from cacheclip_rag.spec import PREFIXES

# ---- systems -----------------------------------------------------------------------------------------------------


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
        (["naive", "cacheclip"], ["windw=1"], "ratio, group_size, layers, prefix, threshold"),
        (["cacheclip"], ["group_size"], "name=value"),
        (["cacheclip"], ["group_size="], "name=value"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_valid(specs: list[str], sweeps: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse(specs, None, sweeps)


# ---- data --------------------------------------------------------------------------------------------------------


def ruler(**changes: Any) -> ModuleType:
    """Stands for ``evaluation.ruler``."""
    module = ModuleType("cacheclip_eval.ruler")

    def generate(task: str, *, tokens: int, seed: int, count: Any = None) -> Item:
        text = (PASSAGES[0] * 40)[: tokens - len(str(seed))] + str(seed)
        assert count(text) == tokens  # bytes are tokens here
        return Item(f"{task}-{seed}", "Which?", (str(seed),), (Passage("", text),), meta={"all_answers_required": True})

    module.__dict__.update({"TASKS": ("niah_single", "vt"), "generate": generate} | changes)
    return module


def data(folder: Path, *questions: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    passages = [{"title": "", "text": text} for text in PASSAGES[:2]]
    records = [
        {"id": str(i), "question": q, "answers": ["1874"], "passages": passages} for i, q in enumerate(questions)
    ]
    path = folder / "qa.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


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


# ---- the command -------------------------------------------------------------------------------------------------


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


# ---- analyse -----------------------------------------------------------------------------------------------------


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
