"""Adapters in the engine: merged into a model that shares the rest, refused where they do not belong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import distance
from tiny import PASSAGES, prompt_of, tiny_backbone, tiny_model
from training import adapter

from cacheclip_rag import ConfigurationError, Engine, NotComposable
from cacheclip_rag.model.adapter import CARD, library_version, with_adapter
from cacheclip_rag.model.decode_weights import DecodeWeights, FewRowsLinear, fits
from cacheclip_rag.model.packed import PackedLinear, pack

pytest.importorskip("peft")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter(tiny_backbone(), tmp_path / "tuned")
    return tmp_path / "tuned"


def card(folder: Path, **changes: object) -> None:
    primary = {"name": "tiny", **tiny_backbone().origin()}
    (folder / CARD).write_text(json.dumps({"primary": primary, "library": library_version(), **changes}))


def test_the_library_does_not_import_peft():
    code = "import sys, cacheclip_rag.cli.main; from cacheclip_rag import Engine; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_merged_weights_are_the_adapters_and_the_model_stays_as_it_is(folder):
    """peft's own forward is the reference."""
    from peft import PeftModel

    backbone = tiny_backbone()
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    state = backbone.state()
    adapted = with_adapter(backbone, folder)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        reference = PeftModel.from_pretrained(tiny_model("llama"), str(folder))(ids).logits[0]
    ours = adapted.forward(ids[0], torch.arange(40), adapted.canvas(40), logits=40)
    assert distance(ours, reference) < 1e-5
    assert backbone.state() == state and all(p.requires_grad for p in backbone.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())
    embedding = [each.model.get_input_embeddings().weight for each in (backbone, adapted)]
    assert embedding[0] is embedding[1], "what an adapter does not change is in memory once"


def test_an_adapter_computes_the_whole_request_and_no_other_one(folder):
    engine = Engine(tiny_backbone(), method="naive")
    tuned = f"blockattention:adapter={folder}"
    for method in ("naive", "blockattention", tuned):
        assert engine.ensure(PASSAGES, method=method).encoded == len(PASSAGES)
    prompt = prompt_of(engine, PASSAGES)
    before = {method: engine.prefill(prompt, method=method).logits for method in ("naive", "blockattention", "full")}
    result = engine.prefill(prompt, method=tuned)
    assert result.report.fallbacks == [] and result.report.reused > 0
    assert distance(result.logits, before["blockattention"]) > 0.05
    for method, logits in before.items():
        assert torch.equal(engine.prefill(prompt, method=method).logits, logits)
    # Full prefill, and the path that recomputes everything, are those of a model that has the weights.
    other = Engine(with_adapter(tiny_backbone(), folder)).prefill(prompt, method="full").logits
    for method, ratio in ((f"full:adapter={folder}", None), (tuned, 1.0), (tuned, 1 - 1e-13)):
        assert distance(engine.prefill(prompt, method=method, recompute_ratio=ratio).logits, other) < 1e-4
    apart = [engine.generate(prompt, method=method, max_new_tokens=8).ids for method in (tuned, "blockattention")]
    assert apart[0] != apart[1]


def test_every_method_that_composes_takes_an_adapter(folder):
    engine = Engine(tiny_backbone())
    prompt = prompt_of(engine, PASSAGES)
    full = engine.prefill(prompt, method=f"full:adapter={folder}").logits
    for name in ("auto", "cacheblend", "droidspeak", "cachecraft", "turborag"):
        method = f"{name}:adapter={folder}"
        engine.ensure(PASSAGES, method=method)
        for number in range(2):  # cachecraft harvests the first prompt, and the second one reuses that
            result = engine.prefill(prompt, method=method, recompute_ratio=0.5)
            assert result.report.fallbacks == []
            if name == "cachecraft":
                assert distance(result.logits, full) < 1e-4 and (result.report.reused > 0) == (number > 0)
        assert distance(result.logits, engine.prefill(prompt, method=name, recompute_ratio=0.5).logits) > 0.05


def test_kv_of_an_adapter_is_found_again_wherever_its_folder_is(folder, tmp_path):
    first = Engine(tiny_backbone(), method=f"blockattention:adapter={folder}", store=tmp_path / "store")
    assert first.ensure(PASSAGES).encoded == len(PASSAGES)
    first.close()
    folder.rename(tmp_path / "moved")
    again = Engine(tiny_backbone(), method=f"blockattention:adapter={tmp_path / 'moved'}", store=tmp_path / "store")
    assert again.ensure(PASSAGES).encoded == 0
    adapter(tiny_backbone(), tmp_path / "moved", seed=4)
    other = Engine(tiny_backbone(), method=f"blockattention:adapter={tmp_path / 'moved'}", store=tmp_path / "store")
    assert other.ensure(PASSAGES).encoded == len(PASSAGES), "another adapter's KV is another one"


