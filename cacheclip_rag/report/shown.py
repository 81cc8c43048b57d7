"""`Report`: the record of a request with its displays for notebooks, figures and terminals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..deprecation import renamed_parameters
from .record import Record

if TYPE_CHECKING:  # displays are imported on use
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult


@renamed_parameters(fates="token_sources")
@dataclass
class Report(Record):
    """The report of one request. Each token is counted once: ``prompt_tokens = prefix + reused + recomputed + fresh``.

    ``prefix``: prompt prefix whose KV came from an earlier request (prefix caching); ``reused``: stored chunk KV that
    was not recomputed; ``recomputed``: chunk tokens whose stored KV was recomputed; ``fresh``: all other tokens
    (question, template, unknown text, tokens at chunk edges that the tokenizer splits differently).
    ``ratio`` is recomputed / (reused + recomputed), as realised; ``requested_ratio`` as requested.
    ``seconds`` breaks the time to first token down by stage.
    """

    def plot(self) -> Figure:
        """A matplotlib figure of what a notebook shows. Raises `ConfigurationError` without matplotlib."""
        from .plot import figure

        return figure(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: every token coloured by its source, time by stage, and reasons for cache misses."""
        from .html import html

        return html(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What ``rich.print`` shows at a terminal."""
        from .terminal import renderables

        yield from renderables(self)
