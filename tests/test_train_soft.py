"""Training soft tokens: ``cacheclip tune packet`` distils a model into a header and a trailer, ``tune links`` fits
link tokens and weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cacheclip_eval.data import Item, Passage, prompt
from cacheclip_train.loop import Settings, train
from cacheclip_train.lora import Lora, Soft
from cacheclip_train.packet import Packet, greedy
from safetensors.torch import load_file
from test_tune import SMALL, items, tune, write
from tiny import PASSAGES, tiny_backbone
from training import ITEM, soft_tokens

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.methods import resolve

pytest.importorskip("peft")


def test_the_loss_is_the_kl_of_what_the_engine_says_from_packets(tmp_path):
    backbone = tiny_backbone()
    trained = soft_tokens(backbone, tmp_path, "kvpacket")
    assert isinstance(trained, Packet)
    engine, text = Engine(backbone, method=f"kvpacket:adapter={tmp_path}"), prompt(ITEM, backbone)
    assert engine.ensure([p.chunk for p in ITEM.passages]).skipped == []
    answer = trained.answer(ITEM).tolist()
    full = engine.generate(text, method="full", max_new_tokens=8, temperature=None, do_sample=False)
    assert answer == list(full.ids)
    p, q = (engine.prefill(text, method=m).forced(answer).log_softmax(-1) for m in ("full", None))
    with torch.no_grad():
        loss, tokens = trained.loss(ITEM)
    assert float(loss) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3) and tokens > 2000
    engine.ensure([p.chunk for p in ITEM.passages], method="promptcache")
    q = engine.prefill(text, method="promptcache").forced(answer).log_softmax(-1)
    untuned = trained.mean_loss([ITEM], untuned=True)
    assert untuned == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_teachers_answer_ends_where_the_model_ends_it():
    backbone = tiny_backbone()
    first = int(greedy(backbone, "Hello", 1)[0])
    backbone.model.generation_config.eos_token_id = first
    assert greedy(backbone, "Hello", 5).tolist() == [first]


def quick(folder: Path, stop: int | None = None, seed: int = 0) -> tuple[Packet, object]:
    """A packet trained for a few steps on a tiny model; Ctrl-C in example ``stop``."""
    lora = Lora(tiny_backbone(), 0, seed, soft=Soft("packet", 2, 2))
    packet = Packet(lora, resolve("kvpacket"), 4)
    task, seen = packet.task(items(2), items(2), lambda history: lora.save(folder)), [0]
    loss = task.loss

    def counted(example: int) -> tuple[torch.Tensor, int]:
        seen[0] += 1
        if seen[0] == stop:
            raise KeyboardInterrupt
        return loss(example)

    task.loss = counted  # type: ignore[method-assign]
    settings = Settings(epochs=8, batch=2, lr=0.02, every=2, patience=50)
    return packet, train(task, settings, folder, {"kind": "packet"}, None, lambda *_: None)


def test_a_packet_is_trained_and_the_model_is_not(tmp_path):
    packet, outcome = quick(tmp_path)
    backbone = packet.lora.backbone
    assert [name for name in packet.lora.trained] == ["model.embed_tokens.vectors"]
    for name, tensor in tiny_backbone().model.state_dict().items():
        assert torch.equal(backbone.model.state_dict()[name], tensor), name
    assert outcome.gained and outcome.best["KL"] < 0.9 * outcome.first["KL"]
    assert outcome.best["KL without a packet"] == outcome.first["KL without a packet"] > 0
    packet.load(tmp_path)
    assert packet.mean_loss(items(2)) == pytest.approx(outcome.best["KL"], rel=1e-4)


def test_interrupted_it_ends_with_the_same_packet(tmp_path):
    whole, _ = quick(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "broken", stop=11)
    again, _ = quick(tmp_path / "broken")
    [a], [b] = whole.lora.trained.values(), again.lora.trained.values()
    assert torch.equal(a, b)


def test_link_tokens_are_trained_with_the_weights_or_alone():
    for rank, more in ((4, True), (0, False)):
        lora = Lora(tiny_backbone(), rank, soft=Soft("links", 0, 2))
        assert any("lora_" in name for name in lora.trained) is more
        [vectors] = [one for name, one in lora.trained.items() if "lora_" not in name]
        assert vectors.shape == (2, 64) and 0.01 < float(vectors.std()) < 0.03


# ---- the commands ----------------------------------------------------------------------------------------------------


def alike() -> list[Item]:
    """One question about one pair of passages under the titles of five documents: a random model generalises nothing
    else.
    """
    made = []
    for n in range(10):
        passages = (Passage(f"D{n % 5}", PASSAGES[0], True), Passage(f"D{n % 5}", PASSAGES[1]))
        made.append(Item(f"q{n}", "Who built it?", ("Ada",), passages))
    return made


@pytest.fixture(scope="module", params=["links", "packet"])
def trained(request: pytest.FixtureRequest, stand_in: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp(request.param)
    data, out = write(home / "qa.jsonl", alike()), home / "out"
    own = {"links": ("--links", 2, "--rank", 2), "packet": ("--header", 3, "--trailer", 2, "--answer", 4)}[
        request.param
    ]
    words = (data, "--model", stand_in, "--out", out, *SMALL[:-2], *own, "--lr", 0.02)
    code, said, errors = tune(*words, "--hours", 0, kind=request.param)
    assert code == 0 and "paused" in said, errors
    code, said, errors = tune(*words, kind=request.param)
    assert code == 0 and f"kv{request.param.removesuffix('s')}:adapter={out}" in said, errors
    return out


def test_the_folder_is_used_by_its_path(trained, stand_in):
    card = json.loads((trained / "card.json").read_text())
    kind, method = card["kind"], card["uses"].replace("FOLDER", str(trained))
    assert card["finished"] and card["primary"]["name"] == stand_in
    vectors = load_file(trained / f"{kind}.safetensors")
    assert [len(vectors[part]) for part in ("before", "behind")] == {"links": [0, 2], "packet": [3, 2]}[kind]
    assert (trained / "adapter_config.json").is_file() is (kind == "links")
    assert any("untuned" in name for name in card["report"])
    assert {"links": "Link tokens of", "packet": "Packet (header and trailer) of"}[kind] in (
        trained / "README.md"
    ).read_text()
    texts = PASSAGES[:2]
    engine = Engine(stand_in, dtype="float32", method=method)
    assert engine.ensure(texts).skipped == []
    content = "Read.\n\n" + "\n\n".join(texts) + "\n\nWho?"
    report = engine.generate(engine.backbone.chat([{"role": "user", "content": content}]), max_new_tokens=4).report
    assert report.fallbacks == [] and report.soft_tokens == {"links": 4, "packet": 10}[kind] and report.reused > 50


def test_another_model_refuses_it(trained, smollm2):
    method = json.loads((trained / "card.json").read_text())["uses"].replace("FOLDER", str(trained))
    with pytest.raises(ConfigurationError, match="trained for another model"):
        Engine(smollm2, method=method)


def test_a_packet_needs_questions_without_answers(stand_in, tmp_path):
    data = write(tmp_path / "log.jsonl", [Item(one.id, one.question, (), one.passages) for one in items()])
    words = (data, "--model", stand_in, "--out", tmp_path / "out", *SMALL[:-2], "--answer", 4, "--hours", 0)
    code, said, errors = tune(*words, kind="packet")
    assert code == 0 and "paused" in said, errors


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("links", ("--links", 6), "--links is from 1 to 5, not 6"),
        ("packet", ("--header", 0, "--trailer", 0), "at least 1 together"),
        ("packet", (), "asks about 5 documents"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(kind, words, said, tmp_path):
    data = write(tmp_path / "qa.jsonl", items())
    code, _, errors = tune(data, *words, "--out", tmp_path / "out", kind=kind)
    assert code == 2 and said in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()