def test_forgetting_reaches_the_kv_of_an_adapter(folder):
    engine, method = Engine(tiny_backbone(), method="naive"), f"blockattention:adapter={folder}"
    engine.ensure(PASSAGES, method=method)
    engine.forget(PASSAGES[:1])
    assert len(list(engine.library_of(method).store.entries())) == len(PASSAGES) - 1


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["blockattention:adapter={}", "auto:adapter={}"])
def test_a_folder_that_is_no_adapter_is_refused_before_anything_is_answered(method, tmp_path):
    engine = Engine(tiny_backbone())
    for path, said in ((tmp_path / "none", "no folder"), (tmp_path, "holds no LoRA adapter")):
        for use in (
            lambda name: engine.prefill("Hello", method=name),
            lambda name: engine.ensure(PASSAGES, method=name),
            lambda name: Engine(tiny_backbone(), method=name),
        ):
            with pytest.raises(ConfigurationError, match=said):
                use(method.format(path))


def test_an_adapter_of_another_model_is_refused_by_its_card(folder):
    card(folder)
    assert with_adapter(tiny_backbone(), folder)
    assert with_adapter(tiny_backbone(dtype=torch.bfloat16), folder), "the same model in another dtype"
    other = tiny_backbone()
    with torch.no_grad():
        other.model.model.embed_tokens.weight[0] += 1.0
    with pytest.raises(ConfigurationError, match=r"another model, tiny \(it differs in weights\)"):
        with_adapter(other, folder)


def test_without_a_card_an_adapter_that_does_not_fit_is_refused(folder, caplog):
    with pytest.raises(ConfigurationError, match="no adapter that fits"):
        with_adapter(tiny_backbone("gemma3"), _rewritten(folder, "q_proj", "w_proj"))
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigurationError, match="no adapter that fits"):
        (folder / "adapter_model.safetensors").write_bytes(b"nothing")
        with_adapter(tiny_backbone(), folder)
    assert "cannot be told" in caplog.text


def test_an_adapter_of_another_version_is_used_with_a_warning(folder, caplog):
    card(folder, library="0.0.1")
    with caplog.at_level(logging.WARNING):
        assert with_adapter(tiny_backbone(), folder)
    assert "trained with cacheclip-rag 0.0.1" in caplog.text


def test_a_damaged_card_is_refused(folder):
    (folder / CARD).write_text("{")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        with_adapter(tiny_backbone(), folder)


def test_prefix_caching_takes_no_adapter(folder):
    with pytest.raises(ConfigurationError, match="takes no adapter"):
        Engine(tiny_backbone()).prefill("Hello", method=f"ragcache:adapter={folder}")


def test_a_model_that_cannot_be_composed_takes_no_adapter(folder):
    from test_composability import dynamic_rope

    with pytest.raises(NotComposable, match="dynamic"):
        Engine(dynamic_rope(), method=f"blockattention:adapter={folder}", on_uncomposable="prefill")


def _rewritten(folder: Path, old: str, new: str) -> Path:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 instructions")
def test_a_packed_model_takes_an_adapter_and_both_stay_packed(folder):
    plain, packed = (tiny_backbone(dtype=torch.bfloat16) for _ in range(2))
    count = pack(packed.model)
    ids = plain.tokenise(PASSAGES[0]).ids
    expected, merged = with_adapter(plain, folder), with_adapter(packed, folder)
    assert sum(isinstance(module, PackedLinear) for module in merged.model.modules()) == count
    logits = [each.forward(ids, torch.arange(len(ids)), each.canvas(len(ids))) for each in (expected, merged, packed)]
    assert (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm() < (logits[2] - logits[0]).norm()
    again = packed.forward(ids, torch.arange(len(ids)), packed.canvas(len(ids)))
    assert torch.equal(again, logits[2]), "the model itself changed"


def test_layers_that_an_adapter_changes_have_no_copy_of_what_they_were(folder):
    """With weights in 4 bits beside the model's own."""
    plain, quantised = (tiny_backbone() for _ in range(2))
    quantised.decode_weights = DecodeWeights(quantised.model)
    ids = plain.tokenise(PASSAGES[0]).ids
    expected, merged = with_adapter(plain, folder), with_adapter(quantised, folder)
    logits = [each.forward(ids, torch.arange(len(ids)), each.canvas(len(ids))) for each in (expected, merged)]
    assert torch.equal(*logits)
    for name, layer in merged.model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            changed = not torch.equal(layer.weight, plain.model.get_submodule(name).weight)
            fitting = fits(layer.out_features, layer.in_features)
            assert isinstance(layer, FewRowsLinear) is (fitting and not changed), name
