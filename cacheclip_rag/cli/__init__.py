"""The command line, `cacheclip`."""

import os

# PyTorch's threads wait for one another by spinning, so that one which another program has put off its CPU holds up all
# others: seven times slower with one busy neighbour on two cores. Read when torch is imported, which commands do later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .main import app

__all__ = ["app"]
