"""LlamaIndex's components and the engine behind them, when they are copied or sent elsewhere."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import BaseModel


def restore(component: BaseModel, state: dict[str, Any]) -> None:
    """``__setstate__`` of a component with a handle.

    LlamaIndex's own calls ``__init__`` with the fields and loses private attributes, the handle among them. Fields that
    its ``__getstate__`` left out because they cannot be pickled (callbacks) get their defaults, and so do attributes.
    """
    BaseModel.__setstate__(component, state)
    private = component.__pydantic_private__
    for name, attribute in type(component).__private_attributes__.items():
        if private is not None and name not in private:
            private[name] = attribute.get_default()
    for name, field in type(component).model_fields.items():
        if name not in component.__dict__:
            component.__dict__[name] = field.get_default(call_default_factory=True)
