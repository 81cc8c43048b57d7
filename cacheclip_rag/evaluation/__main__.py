"""``python -m cacheclip_rag.evaluation ROWS.jsonl``: the tables of a run."""

import sys
from pathlib import Path

from .tables import summarise

if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
    sys.exit("usage: python -m cacheclip_rag.evaluation ROWS.jsonl (rows come from `make quality DATA=folder`)")
print(summarise(sys.argv[1]))
