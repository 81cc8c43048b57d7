"""`cacheclip fuse`: a store's chunks are fused with the store's own settings, and nothing of it is evicted."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from fused import TAIL, A, B, C, contexts
from tiny import tiny_backbone
from typer.testing import CliRunner

from cacheclip_rag import Engine
from cacheclip_rag.cli import main as cli
from cacheclip_rag.cli import store as store_cli


def save_model(folder: Path) -> None:
    backbone = tiny_backbone()
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)


def test_a_store_is_fused_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kept = tmp_path / "model", tmp_path / "kv"
    save_model(folder)
    with Engine(str(folder), method="auto", store=kept) as first:
        first.ensure([A, B, C])
        prompt = first.backbone.shared_prefix() + A + B + TAIL
        for _ in range(2):
            first.generate(prompt, max_new_tokens=1)
    place = {A: 0.0, B: 0.2, C: 0.9}
    monkeypatch.setattr("cacheclip_eval.embedding.mean_pooling", lambda: lambda texts: [[1.0, place[t]] for t in texts])
    arguments = ["fuse", "--store", str(kept), "--model", str(folder), "--json"]
    for more, fused in ((["--least", "3"], 0), ([], 1), ([], 0), (["--similar", "--count", "1"], 2)):
        done = CliRunner().invoke(cli.app, [*arguments, *more])
        assert done.exit_code == 0 and json.loads(done.stdout)["fused"] == fused, done.output
    done = CliRunner().invoke(cli.app, arguments[:-1])
    assert "0 of 1 chunks fused now, 0 left out" in done.stdout
    done = CliRunner().invoke(cli.app, [*arguments[:-1], "--least", "3"])
    assert done.exit_code == 0 and "no chunk came in 3 prompts yet" in done.stdout
    done = CliRunner().invoke(cli.app, [*arguments, "--method", "cachecraft"])
    assert done.exit_code == 2 and "encodes no chunk ahead" in done.stderr
    done = CliRunner().invoke(cli.app, ["fuse", "--store", str(tmp_path / "empty"), "--model", str(folder)])
    assert done.exit_code == 2 and "holds no chunks" in done.stderr
    with Engine(str(folder), method="auto", store=kept) as again:
        assert set(contexts(again, B)) == {(), (A,)} and set(contexts(again, A)) == {(), (B,)}


def test_a_keyed_store_of_another_dtype_is_fused_with_its_own_settings(tmp_path: Path) -> None:
    folder, kept, remote = tmp_path / "model", tmp_path / "kv", f"file://{tmp_path / 'remote'}"
    save_model(folder)
    (tmp_path / "secret").write_bytes(b"correct horse\n")

    def engine() -> Engine:
        return Engine(
            str(folder),
            method="auto",
            store=kept,
            secret=b"correct horse",
            remote=remote,
            tenant="one",
            kv_dtype="int8",
            dtype="float32",
        )

    with engine() as first:
        first.ensure([A, B])
        prompt = first.backbone.shared_prefix() + A + B + TAIL
        for _ in range(2):
            first.generate(prompt, max_new_tokens=1)
    arguments = [
        "fuse",
        "--store",
        str(kept),
        "--model",
        str(folder),
        "--dtype",
        "float32",
        "--tenant",
        "one",
        "--json",
    ]
    own = ["--secret-file", str(tmp_path / "secret"), "--kv-dtype", "int8", "--remote", remote]
    for missing in (own[:2], own[2:4]):  # another secret, or another dtype: nothing of what is there is its own
        less = [word for word in own if word not in missing]
        assert CliRunner().invoke(cli.app, [*arguments, *less]).exit_code == 2
    before = {path.name for path in (tmp_path / "remote").rglob("*.safetensors")}
    done = CliRunner().invoke(cli.app, [*arguments, *own])
    assert done.exit_code == 0 and json.loads(done.stdout)["fused"] == 1, done.output
    assert len({path.name for path in (tmp_path / "remote").rglob("*.safetensors")} - before) == 1
    with engine() as again:
        assert set(contexts(again, B)) == {(), (A,)}
    for wrong, message in ((["--cap", "much"], "is no size"), (["--kv-dtype", "int4"], '"auto" or "int8"')):
        done = CliRunner().invoke(cli.app, [*arguments, *wrong])
        assert done.exit_code == 2 and message in done.stderr


def test_fusing_at_the_command_line_evicts_nothing_of_a_large_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inspect.signature(Engine.__init__).parameters["disk_bytes"].default == store_cli.DISK_BYTES
    monkeypatch.setattr(store_cli, "DISK_BYTES", 1)  # whatever is there is more than that
    folder, kept = tmp_path / "model", tmp_path / "kv"
    save_model(folder)
    with Engine(str(folder), method="auto", store=kept) as first:
        first.ensure([A, B, C])
        for text in (A, C):
            for _ in range(2):
                first.generate(first.backbone.shared_prefix() + text + B + TAIL, max_new_tokens=1)
    before = {path.name for path in kept.rglob("*.safetensors")}
    done = CliRunner().invoke(cli.app, ["fuse", "--store", str(kept), "--model", str(folder), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["fused"] == 1, done.output
    assert before < {path.name for path in kept.rglob("*.safetensors")}
