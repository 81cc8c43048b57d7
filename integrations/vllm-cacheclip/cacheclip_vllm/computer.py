"""The protocol of `cacheclip_rag.compute` over vLLM's paged KV cache: any rows of a prompt, as virtual sequences.

A run of neighbouring rows [a, b) of a request is handed to the attention backend as a sequence of its own: query length
b - a, context length b, the request's own blocks. The bottom-right aligned causal mask of every paged backend is then
exactly ``slot <= row``. So scattered rows need no kernel, mask or backend of their own, and rows of several requests
are one ordinary batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.compute import LayerInput, Part, Rotation, StopForward, to_device
from cacheclip_rag.errors import NotComposable

from . import seams


class Tables:
    """Moves keys with vLLM's own tables of cos and sin, which are rounded to the model's dtype.

    Undoing the table's row of the old position and applying the new one gives the keys that vLLM computes there; one
    rotation by the difference would be off by the tables' rounding.
    """

    def __init__(self, model: seams.Model) -> None:
        rotaries = [model.rotary(layer) for layer in range(len(model.layers))]
        known = {id(rotary): seams.rotary_table(rotary) for rotary in rotaries}
        self._tables = [known[id(rotary)] for rotary in rotaries]
        self.alike = [
            [layer for layer, other in enumerate(rotaries) if other is rotary]
            for rotary in {id(rotary): rotary for rotary in rotaries}.values()
        ]
        """The layers that share a table, for each table."""
        self._first = {layer: layers[0] for layers in self.alike for layer in layers}

    def move(self, keys: Tensor, layer: int, old: Tensor, new: Tensor) -> Tensor:
        """Keys ``[..., n, Hk, D]`` of a layer, or of several that are `alike`, from the positions ``old [n]`` to
        ``new [n]``, in their dtype.
        """
        if torch.equal(old, new):
            return keys
        return _rotated(keys, *self._turn(layer, old, new, keys.device))

    def rotation(self, by: Tensor) -> Rotation:
        """The rotation of one layer's keys, token j by ``by[j]`` positions."""
        known: dict[int, tuple[Tensor, Tensor, bool]] = {}

        def rotate(keys: Tensor, layer: int) -> Tensor:
            first = self._first[layer]
            if first not in known:
                known[first] = self._turn(layer, (-by).clamp(min=0), by.clamp(min=0), keys.device)
            return _rotated(keys, *known[first])

        return rotate

    def _turn(self, layer: int, old: Tensor, new: Tensor, device: torch.device) -> tuple[Tensor, Tensor, bool]:
        """The cos and sin ``[n, 1, d/2]`` that move keys from ``old`` to ``new``, and how dimensions are paired."""
        cos, sin, halves = self._tables[layer]
        c0, s0, c1, s1 = (table[at.to(table.device)][:, None].to(device) for at in (old, new) for table in (cos, sin))
        scale = c0 * c0 + s0 * s0  # 1 but for rounding; YaRN's factor is in the key and must stay, so it is divided out
        return (c1 * c0 + s1 * s0) / scale, (s1 * c0 - c1 * s0) / scale, halves


