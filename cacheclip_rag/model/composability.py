"""Checks whether chunks can be composed with a model: by its configuration, then by forwards over a few tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..compute import LayerInput, Part
from ..errors import CacheClipError
from .attention import NOTING, windows_given
from .inference import inferring
from .layers import Layers, relative_error
from .rotary import Rotary


def obstacle_of(model: Layers) -> str | None:
    """Why chunks cannot be composed with this model, or None.

    Whatever the architecture is called, its keys must move by one rotation, and our attention must reproduce the
    model's own logits. This is tried on a few tokens, after a look at the configuration.
    """
    name = model.config.model_type
    types = set(getattr(model.config, "layer_types", None) or [])
    if strange := types - {"full_attention", "sliding_attention"}:
        return f"{name} has {', '.join(sorted(strange))} layers, which keep no key per token"
    rope = getattr(model.config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for kind in {r.get("rope_type", "default") for r in nested}:
        if kind in ("dynamic", "longrope"):
            return f"{name} uses {kind} RoPE scaling: its angles depend on the prompt's length, so keys cannot move"
    try:
        return _tried(model)
    except (CacheClipError, AttributeError, RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"{name} could not be tried out on a canvas: {type(error).__name__}: {error}"


@inferring
def _tried(model: Layers) -> str | None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (12,), generator=generator)
    rows, shift = torch.arange(12), 20
    own = model.model(input_ids=ids.to(model.device)[None], use_cache=False).logits[0].float()
    native = model.model.config._attn_implementation
    model.model.set_attn_implementation(model.attention)
    try:
        here, there = model.workspace(12), model.workspace(12)
        for canvas in (here, there):  # so that slots which no layer writes cannot pass the checks by chance
            canvas.keys.fill_(float("nan"))
            canvas.values.fill_(float("nan"))
        ours = model.forward_one(Part(here, ids, rows), logits=12)
        # Attention is relative: the same tokens elsewhere must give the same keys up to one rotation.
        model.forward_one(Part(there, ids, rows, rows + shift), logits=0)
        rotated = Rotary(model.inverse_frequencies()).rotate(here.keys[:, 0], shift)
        model.model.set_attn_implementation(NOTING)
        # Some models compute the last row only in their last layers. With a hook, the path of buffered KV is checked.
        last = model.forward_one(Part(model.workspace(12), ids, rows, hooks=[_Look()]), logits=1)
        given = windows_given(model.model)
    finally:
        model.model.set_attn_implementation(native)
    name = model.config.model_type
    if here.keys.isnan().any() or here.values.isnan().any():
        return f"{name}: some layers keep no keys and values of their own"
    # A dozen tokens lie within any window, so check the window that each layer's attention was given instead.
    if strange := [n for n, window in enumerate(model.windows) if window is not None and window != given.get(n)]:
        return f"{name}: its attention is not told the sliding window of layer {strange[0]}"
    # Rounding stays far below a tenth in bfloat16; a wrong layout or an ignored argument gives an error of order one.
    # `not ... <=` catches NaN as well.
    if not (error := _worst([ours, last], [own, own[-1:]])) <= 0.1:
        return f"{name}: our attention differs from the model's own by {error:.0%}"
    if not (error := _worst(rotated, there.keys[:, 0])) <= 0.1:
        return f"{name}: its keys do not move by a rotation (off by {error:.0%})"
    if not (error := _worst(here.values, there.values)) <= 0.1:
        return f"{name}: its values depend on the absolute position (off by {error:.0%})"
    return None


class _Look:
    """A hook that changes nothing."""

    layers = None

    def __call__(self, at: LayerInput) -> None:
        pass


def _worst(a: Iterable[Tensor | None], b: Iterable[Tensor]) -> float:
    """The largest `relative_error` of any layer, so that layers with large numbers do not hide one with small ones;
    NaN if one of them is.
    """
    errors = [relative_error(one, other) for one, other in zip(a, b, strict=True)]
    return float(torch.tensor(errors, dtype=torch.float64).max())
