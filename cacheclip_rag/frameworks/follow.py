"""Keeps chunk KV in step with a vector store: encodes what is added, forgets what no entry has any more."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .chunk_kv import OnMiss, encode, prepare_retrieved
from .engines import EngineHandle
from .forgetting import Forgetting
from .fuser import Fuser
from .held_ids import HeldIds, StoredChunk

if TYPE_CHECKING:
    from ..engine import Engine

log = logging.getLogger("cacheclip_rag")

_RETRIEVED = 256
"""Chunks that were retrieved before the model was open, at most."""

Part = tuple[str | None, str]
"""A document's name, where it is known, and the text of one of its chunks."""


class StoreFollower:
    """Keeps the KV of a vector store's chunks: told what the store added and deleted, it encodes and forgets.

    `added` and `deleted` never raise: the store has changed by then, and a chunk without KV only costs time. KV belongs
    to a text, so it stays as long as any id has that text. It is dropped ``grace`` seconds after its last id went, or
    with `flush`.
    """

    def __init__(
        self,
        handle: EngineHandle,
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
        self._forgetting.back({chunk.document for chunk in chunks})
        try:
            _encode(self._handle.engine, [(c.document, c.text) for c in chunks], self._fuser, show_progress)
        except Exception:
            log.exception("chunks not encoded; prompts that contain them are prefilled as usual")
        self._forgetting.later((chunk.document, chunk.text) for chunk in replaced)
        self.flush()  # before fusing: what was fused with a text that goes would go with it
        if self._fuser is not None:
            try:
                self._fuser(self._handle.engine, show_progress)
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
        engine = self._handle.engine
        encoded = _encode(engine, [(c.document, c.text) for c in chunks], self._fuser, show_progress)
        if self._fuser is not None:
            self._fuser(engine, show_progress)
        return encoded

    def retrieved(self, texts: Iterable[str], question: str | None, on_miss: OnMiss) -> None:
        """See to chunks that were retrieved and have no KV. A model that is not open yet is not opened for a mere
        search: they are seen to at the next one.
        """
        if on_miss == "ignore":
            return
        if self._handle.peek() is None:
            self._retrieved.extend(texts)
            return
        earlier = [self._retrieved.popleft() for _ in range(len(self._retrieved))]
        if earlier:
            prepare_retrieved(self._handle, earlier, None, on_miss)
        prepare_retrieved(self._handle, texts, question, on_miss)


def ingested(
    engine: Engine,
    source: str,
    parts: Sequence[Part],
    *,
    fuser: Fuser | None = None,
    vectors: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> None:
    """Encode what an ingestion step was given: all chunks that these documents have now. Deletions it is not told of.

    Chunks that a document had at an earlier call with this ``source`` and that no document has now are forgotten.
    ``vectors``: for the ``fuser``, embeddings that are there already, by text.
    """
    _encode(engine, parts, fuser, show_progress)
    _forget_replaced(engine, source, parts)
    if fuser is not None:
        fuser(engine, show_progress, vectors=vectors, without=_perhaps_replaced(engine, parts))


def _encode(engine: Engine, parts: Sequence[Part], fuser: Fuser | None, show_progress: bool) -> int:
    if fuser is not None:
        fuser.follow(engine)
    # Whose chunks these are, so that engine.forget_document finds them.
    engine.documents.note((document, text) for document, text in parts if document)
    return encode(engine, [text for _, text in parts], show_progress)


_ingested: weakref.WeakKeyDictionary[Engine, dict[tuple[str, str], frozenset[str]]] = weakref.WeakKeyDictionary()
"""By engine, source and document, the keys of the chunks it had at its latest ingestion."""
_lock = threading.Lock()


def _forget_replaced(engine: Engine, source: str, parts: Iterable[Part]) -> None:
    if not engine.composable:
        return
    now: dict[str, set[str]] = {}
    for document, text in parts:
        if document is not None:
            now.setdefault(document, set()).add(engine.library.key(text))
    with _lock:
        known = _ingested.setdefault(engine, {})
        gone: set[str] = set()
        for document, keys in now.items():
            replaced = known.get((source, document), frozenset()) - keys
            engine.documents.discard(document, filter(None, map(engine.index.text, replaced)))
            gone |= replaced
            known[source, document] = frozenset(keys)
        if gone:
            gone.difference_update(*known.values())
    # Another process may have ingested a document that has such a text, too.
    engine.forget(engine.documents.unheld(old for key in gone if (old := engine.index.text(key)) is not None))


def _perhaps_replaced(engine: Engine, parts: Iterable[Part]) -> list[str]:
    """What only these documents had, perhaps in an earlier process, and no longer have: it may soon be gone."""
    parts = list(parts)
    now = {engine.documents.text(text) for _, text in parts}
    before = engine.documents.only({document for document, _ in parts if document}) - now
    known = engine.index.texts() if before else []
    return [text for text in known if engine.documents.text(text) in before]
