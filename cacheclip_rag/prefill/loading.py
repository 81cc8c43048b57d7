"""Loads a prompt's chunks in threads, while its text is still tokenised and while others use the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch

from ..chunks import ChunkKV, canonical
from ..kv.collections import Collections
from ..kv.library import Library
from ..methods import Method
from ..prompt import Span, Tokens

_THREADS = 4


@dataclass(frozen=True, eq=False)
class Loads:
    """The chunks of one prompt, on their way from the store. ``look_up``: finds each again; ``begun``: what looks it up
    already, or None where it is at hand.
    """

    library: Library
    texts: Sequence[str]
    look_up: Sequence[Callable[[], ChunkKV | None]]
    begun: Sequence[Future[ChunkKV | None] | None]

    def wait(self) -> None:
        """Wait for what was begun."""
        wait([future for future in self.begun if future is not None])

    def chunk(self, number: int) -> ChunkKV | None:
        """The chunk, which is waited for. What was stored or forgotten since it was begun counts. Raises
        `NotWorthLoading`.
        """
        if (future := self.begun[number]) is None:
            return self.look_up[number]()
        chunk, library = future.result(), self.library
        key = library.key(*((chunk.text, chunk.context, chunk.in_sequence) if chunk else (self.texts[number],)))
        return chunk if (chunk is not None) == (key in library.store) else self.look_up[number]()


class Loader:
    """Loads chunks in threads. Files are read and verified as a whole, since their checksum covers all layers.
    Thread-safe.
    """

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self.after_fork()

    def begin(self, texts: Sequence[str], method: Method, tokens: Sequence[int]) -> Loads:
        """Begin to load the chunks with these (canonical) texts, in the prompt's order, as ``method`` wants them, and
        those of the auxiliary model, if it needs that.

        ``tokens``: how many tokens the prompt takes from each, so that what is quicker computed is not loaded.
        """
        collection, fit = self._collections.of(method.encode), method.fit
        variants, library, auxiliary = collection.variants, collection.library, self._collections.auxiliary
        look_up = [
            partial(variants.fitting, text, texts[:number], fit, tokens[number]) for number, text in enumerate(texts)
        ]
        begun: list[Future[ChunkKV | None] | None] = []
        for number, text in enumerate(texts):
            context = () if fit is None else fit.choose(variants.of(text), texts[:number])
            at_hand = not text or library.at_hand(variants.key(text, context) or "")
            begun.append(None if at_hand else self._threads.submit(look_up[number]))
        if method.select.needs_auxiliary and auxiliary is not None:
            for key in map(auxiliary.key, filter(None, texts)):
                if not auxiliary.at_hand(key):
                    self._threads.submit(auxiliary.get, key)
        return Loads(library, texts, look_up, begun)

    def begin_for(self, spans: Sequence[Span], tokens: Tokens, method: Method) -> Loads:
        """Begin to load the chunks of a prompt: the known ``spans`` among its ``tokens``."""
        index = self._collections.index
        texts = [canonical(index.text(span.key) or "") for span in spans]
        firsts = tokens.offsets[:, 0].contiguous()
        borders = torch.tensor([(span.start, span.end) for span in spans], dtype=torch.long).reshape(-1, 2)
        counts = torch.searchsorted(firsts, borders).diff(dim=1)[:, 0].tolist()
        taken = Counter[str]()
        for text, count in zip(texts, counts, strict=True):
            taken[text] += count
        return self.begin(texts, method, [taken[text] for text in texts])

    def announce(self, texts: Sequence[str], method: Method) -> None:
        """Begin to load chunks for a prompt that is expected, in its order."""

        def begin() -> None:
            known = [canonical(text) for text in texts]
            tokens = [len(self._collections.backbone.tokenise(text, plain=True)) for text in known]
            self.begin(known, method, tokens)

        self._threads.submit(begin)

    def after_fork(self) -> None:
        """In a forked process, the parent's threads are gone."""
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="cacheclip-load")
