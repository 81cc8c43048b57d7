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

from cacheclip_rag.chunks import canonical
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.store.admin import Administration
from cacheclip_rag.weights.pull import resolve

SUFFIXES = (".pdf", ".md", ".markdown", ".html", ".htm", ".txt", ".rst")

_COLLECTION = "chunks"

_BATCH = 8
"""Documents that are embedded at a time: what an interruption costs."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and of how much."""


@dataclass(frozen=True)
class Library:
    """Where the chunks of a folder are, and for which model; kept beside them, so that asking needs no options."""

    home: Path
    model: str = "qwen2.5-coder-0.5b-instruct"
    auxiliary: str | None = None
    chunk_size: int = 320

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
        (self.folder / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def llm(self, **options: Any) -> CacheClipLLM:
        return CacheClipLLM(self.model, auxiliary=self.auxiliary, kv_dir=str(self.home), **options)

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


def ingest(folder: Path, library: Library, embedding: BaseEmbedding, progress: Progress = lambda *_: None) -> Ingested:
    """Bring the library up to date with the folder: new and changed files are read, those that are gone forgotten.

    Interrupting it loses nothing that was finished; the same call goes on from there. Raises `ConfigurationError` for
    a folder without documents, and what opening the model raises.
    """
    start = time.perf_counter()
    files = _files(folder)
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
    result = engine.ensure(after, lambda done: progress("reading chunks with the model", done, len(after)))
    read = {document.metadata["source"] for document in documents}
    unread = [name for file in files if (name := _name(folder, file)) not in read]
    seconds = time.perf_counter() - start
    size = engine.stats().store.disk_bytes
    return Ingested(len(read), len(after), result.encoded, len(gone), seconds, unread, result.skipped, size)


def _begin(library: Library) -> set[str]:
    """The chunks there were before, those included that an ingestion which was interrupted had still to forget."""
    for folder in (library.home, library.folder):  # the index holds the documents' text: it is its owner's only
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library.folder.chmod(0o700)
    before = {text_of(node) for node in library.vectors().get_nodes(node_ids=None)}
    with contextlib.suppress(OSError, ValueError):
        before.update(json.loads(library.unfinished.read_text(encoding="utf-8")))
    library.unfinished.write_text(json.dumps(sorted(before)), encoding="utf-8")
    with contextlib.suppress(ConfigurationError):
        if Library.read(library.home).chunk_size != library.chunk_size:  # cut otherwise, every chunk is another
            library.documents.unlink(missing_ok=True)
            library.client().delete_collection(_COLLECTION)
    return before


def text_of(node: BaseNode) -> str:
    """A chunk as response synthesizers put it into prompts."""
    return node.get_content(metadata_mode=MetadataMode.LLM)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigurationError(
            f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}: give a folder"
        )
    hidden = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())
    files = [path for path in hidden if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise ConfigurationError(f"{folder} holds no documents; those that can be read: {', '.join(SUFFIXES)}")
    return files


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
    path = library.documents
    known = SimpleDocumentStore.from_persist_path(str(path)) if path.exists() else SimpleDocumentStore()
    for gone in set(known.get_all_document_hashes().values()) - {document.id_ for document in documents}:
        vectors.delete(gone)
        known.delete_document(gone)
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=library.chunk_size, chunk_overlap=20), embedding],
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
        known.persist(str(path))
    known.persist(str(path))
