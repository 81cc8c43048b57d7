"""The command line, `cacheclip`."""

from .main import app

__all__ = ["app"]
