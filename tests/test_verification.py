"""``cacheclip verify``: good models pass on every shape, and whatever is wrong with reuse is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, tiny_backbone, tiny_model
from typer.testing import CliRunner

from cacheclip_rag import Engine
from cacheclip_rag.cli import main as cli
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.methods.recompute.once import Once
from cacheclip_rag.model.attention import SparseRows
from cacheclip_rag.model.canvas import Canvas, CanvasLayer
from cacheclip_rag.model.rotary import Rotary
from cacheclip_rag.store import DiskStore, format
from cacheclip_rag.verification import PASSAGES, verify
from cacheclip_rag.weights import verified


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHECLIP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def failed_of(backbone: Any) -> list[str]:
    return [check.name for check in verify(backbone).checks if not check.passed]


@pytest.mark.parametrize("kind", ["llama", "yarn-rope", "mistral-sliding", "gemma3"])
def test_good_models_pass(kind: str) -> None:
    found = verify(tiny_backbone(kind))
    assert found.trusted and "may be trusted" in found.line and len(found.checks) == 8


def test_a_good_model_in_16_bits_passes() -> None:
    assert verify(tiny_backbone("qwen2", torch.bfloat16)).trusted


def test_a_model_that_cannot_be_composed_is_not_trusted() -> None:
    backbone = tiny_backbone()
    backbone.obstacle = "its keys do not move"
    found = verify(backbone)
    assert not found.trusted and found.line.endswith("its keys do not move")


def test_keys_that_are_not_rotated_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    rotate = Rotary.rotate
    monkeypatch.setattr(Rotary, "rotate", lambda self, keys, delta, out=None: rotate(self, keys, 0, out))
    names = failed_of(backbone)
    assert names == ["keys moved by 2000 tokens are those computed there"]


def test_keys_that_are_one_position_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    place = Canvas.place

    def beside(self: Canvas, chunk: Any, tokens: slice, row: int, position: int | None = None) -> None:
        place(self, chunk, tokens, row, (row if position is None else position) + 1)

    monkeypatch.setattr(Canvas, "place", beside)
    names = failed_of(backbone)
    assert "reuse at ratio 0 of a chunk in place is full prefill" in names and len(names) == 2


def test_kv_that_is_placed_at_the_wrong_slots_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    place = Canvas.place

    def mixed(self: Canvas, chunk: Any, tokens: slice, row: int, *rest: Any) -> None:
        place(self, chunk, tokens, row, *rest)
        rows = slice(row, row + tokens.stop - tokens.start)
        self.values[:, 0, :, rows] = self.values[:, 0, :, rows].flip(2)

    monkeypatch.setattr(Canvas, "place", mixed)
    assert "reuse at ratio 0 of a chunk in place is full prefill" in failed_of(backbone)


def test_scattered_rows_that_are_not_written_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    update, aim, scattered = CanvasLayer.update, Canvas.set_write_rows, [False]

    def noted(self: Canvas, sparse: SparseRows) -> None:
        slots = sparse.rows
        scattered[0] = int(slots[-1] - slots[0]) + 1 != len(slots)
        aim(self, sparse)

    def lazy(self: CanvasLayer, keys: Any, values: Any, *rest: Any, **more: Any) -> Any:
        if not scattered[0]:
            return update(self, keys, values, *rest, **more)
        length = self.get_seq_length()
        return self.keys[:, :, :length], self.values[:, :, :length]

    monkeypatch.setattr(Canvas, "set_write_rows", noted)
    monkeypatch.setattr(CanvasLayer, "update", lazy)
    names = failed_of(backbone)
    assert names and "full prefill is the model's own" not in names


def test_rows_that_are_chosen_and_not_recomputed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    run = Once.run

    def half(self: Once, request: Any, chosen: Any, score_mod: Any) -> Any:
        return replace(run(self, request, chosen[::2], score_mod), rows=chosen)

    monkeypatch.setattr(Once, "run", half)
    assert failed_of(backbone) == ["reuse at ratio 1 is full prefill"]


def test_a_store_that_changes_a_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load = format.load

    def wrong(*arguments: Any) -> Any:
        chunk = load(*arguments)
        chunk.keys[0, 0, 0, 0] += 1e-3
        return chunk

    monkeypatch.setattr(format, "load", wrong)
    assert failed_of(tiny_backbone()) == ["a stored chunk comes back bit for bit"]


def test_a_store_that_keeps_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskStore, "get", lambda *_: None)
    assert "a stored chunk comes back bit for bit" in failed_of(tiny_backbone())


def test_an_older_canary_that_is_no_longer_what_is_computed_is_found(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    assert verify(backbone, tmp_path / "kv").trusted
    again = verify(backbone, tmp_path / "kv")
    assert again.trusted and len(again.checks) == 9
    with Engine(backbone, method="naive", store=tmp_path / "kv") as engine:
        key = engine.library.key(PASSAGES[0])
        stale = engine.library.get(key)
        assert stale is not None
        stale.keys.mul_(1.2)  # what a library computed differently
        engine.library.store.delete([key])
        engine.library.store.put(key, stale)
    found = verify(backbone, tmp_path / "kv")
    assert [c.name for c in found.checks if not c.passed] == [
        "the canary of an earlier verification is what is computed today"
    ]


def test_not_a_number_passes_nothing() -> None:
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.model.lm_head.weight[:] = torch.nan
    assert not verify(backbone).trusted


# ---- the record --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["verify", *arguments])


def test_an_engine_that_requires_it_takes_verified_models_only(
    model: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(method="naive", dtype="float32", require_verified=True)
    with pytest.raises(
        ConfigurationError, match=r"not verified .*run cacheclip verify .* --dtype float32 --device cpu"
    ):
        Engine(model, **options)
    done = run(model, "--dtype", "float32")
    assert done.exit_code == 0 and done.stdout.count("\n") == 10, done.output
    assert done.stdout.splitlines()[-1] == f"{model} may be trusted with reuse: 8 checks passed"
    Engine(model, **options).close()
    with pytest.raises(ConfigurationError, match="not verified"):  # another dtype is another model
        Engine(model, **options | {"dtype": "bfloat16"})
    with monkeypatch.context() as patch:  # and so are other libraries
        patch.setattr(verified, "version", lambda name: "99.0")
        with pytest.raises(ConfigurationError, match=r"99\.0"):
            Engine(model, **options)
    (record,) = (home / "verified").iterdir()
    record.write_text(record.read_text().replace('"weights": "', '"weights": "0'))
    with pytest.raises(ConfigurationError, match="not verified"):
        Engine(model, **options)
    record.write_bytes(b"\xff{")
    with pytest.raises(ConfigurationError, match="not verified"):
        Engine(model, **options)


def test_a_model_that_failed_is_refused_with_what_failed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "get", lambda *_: None)
        done = run(model, "--dtype", "float32", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1 and told["trusted"] is False and told["identity"]["dtype"] == "float32"
    assert any(not check["passed"] and "bit for bit" in check["name"] for check in told["checks"])
    with pytest.raises(ConfigurationError, match=r"failed its verification .*bit for bit"):
        Engine(model, method="naive", dtype="float32", require_verified=True)
    assert run(model, "--dtype", "float32").exit_code == 0
    Engine(model, method="naive", dtype="float32", require_verified=True).close()


def test_what_is_no_model_is_bad_input(tmp_path: Path) -> None:
    assert run(str(tmp_path / "absent")).exit_code == 2
