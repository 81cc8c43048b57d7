"""What a model's tokenizer and chat template make of text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import PromptError
from ..prompt import Tokens, any_of

_SENTINEL = "\u2063cacheclip\u2063"  # stands for the user's text when a chat template is cut open


class Texts:
    """Texts to tokens, and messages to prompts, with a fast tokenizer of transformers. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._encoder, self._plain = _untruncated(tokenizer), _untruncated(tokenizer)
        self._plain.encode_special_tokens = True  # "<|im_end|>" inside a document is eleven characters, not a command
        self._first = self._begin_of_sequence()

    def tokenise(self, text: str, plain: bool = False) -> Tokens:
        """Token ids without added special tokens. ``plain``: control tokens in the text stay ordinary characters."""
        encoder = self._plain if plain else self._encoder
        try:
            encoding = encoder.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(f"the text is not valid Unicode and cannot be tokenised: {error}") from error
        offsets = torch.from_numpy(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2))
        return Tokens(torch.tensor(encoding.ids, dtype=torch.long), offsets)

    def tokenise_prompt(self, prompt: str, documents: Sequence[tuple[int, int]] = ()) -> Tokens:
        """A whole prompt's tokens: those transformers would see, begin-of-sequence included where the model wants one.

        ``documents`` are character spans of untrusted text. A control token written inside one stays text.
        """
        if any(token in prompt[start:end] for start, end in documents for token in self.control_tokens):
            tokens = self._tokenise_around(prompt, documents)
        else:
            tokens = self.tokenise(prompt)
        if self._first is not None and not (len(tokens) and tokens.ids[0] == self._first):
            opening = Tokens(torch.tensor([self._first]), torch.zeros(1, 2, dtype=torch.long))
            tokens = Tokens(torch.cat([opening.ids, tokens.ids]), torch.cat([opening.offsets, tokens.offsets]))
        return tokens

    def _tokenise_around(self, prompt: str, documents: Sequence[tuple[int, int]]) -> Tokens:
        """The tokens of the prompt as if other characters stood in place of the control tokens that documents quote;
        the documents that do are then tokenised by themselves. So what a document quotes changes nothing outside it,
        with tokenizers, too, that treat the beginning of a text or what stands beside a control token in their own way.
        """
        written = [match.span() for match in any_of(self.control_tokens).finditer(prompt)]
        harmless = list(prompt)
        quoting = []
        for start, end in sorted(documents):
            quotes = [(max(a, start), min(b, end)) for a, b in written if a < end and b > start]
            for a, b in quotes:
                harmless[a:b] = "x" * (b - a)
            quoting += [(start, end)] if quotes else []
        around = self.tokenise("".join(harmless))
        ids, offsets, row, place = [], [], 0, 0
        for start, end in quoting:
            inside = ((around.offsets[:, 1] > start) & (around.offsets[:, 0] < end)).nonzero()[:, 0]
            if end <= place or not len(inside):
                continue
            # A token across the document's border belongs to neither side, and its text to both pieces' tokens.
            first, last = int(inside[0]), int(inside[-1]) + 1
            start = max(place, min(start, int(around.offsets[first, 0])))
            place = max(end, int(around.offsets[last - 1, 1]))
            piece = self.tokenise(prompt[start:place], plain=True)
            ids += [around.ids[row:first], piece.ids]
            offsets += [around.offsets[row:first], piece.offsets + start]
            row = last
        return Tokens(torch.cat([*ids, around.ids[row:]]), torch.cat([*offsets, around.offsets[row:]]))

    @property
    def definition(self) -> str:
        """The tokenizer in JSON."""
        return self._encoder.to_str()

    @cached_property
    def control_tokens(self) -> list[str]:
        """The texts that the tokenizer reads as control tokens."""
        return [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special and t.content]

    def _begin_of_sequence(self) -> int | None:
        ids = self._encoder.encode("", add_special_tokens=True).ids
        return ids[0] if ids and ids[0] == self.tokenizer.bos_token_id else None

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The prompt for chat ``messages``, ready for the assistant's turn; plain texts where there is no template."""
        if not self.tokenizer.chat_template:
            return "\n\n".join(str(m["content"]) for m in messages) + "\n\n"
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))

    @cached_property
    def opening(self) -> str:
        """What stands before the user's text in this model's chat template; nothing where there is none."""
        return self.shared_prefix() if self.tokenizer.chat_template else ""

    def shared_prefix(self) -> str:
        """What stands before a user's text in this model's chat template: the prefix chunks are encoded behind.

        One prefix shared by all chunks absorbs the attention sink once (CacheClip, APE); without a template it is the
        beginning-of-sequence token, or a newline.
        """
        if self.tokenizer.chat_template:
            prompt = self.chat([{"role": "user", "content": _SENTINEL}])
            if prompt.count(_SENTINEL) == 1:
                return prompt.split(_SENTINEL)[0]
        return self.tokenizer.bos_token or "\n"

    @cached_property
    def closing(self) -> str:
        """What stands behind the user's text in this model's chat template, up to where the answer begins."""
        if not self.tokenizer.chat_template:
            return ""
        return self.chat([{"role": "user", "content": _SENTINEL}]).split(_SENTINEL)[-1]


def _untruncated(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's inside that neither truncates nor pads. In the original both are anyone's to switch on,
    by a file or by a call with ``truncation=True``, and a prompt would lose its end without a word.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    return encoder
