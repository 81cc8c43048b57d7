"""A report that shows itself: in a notebook, as a figure, at a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..deprecation import renamed_parameters
from .record import Record

if TYPE_CHECKING:  # how a report is shown is loaded when it is
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult


@renamed_parameters(fates="token_sources")
@dataclass
class Report(Record):
    """One request. Tokens are counted once each: ``prompt_tokens = prefix + reused + recomputed + fresh``.

    ``prefix``: KV of the prompt's beginning, kept from an earlier request; ``reused``: stored chunk KV that was not
    recomputed; ``recomputed``: chunk tokens that had stored KV and were refreshed; ``fresh``: everything else
    (question, template, unknown text, chunk edges that the tokenizer cut differently).
    ``ratio`` is recomputed / (reused + recomputed), as it came out; ``requested_ratio`` as it was asked for.
    ``seconds`` breaks the time to first token down by stage.
    """

    def plot(self) -> Figure:
        """A matplotlib figure of what a notebook shows. Raises `ConfigurationError` without matplotlib."""
        from .plot import figure

        return figure(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: every token coloured by its source, where the time went, why anything missed."""
        from .html import html

        return html(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What ``rich.print`` shows at a terminal."""
        from .terminal import renderables

        yield from renderables(self)
