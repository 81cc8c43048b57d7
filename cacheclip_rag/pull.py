"""The former place of `cacheclip_rag.weights.pull`."""

from .deprecation import moved_module

__getattr__ = moved_module(__name__, "cacheclip_rag.weights.pull")
