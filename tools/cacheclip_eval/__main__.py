"""``python -m cacheclip_eval ROWS.jsonl``: the tables of a run, as ``cacheclip eval`` prints them."""

import sys

from cacheclip_rag.errors import CacheClipError

from .tables import summarise

try:
    print(summarise(sys.argv[1]), end="")
except (IndexError, CacheClipError) as error:
    sys.exit(f"usage: python -m cacheclip_eval ROWS.jsonl ({error})")
