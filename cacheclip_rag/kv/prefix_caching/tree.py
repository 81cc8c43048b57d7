"""RAGCache's knowledge tree: prefix caching document by document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ...deprecation import dropped_parameters
from ...store import NEVER, MemoryBudget
from .base import KIND, PrefixCache

if TYPE_CHECKING:
    from ...model.canvas import Canvas


@dropped_parameters(capacity_bytes="prefix caches share the engine's memory_bytes")
@dataclass(frozen=True)
class DocumentTree:
    """A tree whose nodes are documents: each holds its KV computed behind the documents on the path to it. Below the
    root is the prompt's preamble.

    Leaves are evicted by PGDSF: ``priority = clock + frequency * seconds per token`` of the node's prefill; the clock
    is the priority of the last evicted node, which ages frequencies. When the memory budget is full, the tree has to
    evict one if its leaf used longest ago is older than all else in memory. Not implemented: two tiers, speculative
    prefill. Source: RAGCache (arXiv 2404.12457), knowledge tree and prefix-aware Greedy-Dual-Size-Frequency.
    """

    strategy: ClassVar[str] = "prefix"

    def open(self, memory: MemoryBudget) -> PrefixCache:
        return _Tree(memory)


@dataclass(eq=False)
class _Node:
    ids: bytes
    parent: _Node | None
    kv: tuple[Tensor, Tensor] | None = None
    frequency: int = 0
    cost: float = 0.0  # seconds per token
    priority: float = 0.0
    used: int = 0  # a tick of the memory budget
    children: dict[bytes, _Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return 0 if self.kv is None else sum(t.nbytes for t in self.kv)


class _Tree:
    kind, held_bytes = KIND, 0

    def __init__(self, memory: MemoryBudget) -> None:
        self._memory = memory
        self._root = _Node(b"", None)
        self._clock = 0.0
        self.nbytes = self.written = 0
        memory.add(self)

    def longest(self, ids: Tensor, borders: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        with self._memory.lock:
            node, pieces = self._root, []
            for _, _, name in _segments(ids, borders):
                if (child := node.children.get(name)) is None:
                    break
                node = child
                self._touch(node)
                assert node.kv is not None
                pieces.append(node.kv)
            return pieces

    def keep(self, ids: Tensor, borders: Sequence[int], canvas: Canvas, seconds_per_token: float) -> None:
        with self._memory.lock:
            node, room = self._root, self._memory.room
            for start, stop, name in _segments(ids, borders):
                child = node.children.get(name)
                if child is None:
                    child = _Node(name, node, canvas.read(slice(start, stop)), cost=seconds_per_token)
                    if child.nbytes > room:  # nor would a node behind it have any
                        break
                    node.children[name] = child
                    self.nbytes += child.nbytes
                    self.written += child.nbytes
                    self._touch(child)
                room -= child.nbytes
                node = child
            self._memory.shrink()

    def clear(self) -> None:
        with self._memory.lock:
            self._root, self.nbytes = _Node(b"", None), 0

    @property
    def oldest(self) -> int:
        return min((leaf.used for leaf in self._leaves()), default=NEVER)

    def evict(self) -> bool:
        leaf = min(self._leaves(), key=lambda n: n.priority, default=None)
        if leaf is None:
            return False
        assert leaf.parent is not None
        self._clock = max(self._clock, leaf.priority)
        del leaf.parent.children[leaf.ids]
        self.nbytes -= leaf.nbytes
        return True

    def _touch(self, node: _Node) -> None:
        node.frequency += 1
        node.priority = self._clock + node.frequency * node.cost
        node.used = next(self._memory.ticks)

    def _leaves(self) -> Iterator[_Node]:
        return (node for node in self._nodes() if not node.children)

    def _nodes(self) -> Iterator[_Node]:
        waiting = list(self._root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()


def _segments(ids: Tensor, borders: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
    """The preamble, then each document with the text up to the next one, as ``(start, stop, token bytes)``."""
    for start, stop in pairwise([0, *borders]):
        if stop > start:
            yield start, stop, ids[start:stop].numpy().tobytes()
