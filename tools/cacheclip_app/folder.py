"""A folder of documents, read through LlamaIndex' readers and kept as vectors and chunk KV."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chromadb
from chromadb.api import ClientAPI
from chromadb.config import Settings
from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, Document, MetadataMode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.llms.cacheclip import CacheClipLLM
from llama_index.readers.file import HTMLTagReader
from llama_index.vector_stores.chroma import ChromaVectorStore

from cacheclip_rag import Engine
from cacheclip_rag.chunks import MIN_CHARS, ChunkKV, canonical
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.library import Library as ChunkLibrary
from cacheclip_rag.store.admin import Administration
from cacheclip_rag.store.files import TEMPORARY, make_directory, publish
from cacheclip_rag.store.format import dump
from cacheclip_rag.weights.pull import resolve

SUFFIXES = (".pdf", ".md", ".markdown", ".html", ".htm", ".txt", ".rst")

_COLLECTION = "chunks"

_BATCH = 8
"""Documents that are embedded at a time: what an interruption costs."""

DISK_BYTES = 32 << 30
"""An engine's default."""

_SAMPLE = 16
"""Chunks of which one is measured."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and of how much."""


@dataclass(frozen=True)
class Library:
    """Where the chunks of a folder are, and for which model; kept beside them, so that asking needs no options."""

    home: Path
    model: str = "qwen2.5-coder-0.5b-instruct"
    auxiliary: str | None = None
    chunk_size: int = 320
    disk_bytes: int | None = None
    """The most that all KV takes; None: an engine's default."""

    @classmethod
    def given(cls, home: Path, **settings: Any) -> Library:
        """With these settings; those that are None are what an earlier ingestion had, or else the defaults.

        An auxiliary model called ``"none"``, or nothing, is none.
        """
        try:
            library = cls.read(home)
        except ConfigurationError:
            library = cls(home)
        wanted = {name: value for name, value in settings.items() if value is not None}
        if "auxiliary" in wanted and wanted["auxiliary"].lower() in ("none", ""):
            wanted["auxiliary"] = None
        return dataclasses.replace(library, **wanted)

    @classmethod
    def read(cls, home: Path) -> Library:
        """Raises `ConfigurationError` where nothing was ingested."""
        try:
            settings = json.loads((home / "index" / "settings.json").read_text(encoding="utf-8"))
            return cls(home, **settings)
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{home} holds no ingested documents: run `cacheclip ingest FOLDER` first, or say where with --home"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{home / 'index' / 'settings.json'} cannot be read ({error}): run `cacheclip ingest FOLDER` again"
            ) from error

    @property
    def folder(self) -> Path:
        return self.home / "index"

    @property
    def documents(self) -> Path:
        """What is known of the documents whose chunks are in the vector store."""
        return self.folder / "documents.json"

    @property
    def unfinished(self) -> Path:
        """The texts that may have to be forgotten, while an ingestion is under way."""
        return self.folder / "unfinished.json"

    def write(self) -> None:
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "home"}
        if self.disk_bytes is None:  # versions before know no such setting
            del settings["disk_bytes"]
        _note(self.folder / "settings.json", json.dumps(settings, indent=1))

    def llm(self, **options: Any) -> CacheClipLLM:
        if self.disk_bytes is None:
            return CacheClipLLM(self.model, auxiliary=self.auxiliary, kv_dir=str(self.home), **options)
        return CacheClipLLM.from_engine(self.engine(options.get("method")), model_name=self.model, **options)

    def engine(self, method: str | None = None) -> Engine:
        """One with this cap: whoever opens the store with a smaller one evicts what does not fit."""
        return Engine(self.model, auxiliary=self.auxiliary, method=method, store=self.home, disk_bytes=_cap(self))

    def client(self) -> ClientAPI:
        return chromadb.PersistentClient(str(self.folder / "chroma"), settings=Settings(anonymized_telemetry=False))

    def vectors(self) -> ChromaVectorStore:
        return ChromaVectorStore(chroma_collection=self.client().get_or_create_collection(_COLLECTION))

    def index(self, embedding: BaseEmbedding) -> VectorStoreIndex:
        return VectorStoreIndex.from_vector_store(self.vectors(), embed_model=embedding)


