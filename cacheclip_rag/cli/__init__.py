"""The command `cacheclip`."""

from .main import app

__all__ = ["app"]
