"""Where each token's KV came from, for the report."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prompt import Layout
from ..report import TokenSource, TokenSources


def sources_of(
    layout: Layout,
    prefix: int = 0,
    recomputed: Tensor | None = None,
    in_place: Tensor | None = None,
    adjusted: Tensor | None = None,
) -> TokenSources:
    """The source of each token's KV, for `Report.token_sources`.

    The first ``prefix`` tokens came from an earlier request. If chunks were reused: the rows ``recomputed [k]`` were
    recomputed, those marked in ``in_place [T]`` (bool) needed no repair, and the rows ``adjusted [m]`` were changed
    without recomputing them. Soft tokens are left out.
    """
    kinds = torch.where(layout.edge, int(TokenSource.EDGE), int(TokenSource.FRESH))
    if recomputed is not None and in_place is not None:
        kinds[layout.reusable] = int(TokenSource.REUSED)
        if adjusted is not None:
            kinds[adjusted] = int(TokenSource.ADJUSTED)
        kinds[in_place] = int(TokenSource.IN_PLACE)
        kinds[recomputed] = int(TokenSource.RECOMPUTED)
        if layout.reusable[-1]:
            kinds[-1] = int(TokenSource.FRESH)  # the last token is always computed
    kinds[:prefix] = int(TokenSource.PREFIX)
    text = ~layout.soft  # soft tokens have no characters to be shown
    borders = [border for span in layout.spans for border in (span.start, span.end)]
    return TokenSources.of(layout.prompt, layout.offsets[text, 0].numpy(), kinds[text].numpy(), borders)
