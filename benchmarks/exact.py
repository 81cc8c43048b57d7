"""Checks that ratio 1 equals full prefill: the engine's greedy answers against transformers' own, on real prompts.

    python benchmarks/exact.py --model qwen2.5-coder-0.5b-instruct --prompts 20

In float32 every token must be equal; in bfloat16 near ties may be decided differently and are counted and shown.
"""

from __future__ import annotations

import argparse
import random

import torch
from speed import chunks_of, prompt_of

from cacheclip_rag import Engine


@torch.inference_mode()
def reference(engine: Engine, prompt: str, count: int) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy token ids and the logits of each, with its own attention and cache."""
    model = engine.backbone.model
    model.set_attn_implementation("sdpa")
    try:
        ids = engine.backbone.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        output = model.generate(
            ids, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return output.sequences[0, ids.shape[1] :].tolist(), torch.cat(output.logits)
    finally:
        model.set_attn_implementation(engine.backbone.attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=800, help="context tokens a prompt")
    parser.add_argument("--new", type=int, default=16, help="answer tokens (at most)")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    args = parser.parse_args()
    for dtype in args.dtypes:
        engine = Engine(args.model, method="query_guided", dtype=dtype)
        generator, equal, ties = random.Random(0), 0, []
        for number in range(args.prompts):
            chunks = chunks_of(engine, args.tokens, generator)
            engine.ensure(chunks)
            prompt = prompt_of(engine, chunks, "What is proposed, and who wrote it?")
            expected, logits = reference(engine, prompt, args.new)
            got = list(engine.generate(prompt, recompute_ratio=1.0, max_new_tokens=args.new).ids)
            if got == expected:
                equal += 1
                continue
            at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b)
            gap = float(logits[at].float()[expected[at]] - logits[at].float()[got[at]])
            ties.append(f"prompt {number}, token {at}: logits {gap:.3f} apart")
        print(f"{args.model}, {dtype}: {equal} of {args.prompts} answers equal token for token")
        for tie in ties:
            print(f"  {tie}")


if __name__ == "__main__":
    main()