@dataclass
class Ingested:
    """What an ingestion found and did. ``encoded``: chunks whose KV was computed now."""

    files: int
    chunks: int
    encoded: int
    removed: int
    seconds: float
    unread: list[str] = field(default_factory=list)
    """Files nothing could be read from."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """``(beginning of the chunk, reason)``: without KV, so prefilled whenever they are retrieved."""
    disk_bytes: int = 0
    """Of the KV of all chunks, the auxiliary model's included."""
    passed_over: list[str] = field(default_factory=list)
    """Links that lead out of the folder, and names that are no text."""
    kept: int = 0
    """Chunks whose KV is in the store now."""
    no_room: int = 0
    """Chunks without KV because the store is full."""
    cap_bytes: int = 0


@dataclass
class Plan:
    """What an ingestion would do, measured on a few chunks on this machine; nothing is written."""

    files: int
    chunks: int
    new: int
    """Chunks that have no KV in the store yet."""
    tokens: int
    nbytes: int
    """Of the KV of all chunks, the auxiliary model's included."""
    minutes: float
    """For the model, and the auxiliary one, to read the new chunks."""
    cap_bytes: int
    fitting: int
    """How many of all chunks the cap has room for."""
    passed_over: list[str] = field(default_factory=list)


def ingest(
    folder: Path,
    library: Library,
    embedding: BaseEmbedding,
    progress: Progress = lambda *_: None,
    tell: Callable[[str], None] = lambda _: None,
) -> Ingested:
    """Bring the library up to date with the folder: new and changed files are read, those that are gone forgotten.

    Where the store has no room for all chunks, those that it has room for are read and the others are not: they would
    only drive out the first. ``tell`` is called when that is known. Interrupting it loses nothing that was finished;
    the same call goes on from there. Raises `ConfigurationError` for a folder without documents, and what opening the
    model raises.
    """
    start = time.perf_counter()
    files, passed_over = _files(folder)
    resolve(library.model)  # a misspelt name is found before an hour of work
    progress("reading files", 0, 0)
    documents = _read(folder, files)
    before = _begin(library)
    vectors = library.vectors()
    library.write()
    _embed(library, documents, vectors, embedding, progress)
    chunks = [(str(node.metadata["source"]), text_of(node)) for node in vectors.get_nodes(node_ids=None)]
    after = list(dict.fromkeys(text for _, text in chunks))

    progress("opening the model", 0, 0)
    engine = library.llm().engine
    engine.documents.note(chunks)  # so that `cacheclip store forget --document` finds them
    gone = before.difference(after)
    engine.forget(gone)
    if gone:  # what other models read of them goes, too
        Administration(library.home).forget({canonical(text) for text in gone}.__contains__)
    library.unfinished.unlink()
    kept, encoded, skipped, no_room = _encode(engine, after, progress, tell)
    read = {document.metadata["source"] for document in documents}
    return Ingested(
        files=len(read),
        chunks=len(after),
        encoded=encoded,
        removed=len(gone),
        seconds=time.perf_counter() - start,
        unread=[name for file in files if (name := _name(folder, file)) not in read],
        skipped=skipped,
        disk_bytes=engine.stats().store.disk_bytes,
        passed_over=passed_over,
        kept=kept,
        no_room=no_room,
        cap_bytes=_cap(library),
    )


def plan(folder: Path, library: Library, progress: Progress = lambda *_: None) -> Plan:
    """What `ingest` would do. Raises what it raises."""
    files, passed_over = _files(folder)
    resolve(library.model)
    progress("reading files", 0, 0)
    nodes = _splitter(library)(_read(folder, files))
    texts = list(dict.fromkeys(text_of(node) for node in nodes))
    progress("opening the model", 0, 0)
    with Engine(library.model, auxiliary=library.auxiliary) as engine:  # in memory
        libraries = _libraries(engine)
        sizes = [_Sizes.measured(one, _worth(texts), progress) for one in libraries]
        cap, fitting, nbytes, tokens, seconds, new = _cap(library), 0, 0, 0, 0.0, 0
        for text in texts:
            known = [one.namespace.digest[:32] for one in libraries]
            keys = [one.key(text) for one in libraries]
            missing = [not (library.home / a / f"{b}.safetensors").exists() for a, b in zip(known, keys, strict=True)]
            counts = [size.tokens(text) for size in sizes]
            nbytes += sum(size.nbytes(text, count) for size, count in zip(sizes, counts, strict=True))
            seconds += sum(
                size.seconds_per_token * count for size, count, new in zip(sizes, counts, missing, strict=True) if new
            )
            tokens, new, fitting = tokens + counts[0], new + missing[0], fitting + (nbytes <= cap)
    return Plan(len(files), len(texts), new, tokens, nbytes, seconds / 60, cap, fitting, passed_over)


