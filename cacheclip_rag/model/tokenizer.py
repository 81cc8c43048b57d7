"""Tokenises text and renders chat messages with a model's tokenizer and chat template."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import PromptError
from ..prompt import RenderedPrompt, Tokens, any_of
from ..prompt.rendered import Stretch, contents, without
from .chat import chat, pinned

_SENTINEL = "\u2063cacheclip\u2063"  # stands for the user's text when a chat template is cut open


class PromptTokenizer:
    """Tokenises texts and prompts and renders chat messages, with a fast tokenizer of transformers. Thread-safe."""

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

    def tokenise_prompt(self, prompt: str, documents: Sequence[Stretch] = (), tokens: Tokens | None = None) -> Tokens:
        """A whole prompt's tokens: those transformers would see, begin-of-sequence included where the model wants one.

        ``documents`` are character spans of untrusted text, to which the contents of a `RenderedPrompt` are added. A
        control token written inside one stays text. Of overlapping documents the one named first is tokenised as a
        whole. ``tokens``: what `tokenise` made of the prompt, where that is known already.
        """
        documents = _disjoint([*documents, *(contents(prompt) or ())])
        tokens = self._tokenise_around(prompt, documents, tokens)
        if self._first is not None and not (len(tokens) and tokens.ids[0] == self._first):
            opening = Tokens(torch.tensor([self._first]), torch.zeros(1, 2, dtype=torch.long))
            tokens = Tokens(torch.cat([opening.ids, tokens.ids]), torch.cat([opening.offsets, tokens.offsets]))
        return tokens

    def _tokenise_around(self, prompt: str, documents: Sequence[Stretch], tokens: Tokens | None) -> Tokens:
        """The tokens of the prompt as if other characters stood in place of the control tokens that documents quote;
        the documents that do are then tokenised by themselves. So what a document quotes changes nothing outside it,
        with tokenizers, too, that treat the beginning of a text or what stands beside a control token in their own way.
        """
        quoting = set[int]()
        starts = [start for start, _ in documents]

        def hidden(text: str, written: Iterable[Stretch]) -> str:
            characters: list[str] = []
            for a, b in written:
                for number in range(max(0, bisect_right(starts, a) - 1), bisect_left(starts, b)):
                    left, right = max(a, starts[number]), min(b, documents[number][1])
                    if text[left:right].strip(self._harmless):
                        characters = characters or list(text)
                        characters[left:right] = self._harmless * (right - left)
                        quoting.add(number)
            return "".join(characters) if characters else text

        harmless = hidden(prompt, (match.span() for match in self._written.finditer(prompt))) if documents else prompt
        around = tokens if tokens is not None and not quoting else self.tokenise(harmless)
        # As the tokenizer finds them, too: its normaliser makes some of other characters.
        while documents and (hiding := hidden(harmless, self._control(harmless, around))) != harmless:
            harmless = hiding
            around = self.tokenise(harmless)
        if not quoting:
            return around
        begins, ends = (around.offsets[:, side].contiguous() for side in (0, 1))
        ids, offsets, row, place = [], [], 0, 0
        for number in sorted(quoting):
            start, end = documents[number]
            # A token across the document's border belongs to neither side, and its text to both pieces' tokens.
            first = int(torch.searchsorted(ends, start, right=True))
            last = int(torch.searchsorted(begins, end))
            if end <= place or first >= last:
                continue
            start = max(place, min(start, int(begins[first])))
            place = max(end, int(ends[last - 1]))
            piece = self.tokenise(prompt[start:place], plain=True)
            ids += [around.ids[row:first], piece.ids]
            offsets += [around.offsets[row:first], piece.offsets + start]
            row = max(row, last)
        return Tokens(torch.cat([*ids, around.ids[row:]]), torch.cat([*offsets, around.offsets[row:]]))

    @property
    def definition(self) -> str:
        """The tokenizer in JSON."""
        return self._encoder.to_str()

    def _written_in(self, text: str) -> list[Stretch]:
        return self._control(text, self.tokenise(text))

    def _control(self, prompt: str, tokens: Tokens) -> list[Stretch]:
        """Where the control tokens among a prompt's ``tokens`` are written, without the blanks that some swallow."""
        rows = torch.isin(tokens.ids, self._control_ids).nonzero()[:, 0]
        written = []
        for token, (start, end) in zip(tokens.ids[rows].tolist(), tokens.offsets[rows].tolist(), strict=True):
            text = prompt[start:end]
            if token in self._unknown and not self.quotes(text):
                continue  # a character that the model does not know, not the token written out
            core = text.strip() or text
            left = text.index(core)
            written.append((start + left, start + left + len(core)))
        return written

    def quotes(self, text: str) -> bool:
        """Whether control tokens are written in ``text``, as they are or so that the tokenizer's normaliser makes them.

        Cheap, and no less than true: what it takes for one may be text that the tokenizer cuts otherwise.
        """
        if self._written.search(text):
            return True
        normaliser = self._encoder.normalizer
        if self._normalised is None or normaliser is None:
            return False
        return self._normalised.search(normaliser.normalize_str(text)) is not None

    @cached_property
    def _written(self) -> re.Pattern[str]:
        return any_of([token.strip() or token for token in self.control_tokens])

    @cached_property
    def _normalised(self) -> re.Pattern[str] | None:
        """Control tokens that are looked for in normalised text, in their normalised form."""
        normaliser, added = self._encoder.normalizer, self.tokenizer.added_tokens_decoder.values()
        found = [t.content for t in added if t.special and t.content and t.normalized]
        if normaliser is None or not found:
            return None
        return any_of([form for token in found if (form := normaliser.normalize_str(token).strip())])

    @cached_property
    def _control_ids(self) -> Tensor:
        return torch.tensor([i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special and t.content])

    @cached_property
    def _unknown(self) -> set[int | None]:
        """The tokens that stand for what the model does not know."""
        name = getattr(self._encoder.model, "unk_token", None)
        return {self.tokenizer.unk_token_id, None if name is None else self._encoder.token_to_id(name)}

    @cached_property
    def _harmless(self) -> str:
        """A character that is part of no control token, so that none can come about where one was replaced."""
        used = {character for token in self.control_tokens for character in token.lower()}
        return next((c for c in "xyzqvwk" if c not in used), "x")

    @cached_property
    def control_tokens(self) -> list[str]:
        """The texts that the tokenizer reads as control tokens."""
        return [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special and t.content]

    def _begin_of_sequence(self) -> int | None:
        ids = self._encoder.encode("", add_special_tokens=True).ids
        return ids[0] if ids and ids[0] == self.tokenizer.bos_token_id else None

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> RenderedPrompt:
        """The prompt for chat ``messages``, ready for the assistant's turn; plain texts where there is no template.

        What the messages hold is text, control tokens included; only what the template adds is more than that.
        """
        if self.tokenizer.chat_template:
            return chat(self._render, self.quotes, self._written_in, messages, options)
        texts = [str(message["content"]) for message in messages]
        ends = list(accumulate(len(text) + 2 for text in texts))
        return RenderedPrompt(
            "\n\n".join(texts) + "\n\n",
            [(end - 2 - len(text), end - 2) for text, end in zip(texts, ends, strict=True)],
        )

    def _render(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))

    @property
    def opening(self) -> str:
        """What stands before the user's text in this model's chat template now; nothing where there is none."""
        frame = self._frame() if self.tokenizer.chat_template else None
        return "" if frame is None else frame[0]

    @property
    def closing(self) -> str:
        """What stands behind the user's text in this model's chat template, up to where the answer begins."""
        frame = self._frame() if self.tokenizer.chat_template else None
        return "" if frame is None else frame[1]

    def shared_prefix(self) -> str:
        """What stands before a user's text in this model's chat template: the prefix chunks are encoded behind.

        One prefix shared by all chunks absorbs the attention sink once (CacheClip, APE); without a template it is the
        beginning-of-sequence token, or a newline. It is the same on all days: a template that writes the date writes a
        fixed one here, and where it writes something else that changes, the prefix is that of no template.
        """
        if self.tokenizer.chat_template:
            template = pinned(self.tokenizer.get_chat_template())
            frame = self._frame(chat_template=template)
            if frame is not None and frame == self._frame(chat_template=template):
                return frame[0]
        return self.tokenizer.bos_token or "\n"

    def _frame(self, **options: Any) -> tuple[str, str] | None:
        """What the chat template writes before and behind a user's text; None where it does not repeat the text once.

        Rendered anew each time, for it may tell the date.
        """
        pieces = self._render([{"role": "user", "content": _SENTINEL}], options).split(_SENTINEL)
        return (pieces[0], pieces[1]) if len(pieces) == 2 else None


def _disjoint(documents: Sequence[Stretch]) -> list[Stretch]:
    """The documents in order, each without what an earlier named one has."""
    result: list[Stretch] = []
    for start, end in documents:
        at = bisect_left(result, (start, start))
        at -= at > 0 and result[at - 1][1] > start
        stop = at
        while stop < len(result) and result[stop][0] < end:
            stop += 1
        taken = result[at:stop]
        result[at:stop] = sorted([*taken, *without([(start, end)] if start < end else [], taken)])
    return result


def _untruncated(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's inside that neither truncates nor pads. In the original both are anyone's to switch on,
    by a file or by a call with ``truncation=True``, and a prompt would lose its end without a word.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    return encoder
