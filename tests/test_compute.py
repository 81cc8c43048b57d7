"""The protocol that methods are written against, as a model of transformers implements it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from oracles import distance, own
from tiny import tiny_backbone

from cacheclip_rag.compute import LayerInput, Part, StopForward
from cacheclip_rag.methods.scores import LayerKV

KINDS = ["llama", "mistral-sliding", "gemma3", "yarn-rope"]
IDS = torch.arange(20)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_forward_do_not_see_each_other(kind: str) -> None:
    computer = tiny_backbone(kind).computer
    parts = [Part(computer.workspace(20), ids, torch.arange(len(ids))) for ids in (IDS, IDS[5:])]
    for part, logits in zip(parts, computer.forward(parts), strict=True):
        assert logits is not None and distance(logits, own(kind, part.x).logits[0, -1:]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_sees_rotated_keys_and_values_of_its_rows_before_they_are_written(kind: str) -> None:
    computer, theirs = tiny_backbone(kind).computer, own(kind, IDS)
    workspace = computer.workspace(20)
    computer.forward([Part(workspace, IDS[:12], torch.arange(12))], logits=0)
    for layer in range(computer.layers):  # rows that are computed below hold something else until then
        workspace.placed(layer)[0][12:].fill_(7.0)
    seen = []

    class Note:
        layers = None

        def __call__(self, at: LayerInput) -> None:
            assert bool((at.workspace.placed(at.layer)[0][12:] == 7.0).all()), "not written yet"
            seen.append((at.key.clone(), at.value.clone(), at.query.shape))

    computer.forward([Part(workspace, IDS[12:], torch.arange(12, 20), hooks=[Note()])])
    assert len(seen) == computer.layers
    for layer, (key, value, query) in enumerate(seen):
        assert query[0] == 8 and distance(key, theirs.keys[layer, :, 12:].transpose(0, 1)) < 1e-4
        assert distance(value, theirs.values[layer, :, 12:].transpose(0, 1)) < 1e-4
        assert distance(workspace.placed(layer)[0][:20], theirs.keys[layer].transpose(0, 1)) < 1e-4, "written after"


def test_what_a_hook_writes_is_attended_to_in_the_same_layer() -> None:
    """KV of other rows, wrong until a hook mends it layer by layer, gives a full prefill's logits."""
    computer, theirs = tiny_backbone("llama").computer, own("llama", IDS)
    workspace, rows = computer.workspace(20), torch.arange(12)
    workspace.write(0, torch.zeros_like(theirs.keys), torch.zeros_like(theirs.values))

    class Mend:
        layers = None

        def __call__(self, at: LayerInput) -> None:
            keys, values = (kv[at.layer, :, :12].transpose(0, 1) for kv in (theirs.keys, theirs.values))
            at.workspace.write_layer(at.layer, rows, keys, values)

    [logits] = computer.forward([Part(workspace, IDS[12:], torch.arange(12, 20), hooks=[Mend()])])
    assert logits is not None and distance(logits, theirs.logits[0, -1:]) < 1e-4


def test_a_hook_may_end_the_forward() -> None:
    computer, layers = tiny_backbone("llama").computer, []

    class Stop:
        layers = None

        def __call__(self, at: LayerInput) -> None:
            layers.append(at.layer)
            if at.layer == 1:
                raise StopForward

    assert computer.forward([Part(computer.workspace(20), IDS, torch.arange(20), hooks=[Stop()])]) == [None]
    assert layers == [0, 1]
    fresh = LayerKV(2)
    computer.forward([Part(computer.workspace(20, layers=3), IDS, torch.arange(20), hooks=[fresh])], depth=3, logits=0)
    assert distance(fresh.keys, own("llama", IDS).keys[2].transpose(0, 1)) < 1e-4


def test_layers_in_stages_give_what_they_give_in_one() -> None:
    computer = tiny_backbone("llama").computer
    workspace, rows = computer.workspace(20), torch.arange(20)
    [stream] = computer.advance([Part(workspace, IDS, rows)], 0, 2)
    [logits] = computer.forward([Part(workspace, stream, rows)], first=2)
    assert logits is not None and distance(logits, own("llama", IDS).logits[0, -1:]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_moved_each_by_its_own_distance(kind: str) -> None:
    """Computed at two places, the difference is that rotation."""
    computer, rows = tiny_backbone(kind).computer, torch.arange(20)
    here, there = computer.workspace(20), computer.workspace(20)
    positions = rows + 3 * rows
    computer.forward([Part(here, IDS, rows)], depth=1, logits=0)
    computer.forward([Part(there, IDS, rows, positions)], depth=1, logits=0)
    moved = computer.rotation(positions - rows)(here.placed(0)[0][:20].float(), 0)
    assert distance(moved, there.placed(0)[0][:20]) < 1e-4


def test_methods_import_nothing_of_transformers() -> None:
    program = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"  # importing it fails
        "import cacheclip_rag.methods, cacheclip_rag.methods.auxiliary, cacheclip_rag.compute\n"
        "assert len(cacheclip_rag.methods.METHODS) > 20\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