class _Sizes:
    """What chunks take in one model's library: bytes and seconds, by what one of them took."""

    def __init__(self, of: ChunkLibrary, chunk: ChunkKV, seconds: float = 0.0) -> None:
        self._backbone = of.backbone
        self._per_token = chunk.nbytes / max(len(chunk), 1)
        self._fixed = len(dump(of.key(chunk.text), chunk, of.namespace)) - chunk.nbytes - len(_bytes(chunk.text))
        self.seconds_per_token = seconds / max(len(chunk), 1)

    @classmethod
    def measured(cls, of: ChunkLibrary, texts: list[str], progress: Progress) -> _Sizes:
        """By the longest of the first chunks, read twice: the first time is for warming up."""
        sample = max(texts[:_SAMPLE], key=len, default=" ".join(["word"] * 100))
        progress("measuring", 0, 0)
        of.encode(sample)
        start = time.perf_counter()
        chunk = of.encode(sample)
        return cls(of, chunk, time.perf_counter() - start)

    def tokens(self, text: str) -> int:
        return len(self._backbone.tokenise(canonical(text), plain=True))

    def nbytes(self, text: str, tokens: int) -> int:
        return int(self._per_token * tokens) + self._fixed + len(_bytes(canonical(text)))


def _encode(
    engine: Engine, texts: list[str], progress: Progress, tell: Callable[[str], None]
) -> tuple[int, int, list[tuple[str, str]], int]:
    """Keep the KV of these chunks, as far as there is room: how many are kept, how many were computed now and are kept,
    what was left out and why, and how many of these for want of room.
    """
    libraries = _libraries(engine)
    there = {text for text in texts if engine.library.keeps(engine.library.key(text))}
    with contextlib.ExitStack() as holding:
        for one in libraries:
            holding.enter_context(one.store.holding([one.key(text) for text in texts]))
        chosen = _with_room(libraries, texts)
        if left_out := len(texts) - len(chosen):
            tell(
                f"the store has room for {len(chosen):,} of {len(texts):,} chunks: the other {left_out:,} are not "
                "read, since they would only drive out the first (--cap)"
            )
        result = engine.ensure(chosen, lambda done: progress("reading chunks with the model", done, len(chosen)))
    kept = {text for text in texts if engine.library.keeps(engine.library.key(text))}
    return len(kept), len(kept - there), result.skipped, left_out + result.not_kept


def _with_room(libraries: list[ChunkLibrary], texts: list[str]) -> list[str]:
    """Those of the texts, from the first on, that the store has room for beside what it has of them. One chunk is
    encoded to know what they take.
    """
    worth = set(_worth(texts))
    rooms = [one.store.room() for one in libraries]
    missing = [text for text in texts if text in worth and not all(one.keeps(one.key(text)) for one in libraries)]
    if not missing or None in rooms:
        return texts
    room = min(room for room in rooms if room is not None)
    sizes = []
    for one in libraries:
        [made] = one.encode_each(missing[:1])
        if isinstance(made, Exception):
            return texts  # `ensure` says why
        sizes.append(_Sizes(one, made))
    dropped = set[str]()
    for text in missing:
        taken = sum(
            size.nbytes(text, size.tokens(text))
            for one, size in zip(libraries, sizes, strict=True)
            if not one.keeps(one.key(text))
        )
        if taken > room or dropped:  # a shorter one behind it would make the next run begin elsewhere
            dropped.add(text)
        else:
            room -= taken
    return [text for text in texts if text not in dropped]


def _libraries(engine: Engine) -> list[ChunkLibrary]:
    return [engine.library, *([] if engine.auxiliary is None else [engine.auxiliary.library])]


def _worth(texts: list[str]) -> list[str]:
    """Those that are long enough for KV to be kept."""
    return [text for text in texts if len(canonical(text)) >= MIN_CHARS]


