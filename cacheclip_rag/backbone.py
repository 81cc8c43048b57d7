"""The former place of `cacheclip_rag.model.backbone`."""

from .deprecation import moved_module

__getattr__ = moved_module(__name__, "cacheclip_rag.model.backbone")
