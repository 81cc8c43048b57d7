"""Fitting an auxiliary model: its scores in training are those of selection, its target the primary's attention."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cacheclip_eval.data import Passage, prompt
from cacheclip_train.blocks import Blocks
from cacheclip_train.lora import Lora
from cacheclip_train.selection import KEEPING, Selection
from cacheclip_train.teacher import Teacher, kl
from oracles import distance, own
from test_tune import items, tune, write
from tiny import PASSAGES, tiny_backbone
from training import ITEM

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.methods import resolve
from cacheclip_rag.model.adapter import with_adapter

pytest.importorskip("peft")


def fitted(layers: str, seed: int = 3) -> Selection:
    """An auxiliary model with an adapter of random weights, and a teacher with another tokenizer's model."""
    selection = Selection(Lora(tiny_backbone("qwen3"), 4, attention=KEEPING), Teacher(tiny_backbone("llama")), layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in selection.lora.trained.values():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return selection


@pytest.mark.parametrize("layers", ["last", "upper"])
def test_training_scores_tokens_as_selection_does(layers, tmp_path):
    selection = fitted(layers)
    selection.lora.save(tmp_path)
    engine = Engine(tiny_backbone())
    auxiliary = engine.open_auxiliary(with_adapter(tiny_backbone("qwen3"), tmp_path))
    texts = [passage.chunk for passage in ITEM.passages]
    expected = auxiliary.score(texts, ITEM.question, layers)
    rows, columns, offsets = selection.rows(texts, ITEM.question)
    with torch.no_grad():
        ours = selection.scores(rows, columns)
    assert distance(ours, torch.from_numpy(np.concatenate([each.scores for each in expected]))) < 1e-4
    assert offsets.tolist() == np.concatenate([each.offsets for each in expected]).tolist()
    plain = engine.open_auxiliary(tiny_backbone("qwen3")).score(texts, ITEM.question, layers)
    assert distance(ours, torch.from_numpy(np.concatenate([each.scores for each in plain]))) > 0.05


def test_the_target_is_the_primarys_attention_in_a_full_prefill():
    """Eager attention of transformers is the reference; with one token a byte, characters are tokens."""
    backbone = tiny_backbone("llama")
    teacher = Teacher(backbone, band=(0.5, 1.0))
    assert teacher.layers == [2, 3]
    text = prompt(ITEM, backbone)
    tokens = backbone.tokenise(text)
    ids, place = tokens.ids, tokens.offsets[:, 0].tolist().index  # control tokens have several characters
    start = place(text.rindex(ITEM.question))
    attention = torch.stack([own("llama", ids).attentions[layer][0] for layer in (2, 3)])
    asked = attention[:, :, start : start + len(ITEM.question)].mean(dim=(0, 1, 2))
    found = teacher.masses(ITEM)
    assert list(found) == [passage.chunk for passage in ITEM.passages]
    for chunk, mass in found.items():
        at = place(text.index(chunk))
        assert distance(torch.from_numpy(mass), asked[at : at + len(chunk)]) < 1e-4


def test_a_target_keeps_its_mass_between_tokenizers(smollm2):
    selection = Selection(Lora(smollm2, 2, attention=KEEPING), Teacher(tiny_backbone("llama")), "last")
    passages = (*ITEM.passages[:2], Passage("", "Café, naïve, 漢字 and 🙂🙂: " + PASSAGES[2]))
    item = replace(ITEM, passages=passages)
    with torch.no_grad():
        p, q, _ = selection.compared(item)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-4) and float(q.sum()) == pytest.approx(1.0, abs=1e-4)
    tokens = [len(smollm2.tokenise(passage.chunk)) for passage in passages]
    masses = list(selection.targets.of(item).values())
    shares = torch.tensor([float(mass.sum()) for mass in masses]) / sum(float(mass.sum()) for mass in masses)
    assert torch.allclose(torch.stack([part.sum() for part in p.split(tokens)]), shares, atol=1e-2)
    assert float(kl(p, p)) == 0.0 and float(kl(p, q)) > 0.0


@pytest.fixture(scope="module")
def trained(stand_in: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tune-auxiliary")
    data = write(home / "qa.jsonl", items())
    more = ("--stop-documents", 1, "--report-documents", 1, "--every", 2, "--epochs", 4, "--batch", 2, "--rank", 2)
    out = home / "out"
    words = (data, "--model", stand_in, "--auxiliary", stand_in, "--out", out, *more, "--lr", 0.02, "--layers", "upper")
    code, said, errors = tune(*words, kind="auxiliary")
    assert code == 0 and f"cacheclip:auxiliary={out},layers=upper" in said, errors
    return out


def test_the_folder_is_an_auxiliary_model(trained, stand_in, smollm2, caplog):
    card = json.loads((trained / "card.json").read_text())
    assert card["finished"] and card["fitted_to"]["name"] == card["primary"]["name"] == stand_in
    assert card["report"]["tuned, KL"] > 0 and set(card["report"]) >= {"untuned, KL", "tuned, top fifth missed"}
    looks = [row["held_out"]["KL"] for row in card["training"]["history"]]
    assert min(looks) < looks[0]
    with caplog.at_level(logging.WARNING):
        engine = Engine(stand_in, auxiliary=trained)
    assert "fitted to another" not in caplog.text and engine.method.name == "cacheclip"
    assert engine.ensure(PASSAGES).skipped == []
    content = "Read.\n\n" + "\n\n".join(PASSAGES) + "\n\nWho drove the last train?"
    text = engine.backbone.chat([{"role": "user", "content": content}])
    report = engine.prefill(text).report
    assert report.fallbacks == [] and report.recomputed > 0
    with caplog.at_level(logging.WARNING):
        Engine(smollm2, auxiliary=trained)
    assert "fitted to another model" in caplog.text


def test_an_adapter_without_a_card_stands_for_no_model(tmp_path):
    fitted("last").lora.save(tmp_path)
    with pytest.raises(ConfigurationError, match="no card that names its model"):
        Engine(tiny_backbone(), auxiliary=tmp_path)


def test_layers_are_checked(tmp_path):
    code, _, said = tune(write(tmp_path / "qa.jsonl", items()), "--layers", "first", kind="auxiliary")
    assert code == 2 and "last or upper" in said


@pytest.mark.parametrize("kind", ["blocks", "auxiliary"])
def test_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        lora = Lora(tiny_backbone(), 2, attention=KEEPING, checkpointing=checkpointing)
        lora.model.train()
        if kind == "blocks":
            task = Blocks(lora, resolve("blockattention"), joint=False)
            loss = task.loss(task.rows(ITEM, True))
        else:
            p, q, _ = Selection(lora, Teacher(tiny_backbone("qwen3")), "upper").compared(ITEM)
            loss = kl(p, q)
        loss.backward()
        gradients.append({n: p.grad for n, p in lora.trained.items() if p.grad is not None and p.grad.abs().sum() > 0})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(distance(gradients[1][name], gradient) < 1e-5 for name, gradient in gradients[0].items())