def _cap(library: Library) -> int:
    return DISK_BYTES if library.disk_bytes is None else library.disk_bytes


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _begin(library: Library) -> set[str]:
    """The chunks there were before, those included that an ingestion which was interrupted had still to forget."""
    for folder in (library.home, library.folder):  # the index holds the documents' text: it is its owner's only
        make_directory(folder)
    library.folder.chmod(0o700)
    before = {text_of(node) for node in library.vectors().get_nodes(node_ids=None)}
    with contextlib.suppress(OSError, ValueError):
        before.update(json.loads(library.unfinished.read_text(encoding="utf-8")))
    _note(library.unfinished, json.dumps(sorted(before)))
    for left in library.folder.glob(f"{TEMPORARY}*"):  # of a process that was killed; they may hold any text
        left.unlink(missing_ok=True)
    with contextlib.suppress(ConfigurationError):
        # cut otherwise, every chunk is another; and of what earlier versions left half written nothing is known
        if Library.read(library.home).chunk_size != library.chunk_size or _known(library) is None:
            library.documents.unlink(missing_ok=True)
            library.client().delete_collection(_COLLECTION)
    return before


def _note(path: Path, text: str) -> None:
    """Write a file that is whole whenever the process ends."""
    publish(path, text.encode())


def _known(library: Library) -> SimpleDocumentStore | None:
    """The documents whose chunks are in the vector store; None where the file cannot be read."""
    if not library.documents.exists():
        return SimpleDocumentStore()
    try:
        return SimpleDocumentStore.from_persist_path(str(library.documents))
    except (OSError, ValueError):
        return None


def text_of(node: BaseNode) -> str:
    """A chunk as response synthesizers put it into prompts."""
    return node.get_content(metadata_mode=MetadataMode.LLM)


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """The documents, and the names of those that are passed over: who put a link into the folder need not be allowed to
    read what it leads to. Raises `ConfigurationError` where there are none.
    """
    if not folder.is_dir():
        raise ConfigurationError(
            f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}: give a folder"
        )
    root, files, passed_over = folder.resolve(), list[Path](), list[str]()
    for path in sorted(folder.rglob("*")):
        if _hidden(path.relative_to(folder)):
            continue
        document = path.suffix.lower() in SUFFIXES and path.is_file()
        real = path.resolve()
        if not document and not (path.is_symlink() and real.is_dir()):
            continue
        inside = real.is_relative_to(root) and not _hidden(real.relative_to(root))
        if inside and document and _is_text(path):
            files.append(path)
        elif not inside or document:
            passed_over.append(_name(folder, path))
    if not files:
        links = ", but for links that lead out of it" if passed_over else ""
        raise ConfigurationError(f"{folder} holds no documents{links}; those that can be read: {', '.join(SUFFIXES)}")
    return files, passed_over


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(path: Path) -> bool:
    """Whether the name can be kept: neither vectors nor KV can be stored under bytes that are no UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _splitter(library: Library) -> SentenceSplitter:
    return SentenceSplitter(chunk_size=library.chunk_size, chunk_overlap=20)


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _read(folder: Path, files: list[Path]) -> list[Document]:
    """A document a file, or a page of a PDF; what cannot be read is left out."""
    html = HTMLTagReader("body")
    reader = SimpleDirectoryReader(
        input_files=[str(file) for file in files],
        file_extractor={".html": html, ".htm": html},
        file_metadata=lambda path: {"source": _name(folder, Path(path))},
        filename_as_id=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the reader prints what it cannot read; the caller says it better
        found = reader.load_data()
    documents = []
    for document in found:
        if not document.text.strip():
            continue
        page = document.metadata.get("page_label")
        document.metadata = {"source": document.metadata["source"]} | ({"page": page} if page else {})
        documents.append(document)
    return documents


def _embed(
    library: Library,
    documents: list[Document],
    vectors: ChromaVectorStore,
    embedding: BaseEmbedding,
    progress: Progress,
) -> None:
    """Split and embed what is new or changed, a few documents at a time, and drop what is gone from the vectors."""
    known = _known(library) or SimpleDocumentStore()
    for gone in set(known.get_all_document_hashes().values()) - {document.id_ for document in documents}:
        vectors.delete(gone)
        known.delete_document(gone)
    pipeline = IngestionPipeline(
        transformations=[_splitter(library), embedding],
        docstore=known,
        docstore_strategy=DocstoreStrategy.UPSERTS,
        vector_store=vectors,
        disable_cache=True,
    )
    for start in range(0, len(documents), _BATCH):
        progress("embedding documents", start, len(documents))
        batch = documents[start : start + _BATCH]
        for document in batch:
            if known.get_document_hash(document.id_) is None:
                vectors.delete(document.id_)  # of an ingestion that was interrupted
        pipeline.run(documents=batch)
        _note(library.documents, json.dumps(known.to_dict()))
    _note(library.documents, json.dumps(known.to_dict()))
