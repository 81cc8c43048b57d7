"""From a prompt's text to its chunks, its question, and the tokens that can take stored KV."""

from ..deprecation import renamed_names
from .documents import any_of, documents
from .escaped import escaped
from .index import ANCHOR_LENGTH, COMPARED_EACH, MAX_CANDIDATES, MAX_COMPARED, MAX_TRIES, ChunkIndex, Span
from .layout import Layout, align, outright
from .question import Question, find_question, unquoted
from .recognise import Recognised, recognise
from .rendered import RenderedPrompt, Stretch, rearranged
from .soft import NO_SOFT_TOKENS, SoftTokens
from .tokens import Tokens

__all__ = [
    "ANCHOR_LENGTH",
    "COMPARED_EACH",
    "MAX_CANDIDATES",
    "MAX_COMPARED",
    "MAX_TRIES",
    "NO_SOFT_TOKENS",
    "ChunkIndex",
    "Layout",
    "Question",
    "Recognised",
    "RenderedPrompt",
    "SoftTokens",
    "Span",
    "Stretch",
    "Tokens",
    "align",
    "any_of",
    "documents",
    "escaped",
    "find_question",
    "outright",
    "rearranged",
    "recognise",
    "unquoted",
]

__getattr__ = renamed_names(__name__, {"WINDOW": (f"{__name__}.index", "ANCHOR_LENGTH")})
