"""Where chunk KV lives between requests: a memory tier over immutable, checksummed files."""

from .base import ChunkStore, Entry, StoreStats
from .disk import DiskStore
from .documents import Documents
from .int8 import Int8Store
from .loading_cost import LoadingCost, NotWorthLoading
from .memory import NEVER, LRUCache, MemoryBudget, MemoryStore
from .place import Place
from .remote import Remote, RemoteStore
from .tiered import TieredStore

__all__ = [
    "NEVER",
    "ChunkStore",
    "DiskStore",
    "Documents",
    "Entry",
    "Int8Store",
    "LRUCache",
    "LoadingCost",
    "MemoryBudget",
    "MemoryStore",
    "NotWorthLoading",
    "Place",
    "Remote",
    "RemoteStore",
    "StoreStats",
    "TieredStore",
]