def _rotated(keys: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """``keys [n, Hk, D]`` turned by the angles with this ``cos`` and ``sin [n, 1, d/2]``."""
    size = 2 * cos.shape[-1]
    part, rest = keys[..., :size].float(), keys[..., size:]
    a, b = part.chunk(2, dim=-1) if halves else (part[..., 0::2], part[..., 1::2])
    turned = a * cos - b * sin, b * cos + a * sin
    part = torch.cat(turned, dim=-1) if halves else torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat([part.to(keys.dtype), rest], dim=-1)


class PagedWorkspace:
    """One request's blocks in vLLM's KV cache, and plain copies of the KV that was placed there: a `Workspace`.

    The cache is never read, since each backend has a layout of its own. Rows before ``first`` are in blocks that other
    requests may share; they are never written. ``heads`` selects this rank's heads of a chunk.
    """

    def __init__(self, model: seams.Model, tables: Tables, blocks: Tensor, first: int, heads: slice) -> None:
        self.blocks, self.first, self.length = blocks, first, 0
        self._model, self._tables, self._heads = model, tables, heads
        _, kv_heads, size = model.heads[0]
        shape = (len(model.layers), self.capacity, kv_heads, size)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._placed: list[slice] = []

    @property
    def capacity(self) -> int:
        return len(self.blocks) * self._model.block_size

    def slots(self, rows: Tensor) -> Tensor:
        """The slots of the paged cache that hold these rows, ``[n]`` int64; -1, which is not written, before
        `first`.
        """
        size = self._model.block_size
        slots = self.blocks[rows // size].long() * size + rows % size
        return torch.where(rows < self.first, -1, slots)

    def place(self, chunk: ChunkKV, tokens: slice, row: int, position: int | None = None) -> None:
        """Keep the KV of ``chunk``'s ``tokens`` for the rows from ``row`` on, its keys moved there. `flush` writes."""
        count = tokens.stop - tokens.start
        old = torch.arange(chunk.position + tokens.start, chunk.position + tokens.stop)
        new = torch.arange(count) + (row if position is None else position)
        rows = slice(row, row + count)
        keys, values = (
            to_device(kv[:, self._heads, tokens], self._model.device).transpose(1, 2)
            for kv in (chunk.keys, chunk.values)
        )
        for layers in self._tables.alike:
            self.keys[layers, rows] = self._tables.move(keys[layers], layers[0], old, new)
        self.values[:, rows] = values
        self._placed.append(rows)
        self.length = max(self.length, rows.stop)

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Keep KV ``[L, Hk, n, D]`` of all layers (this rank's heads), already at its position. `flush` writes."""
        rows = slice(row, row + keys.shape[2])
        self.keys[:, rows], self.values[:, rows] = keys.transpose(1, 2), values.transpose(1, 2)
        self._placed.append(rows)
        self.length = max(self.length, rows.stop)

    def read(self, rows: slice) -> tuple[Tensor, Tensor]:
        """A copy of the KV that was kept for ``rows``: keys and values ``[L, Hk, n, D]``, this rank's heads."""
        return self.keys[:, rows].transpose(1, 2).clone(), self.values[:, rows].transpose(1, 2).clone()

    def flush(self, layers: range | None = None) -> None:
        """Write what was placed to the paged cache, in ``layers`` (None: in all)."""
        if not self._placed:
            return
        rows = torch.cat([torch.arange(part.start, part.stop) for part in self._placed])
        rows = rows[rows >= self.first]
        if not len(rows):
            return
        slots = self.slots(rows).to(self._model.device)
        for layer in range(len(self.keys)) if layers is None else layers:
            self._model.write(layer, self.keys[layer][rows], self.values[layer][rows], slots)

    def write_layer(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write KV ``[n, Hk, D]`` of one layer at ``rows [n]``."""
        self.keys[layer][rows], self.values[layer][rows] = keys, values
        slots = self.slots(rows.cpu()).to(self._model.device)
        self._model.write(layer, keys.contiguous(), values.contiguous(), slots)

    def placed(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values ``[capacity, Hk, D]`` of one layer that were placed; zeros elsewhere."""
        return self.keys[layer], self.values[layer]


class Scratch:
    """The first ``layers`` of a request's blocks, to be computed over and then written back: a `Workspace`.

    For selectors that compare a fresh forward with what was placed. Rows in shared blocks are attended to as they are.
    """

    def __init__(self, over: PagedWorkspace, layers: int) -> None:
        self.over, self.layers, self.length = over, layers, over.length

    @property
    def capacity(self) -> int:
        return self.over.capacity


class Keep:
    """A hook that keeps the KV of its first ``count`` rows (None: of all) in the plain tensors of their workspace."""

    layers = None

    def __init__(self, count: int | None = None) -> None:
        self._mine = slice(count)

    def __call__(self, at: LayerInput) -> None:
        workspace, rows = at.workspace, at.rows[self._mine]
        assert isinstance(workspace, PagedWorkspace)
        workspace.keys[at.layer, rows], workspace.values[at.layer, rows] = at.key[self._mine], at.value[self._mine]


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward that a request asks for: ``parts`` through the layers up to ``depth`` (None: all)."""

    parts: Sequence[Part]
    depth: int | None


@dataclass(frozen=True, eq=False)
class Mean:
    """A mean over the ranks that a request asks for."""

    scores: Tensor


class PagedComputer:
    """vLLM's loaded model as a `Computer` for one request.

    ``run`` computes a `Forward` or a `Mean`, together with those of other requests (see `batch.Batch`). Of rows before
    ``keep`` the workspace has the KV behind a forward through all layers.
    """

    def __init__(
        self,
        model: seams.Model,
        tables: Tables,
        workspace: PagedWorkspace,
        run: Callable[[Any], Any],
        keep: int = 0,
    ) -> None:
        self.layers, self.device = len(model.layers), model.device
        self.windows = model.windows
        self._tables, self._workspace, self._run, self._keep = tables, workspace, run, keep

    @property
    def full_layers(self) -> list[int]:
        """The layers with full attention; all layers if every one has a sliding window."""
        return [layer for layer, window in enumerate(self.windows) if window is None] or list(range(self.layers))

    def workspace(self, capacity: int, layers: int | None = None) -> Any:  # of a Workspace, what a forward needs
        """The request's own blocks again, whose KV is written back behind the forward."""
        return Scratch(self._workspace, layers or self.layers)

    def forward(
        self, parts: Sequence[Part], *, first: int = 0, depth: int | None = None, logits: int = 1
    ) -> list[Tensor | None]:
        """As `Computer.forward`, without logits: vLLM computes the prompt's last row itself.

        Raises `NotComposable` for a forward that begins in a later layer, and for score modifications.
        """
        if first or logits or any(part.score_mod is not None for part in parts):
            raise NotComposable("inside vLLM a forward runs from the first layer on, with the backend's own attention")
        self._run(Forward(parts if depth is not None else [self._keeping(part) for part in parts], depth))
        return [None] * len(parts)

    def _keeping(self, part: Part) -> Part:
        count = int((part.rows < self._keep).sum())
        return part if not count else replace(part, hooks=[Keep(count), *part.hooks])

    def advance(self, parts: Sequence[Part], first: int, last: int) -> list[Tensor]:
        """Raises `NotComposable`: vLLM's models do not hand out their residual stream."""
        raise NotComposable("vLLM's models cannot be run in stages")

    def rotation(self, by: Tensor) -> Rotation:
        """The rotation that moves one layer's keys, token j by ``by[j]`` positions."""
        return self._tables.rotation(by)

    def over_ranks(self, scores: Tensor) -> Tensor:
        """The mean over the tensor-parallel ranks."""
        mean: Tensor = self._run(Mean(scores))
        return mean


def run_forward(model: seams.Model, parts: Sequence[Part], depth: int | None) -> bool:
    """Compute the rows of these parts in one pass; their KV is written before it is attended to.

    Each part's hooks see its own rows; a part whose hook raises `StopForward` has no more of them, and the pass ends
    when all have stopped, or behind the layer ``depth - 1``. Returns whether it went through all layers.
    """
    workspaces = [_blocks_of(part) for part in parts]
    rows = [part.rows.cpu() for part in parts]
    slots = torch.cat([workspace.slots(mine) for workspace, mine in zip(workspaces, rows, strict=True)])
    runs = [virtual_sequences(mine) for mine in rows]
    lengths, ends = (torch.cat([run[side] for run in runs]) for side in (0, 1))
    width = max(len(workspace.blocks) for workspace in workspaces)
    table = torch.zeros(len(lengths), width, dtype=torch.int32)
    at = 0
    for workspace, (mine, _) in zip(workspaces, runs, strict=True):
        table[at : at + len(mine), : len(workspace.blocks)] = workspace.blocks
        at += len(mine)
    ids = torch.cat([part.x.cpu() for part in parts])
    positions = torch.cat(
        [mine if part.positions is None else part.positions.cpu() for part, mine in zip(parts, rows, strict=True)]
    )
    hooks = _Hooks(model, parts, workspaces, depth)
    whole = False
    try:
        with model.hooked(hooks.layers, hooks):
            model.forward(ids, positions, lengths, ends, table, slots)
        whole = True
    except StopForward:
        pass
    finally:
        for part in parts:
            if isinstance(part.workspace, Scratch):
                part.workspace.over.flush(range(part.workspace.layers))
    for workspace, mine in zip(workspaces, rows, strict=True):
        workspace.length = max(workspace.length, int(mine[-1]) + 1)
    return whole


def virtual_sequences(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The runs of neighbouring rows among ``rows [S]`` (strictly increasing): their lengths and ends, ``[k]`` int64."""
    breaks = torch.nonzero(rows[1:] != rows[:-1] + 1)[:, 0] + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.long), breaks])
    stops = torch.cat([breaks, torch.tensor([len(rows)])])
    return stops - starts, rows[stops - 1] + 1


def _blocks_of(part: Part) -> PagedWorkspace:
    workspace = part.workspace
    if isinstance(workspace, Scratch):
        return workspace.over
    assert isinstance(workspace, PagedWorkspace)
    return workspace


class _Hooks:
    """The hooks of all parts of a pass, each with its own rows."""

    def __init__(
        self, model: seams.Model, parts: Sequence[Part], workspaces: Sequence[PagedWorkspace], depth: int | None
    ) -> None:
        self._scalings = model.scalings
        self._parts, self._workspaces = parts, workspaces
        self._cuts = torch.tensor([0, *(len(part.rows) for part in parts)]).cumsum(0).tolist()
        self._going = set(range(len(parts)))
        self._device = model.device
        last = len(model.layers) - 1
        self._end = None if depth is None or depth > last else depth - 1
        every = range(last + 1)
        wanted = {n for n in every for part in parts for hook in part.hooks if hook.layers is None or n in hook.layers}
        self.layers = sorted(wanted | ({self._end + 1} if self._end is not None else set()))

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self._end is not None and layer > self._end:
            raise StopForward
        for number in sorted(self._going):
            part, rows = self._parts[number], slice(self._cuts[number], self._cuts[number + 1])
            at = LayerInput(
                layer,
                part.rows.to(self._device),
                query[rows],
                key[rows],
                value[rows],
                self._scalings[layer],
                self._workspaces[number],
            )
            try:
                for hook in part.hooks:
                    if hook.layers is None or layer in hook.layers:
                        hook(at)
            except StopForward:
                self._going.discard(number)
        if not self._going:  # a part without hooks never stops
            raise StopForward
