"""Writes the tables of docs/scaling.md: what a chunk's KV weighs, and how fast it must come to beat computing it.

    python tools/scripts/kv_cost.py          write the tables
    python tools/scripts/kv_cost.py --check  fail if the page differs

Arithmetic from models' shapes, for dense decoders with grouped-query attention. Nothing here is measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
BEGIN, END = "<!-- kv cost: written by tools/scripts/kv_cost.py -->", "<!-- /kv cost -->"
CHUNK = 512
"""Tokens of the chunk in the tables."""
COMPUTE = 100e12
"""FLOP/s that the tables reckon with. What a machine sustains is some share of its data sheet: all scales with it."""


@dataclass(frozen=True)
class Shape:
    """A dense decoder's shape, as its ``config.json`` says it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def weights(self) -> int:
        """Weights that multiply each token of a prefill: those of the layers, without biases, norms and embeddings."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def kv_bytes(self, itemsize: int = 2) -> int:
        """Bytes of a token's KV: keys and values of all layers. ``itemsize``: 2 for bfloat16, 1 for int8."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    def flops(self, prompt: int) -> int:
        """FLOPs of computing a token of a prompt of so many tokens, on average: two for each weight, and four for each
        query head's element and token attended to, of which there are half as many as the prompt has.
        """
        return 2 * self.weights + 4 * self.layers * self.heads * self.head_dim * prompt // 2

    def break_even(self, prompt: int, ratio: float = 0.2, compute: float = COMPUTE, itemsize: int = 2) -> float:
        """Bytes a second above which loading KV and recomputing ``ratio`` of the tokens beats computing all of them at
        ``compute`` FLOP/s.
        """
        return self.kv_bytes(itemsize) * compute / (self.flops(prompt) * (1 - ratio))


MODELS = {
    "Qwen2.5-7B": Shape(28, 3584, 28, 4, 128, 18944),
    "Llama-3.1-8B": Shape(32, 4096, 32, 8, 128, 14336),
    "Qwen2.5-32B": Shape(64, 5120, 40, 8, 128, 27648),
    "Llama-3.1-70B": Shape(80, 8192, 64, 8, 128, 28672),
}

LINKS = {"10 Gbit/s network": 1.25e9, "NVMe, 5 GB/s": 5e9, "100 Gbit/s network": 12.5e9, "host memory, 50 GB/s": 50e9}
"""Bytes a second, nominal."""


def tables() -> str:
    """What a token and a chunk weigh and cost; then the time to load a chunk beside the time to compute it."""
    lines = [
        f"| model | L, Hk, D | KV of a token | chunk of {CHUNK} | a million tokens | GFLOP a token at 4k, 16k |"
        " break-even at 4k, 16k |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape in MODELS.items():
        size = shape.kv_bytes()
        lines.append(
            f"| {name} | {shape.layers}, {shape.kv_heads}, {shape.head_dim} | {size / 1024:g} KiB "
            f"| {size * CHUNK / 2**20:g} MiB | {size * 1e6 / 2**30:,.0f} GiB "
            f"| {shape.flops(4096) / 1e9:.1f}, {shape.flops(16384) / 1e9:.1f} "
            f"| {shape.break_even(4096) / 1e9:.2f}, {shape.break_even(16384) / 1e9:.2f} GB/s |"
        )
    lines += [
        "",
        f"| a chunk of {CHUNK} | " + " | ".join(LINKS) + " | computed, at 4k |",
        "|---" * (len(LINKS) + 2) + "|",
    ]
    for name, shape in MODELS.items():
        times = [shape.kv_bytes() * CHUNK / speed for speed in LINKS.values()]
        cells = " | ".join(f"{1000 * time:.1f} ms" for time in [*times, shape.flops(4096) * CHUNK / COMPUTE])
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main(check: bool) -> int:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    now = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"
    if check and now != page:
        print("docs/scaling.md is out of date: python tools/scripts/kv_cost.py")
        return 1
    PAGE.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
