"""A head on an auxiliary model: its features worked out by hand, its scores in selection, and ``tune head``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cacheclip_train.head import Head
from cacheclip_train.teacher import Teacher
from oracles import distance
from test_tune import items, tune, write
from tiny import PASSAGES, tiny_backbone
from training import ITEM

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.methods.auxiliary import Auxiliary
from cacheclip_rag.methods.head import HEAD, features, read_head


def test_features_of_two_chunks_by_hand():
    attention = torch.tensor([[0.2, 0.1, 0.05], [1.0, 0.0, 0.0]])
    found = features(attention, torch.tensor([[1.0, 3.0]] * 3), torch.tensor([7, 8, 9]), [2, 1], torch.tensor([9, 1]))
    assert torch.allclose(found[:, 0], (attention[0] * 3).log())
    assert found[1, 1] == pytest.approx(np.log(1e-4)), "no attention at all is a number"
    assert torch.allclose(found[0, 2:4], torch.tensor([-1.0, 1.0]), atol=1e-4)
    assert found[:, 4].tolist() == [0.0, 0.0, 1.0], "the question has the token 9"
    assert found[:, 5].tolist() == pytest.approx([1.0, np.exp(-0.25), 1.0])
    assert found[:, 7].tolist() == pytest.approx([0.0, 0.5, 0.0])
    assert found[:, 8].tolist() == pytest.approx([0.0, 1 / 3, 2 / 3])


def test_a_head_scores_in_selection_what_it_scores_in_training(tmp_path):
    head = Head(tiny_backbone("qwen3"), Teacher(tiny_backbone("llama")), hidden=8, seed=1)
    with torch.no_grad():
        _, q, _ = head.compared(ITEM)
    head.save(tmp_path)
    engine = Engine(tiny_backbone())
    library = engine.open_auxiliary(tiny_backbone("qwen3")).library
    auxiliary = Auxiliary(library, read_head(tmp_path))
    scored = auxiliary.score([passage.chunk for passage in ITEM.passages], ITEM.question)
    scores = torch.from_numpy(np.concatenate([each.scores for each in scored]))
    assert float(scores.sum()) == pytest.approx(1.0, abs=1e-4)
    assert distance(scores, q) < 1e-2, "features are kept in float16"
    with head.looking(untuned=True):
        plain = Auxiliary(library).score([passage.chunk for passage in ITEM.passages], ITEM.question)
        attention = torch.from_numpy(np.concatenate([each.scores for each in plain]))
        assert distance(head.compared(ITEM)[1], attention / attention.sum()) < 1e-2


@pytest.fixture(scope="module")
def trained(stand_in: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tune-head")
    asked = [{"id": i.id, "question": i.question, "answers": []} for i in items()]
    data = write(home / "qa.jsonl", items())
    rows = [json.loads(line) | row for line, row in zip(data.read_text().splitlines(), asked, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))  # a log of questions has no answers
    words = (data, "--model", stand_in, "--auxiliary", stand_in, "--out", home / "out", "--hidden", 4, "--lr", 0.01)
    code, said, errors = tune(*words, "--stop-documents", 1, "--report-documents", 1, "--every", 2, kind="head")
    assert code == 0 and f"cacheclip:auxiliary={home / 'out'}" in said, errors
    return home / "out"


def test_the_folder_is_an_auxiliary_model_with_a_head(trained, stand_in):
    card = json.loads((trained / "card.json").read_text())
    looks = [row["held_out"]["KL"] for row in card["training"]["history"]]
    assert card["kind"] == "head" and min(looks) < looks[0] and "tuned, KL" in card["report"]
    engine = Engine(stand_in, auxiliary=trained)
    assert engine.auxiliary is not None and engine.auxiliary.head is not None
    assert engine.ensure(PASSAGES).skipped == []
    content = "Read.\n\n" + "\n\n".join(PASSAGES) + "\n\nWho drove the last train?"
    prompt = engine.backbone.chat([{"role": "user", "content": content}])
    report = engine.prefill(prompt).report
    assert report.fallbacks == [] and report.recomputed > 0


def test_a_damaged_head_and_another_models_are_refused(trained, stand_in, tmp_path):
    (tmp_path / HEAD).write_bytes(b"nothing")
    (tmp_path / "card.json").write_bytes((trained / "card.json").read_bytes())
    with pytest.raises(ConfigurationError, match="holds no head"):
        Engine(stand_in, auxiliary=tmp_path)
    card = json.loads((trained / "card.json").read_text())
    card["primary"]["weights"] = "other"
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ConfigurationError, match=r"another model, .* differs in weights"):
        Engine(stand_in, auxiliary=tmp_path)
