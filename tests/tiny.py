"""Tiny models of every supported shape with a byte tokenizer, built here: no downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from cacheclip_rag import Engine
from cacheclip_rag.model.backbone import Backbone

SHAPE: dict[str, Any] = dict(
    vocab_size=260,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    # Wide weights make attention sharp: with the usual narrow ones every error drowns in near-uniform averages.
    initializer_range=0.25,
    bos_token_id=None,
    eos_token_id=257,
    pad_token_id=257,
)

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama3-rope": lambda: LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
    "yarn-rope": lambda: LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    ),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "mistral-sliding": lambda: MistralConfig(**SHAPE, sliding_window=48),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        sliding_window=48,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "You may call these functions:\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Offers tools and writes calls as Qwen2.5's and Hermes' templates do."""


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<|im_start|>"], eos_token="<|im_end|>"
    )
    assert len(fast) == 258
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model of shape ``kind`` with transformers' own attention."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="eager").to(dtype).eval()


def tiny_backbone(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Backbone:
    return Backbone(tiny_model(kind, dtype), byte_tokenizer(), **options)


def two_layers(template: str | None = TOOLS_TEMPLATE, window: int = 4096, seed: int = 0) -> Backbone:
    """A model of two layers whose chat template offers tools."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 2, "max_position_embeddings": window})
    return Backbone(LlamaForCausalLM(config).float(), tokenizer)


# Documents of our own: real prose, long enough to be chunks.
PASSAGES = [
    "The lighthouse at Cape Morrow was built in 1874 by the engineer Ada Lindqvist. Its lamp burned whale oil "
    "until the keeper, Tomas Reyes, installed a paraffin burner in 1891, which doubled the range to nineteen "
    "nautical miles.",
    "Ada Lindqvist was born in Visby and studied bridge building in Zurich. After the lighthouse she planned the "
    "harbour railway of Port Ellery, opened in 1880, whose turntable is still shown to visitors every first "
    "Sunday of the month.",
    "Port Ellery's harbour railway carried herring, timber and, in summer, bathers. It closed in 1957 when the "
    "road bridge over the Senn was finished; the last train was driven by Marguerite Okafor, who later wrote a "
    "memoir about it.",
    "Marguerite Okafor's memoir, Steam and Salt, appeared in 1969. It sold eleven thousand copies and won the "
    "Coastal Prize. A film of the same name was planned but never made, because the turntable could not be moved.",
    "The Coastal Prize is awarded every five years by the town council for a work about the sea. Among its "
    "winners are a poem about eels, an atlas of wrecks, and a cookery book that contains no fish at all.",
]
QUESTION = "Who drove the last train?"


def prompt_of(engine: Engine, passages: list[str], question: str = QUESTION, head: str = "Read.") -> str:
    content = f"{head}\n\n" + "\n\n".join(passages) + f"\n\n{question}"
    return engine.backbone.chat([{"role": "user", "content": content}])
