"""What every framework's integration needs and no framework is needed for.

Here and not in each of them, so that an application that uses two frameworks opens a model once. Nothing here loads
torch or transformers before the first engine does.
"""

from .chunk_kv import OnMiss, encode, warm
from .engines import EngineHandle, EngineSettings, encoding_of
from .fuser import Fuser
from .held_ids import Holdings
from .options import check_fields, read_options
from .pump import pump

__all__ = [
    "EngineHandle",
    "EngineSettings",
    "Fuser",
    "Holdings",
    "OnMiss",
    "check_fields",
    "encode",
    "encoding_of",
    "pump",
    "read_options",
    "warm",
]
