"""Detects documents that a prompt holds as Python's repr or as JSON, which differs from the stored text."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import islice

from .index import Span

_OBJECTS = re.compile(
    r"""\b(?:Document|TextNode|NodeWithScore|Node)\((?:id_?|metadata|page_content|node|text)="""
    r"""|\bpage_content=["']|["']page_content["']:\s?["']"""
)
"""How LangChain's and LlamaIndex' documents begin when they are made text as the objects they are."""

_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\\": r"\\", '"': r"\"", "'": r"\'"}

_LOOKED_AT = 1000
"""Stretches and objects that are looked at in one prompt."""

REASON = (
    "escaped documents: they are in this prompt as Python or JSON writes objects, with \\n for a line break, which is "
    "other text than was stored; put their texts in, in LangChain for example "
    '{"context": retriever | (lambda docs: "\\n\\n".join(doc.page_content for doc in docs)), ...}'
)


def escaped(prompt: str, spans: Sequence[Span], text: Callable[[str], str | None]) -> str | None:
    """Why little of this prompt is recognised, where that is because documents in it are escaped; None otherwise.

    ``spans``: what is recognised, in order; ``text`` gives a chunk's text by its key. Where a stretch ends because the
    prompt has a backslash and the chunk the character that is meant, or where a document's own object is written out
    and line breaks in it are not.
    """
    if "\\" not in prompt:
        return None
    for span in islice(spans, _LOOKED_AT):
        chunk = text(span.key) or ""
        before, behind = span.offset - 1, span.offset + len(span)
        if behind < len(chunk) and _escapes(prompt, span.end, chunk[behind]):
            return REASON
        if before >= 0 and any(
            _escapes(prompt, span.start - size, chunk[before]) and span.start >= size for size in (2, 4, 6)
        ):
            return REASON
    starts = [span.start for span in spans]
    for match in islice(_OBJECTS.finditer(prompt), _LOOKED_AT):
        at = bisect_right(starts, match.start()) - 1
        if at < 0 or spans[at].end <= match.start():  # of what a document says itself nothing follows
            return REASON if r"\n" in prompt[match.end() :] else None
    return None


def _escapes(prompt: str, at: int, character: str) -> bool:
    """Whether the prompt has an escape at this place that means the character."""
    if prompt.startswith(_ESCAPES.get(character, "\0"), at):
        return True
    code = ord(character)
    forms = (f"\\u{code:04x}", f"\\x{code:02x}", f"\\U{code:08x}")
    return code > 126 and prompt.startswith(forms, at)
