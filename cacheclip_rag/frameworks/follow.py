"""Keeps chunk KV in step with a vector store: encodes what is added, forgets what no entry has any more."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from .chunk_kv import Handle, OnMiss, prepare_retrieved
from .forgetting import Forgetting
from .fuser import Fuser
from .held_ids import HeldIds, StoredChunk

log = logging.getLogger("cacheclip_rag")

_RETRIEVED = 256
"""Chunks that were retrieved before the model was open, at most."""


class StoreFollower:
    """Keeps the KV of a vector store's chunks: told what the store added and deleted, it encodes and forgets.

    `added` and `deleted` never raise: the store has changed by then, and a chunk without KV only costs time. KV belongs
    to a text, so it stays as long as any id has that text. It is dropped ``grace`` seconds after its last id went, or
    with `flush`.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        grace: float = 0.0,
        fuser: Fuser | None = None,
        held: HeldIds | None = None,
    ) -> None:
        self.held = HeldIds() if held is None else held
        self._handle, self._grace, self._fuser = handle, grace, fuser
        self._forgetting = Forgetting(handle, self.held, grace)
        self._retrieved: deque[str] = deque(maxlen=_RETRIEVED)
        weakref.finalize(self, self._forgetting.at_the_end)

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows what this one knows; what is still to be forgotten is left to this one."""
        return {"handle": self._handle, "grace": self._grace, "fuser": self._fuser, "held": self.held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        StoreFollower.__init__(self, state.pop("handle"), **state)

    def added(self, chunks: Sequence[StoredChunk], show_progress: bool = True) -> None:
        """The store has these chunks now, perhaps under ids that held others."""
        replaced = self.held.get(chunk.id for chunk in chunks)
        self.held.hold(chunks)
        back = self._forgetting.back({chunk.document for chunk in chunks})
        parts = [(chunk.document, chunk.text) for chunk in chunks]
        try:
            self._handle.kv.encode(parts, fuser=self._fuser, show_progress=show_progress, replaced=back)
        except Exception:
            log.exception("chunks not encoded; prompts that contain them are prefilled as usual")
        self._forgetting.later((chunk.document, chunk.text) for chunk in replaced)
        self.flush()  # before fusing: what was fused with a text that goes would go with it
        if self._fuser is not None:
            try:
                self._handle.kv.fuse(self._fuser, show_progress)
            except Exception:
                log.exception("chunks not fused; they are used as they are")

    def deleted(self, chunks: Collection[StoredChunk], documents: Iterable[str] = ()) -> None:
        """The store has these chunks no longer, and nothing of ``documents``."""
        self.held.release(chunk.id for chunk in chunks)
        self._forgetting.later(((chunk.document, chunk.text) for chunk in chunks), documents)

    def flush(self) -> None:
        """Drop the KV of deleted chunks now."""
        self._forgetting.now()

    def there(self, chunks: Sequence[StoredChunk], show_progress: bool = True) -> int:
        """Encode what the store had before it was wrapped; a chunk whose id is not known has the id "". How many were
        encoded now. Raises what the engine does, and can be begun again: it goes on where it was.
        """
        self.held.hold(chunk for chunk in chunks if chunk.id)
        kv = self._handle.kv
        encoded = kv.encode([(c.document, c.text) for c in chunks], fuser=self._fuser, show_progress=show_progress)
        if self._fuser is not None:
            kv.fuse(self._fuser, show_progress)
        return encoded

    def retrieved(self, texts: Iterable[str], question: str | None, on_miss: OnMiss) -> None:
        """See to chunks that were retrieved and have no KV. A model that is not open yet is not opened for a mere
        search: they are seen to at the next one.
        """
        if on_miss == "ignore":
            return
        if self._handle.peek_kv() is None:
            self._retrieved.extend(texts)
            return
        earlier = [self._retrieved.popleft() for _ in range(len(self._retrieved))]
        if earlier:
            prepare_retrieved(self._handle, earlier, None, on_miss)
        prepare_retrieved(self._handle, texts, question, on_miss)
