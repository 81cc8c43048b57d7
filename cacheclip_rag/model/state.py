"""Detects changes to a model since its KV was computed: weights, mode, hooks, adapters."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_ADAPTERS = ("active_adapters", "active_adapter", "disable_adapters", "merged", "_active_adapter")
"""What adapter libraries (peft among them) keep on a module that they have changed."""

State = Hashable


def state_of(model: nn.Module) -> State:
    """Changes whenever a weight or buffer is written or replaced, a mode, hook or adapter is switched. Cheap: no number
    is looked at (a millisecond for some hundred modules).
    """
    tensors = tuple((id(tensor), _version(tensor)) for tensor in chain(model.parameters(), model.buffers()))
    modules = tuple(
        (module.training, *(tuple(getattr(module, name)) for name in _HOOKS), *_adapters(module))
        for module in model.modules()
    )
    return tensors, modules


def additions(model: nn.Module) -> dict[str, str]:
    """What changes a model's KV beside its weights and configuration, for its fingerprint: hooks and adapters by name.

    Empty for most models.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        hooks = [_named(hook) for kind in _HOOKS for hook in getattr(module, kind).values()]
        if described := [*hooks, *map(str, _adapters(module))]:
            found[name] = ", ".join(described)
    return found


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode: its changes are not counted
        return 0


def _adapters(module: nn.Module) -> tuple[Hashable, ...]:
    return tuple(_hashable(vars(module)[name]) for name in _ADAPTERS if name in vars(module))


def _hashable(value: Any) -> Hashable:
    return tuple(value) if isinstance(value, (list, set)) else value if isinstance(value, Hashable) else repr(value)


def _named(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)
