"""Deprecated names: they keep working for one release, with a warning that names the new name."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that ``old`` is called ``new`` now, and works for one more release."""
    warnings.warn(
        f"{old} is now {new}; the old name works for one more release", DeprecationWarning, stacklevel=stacklevel
    )


def warn_dropped(old: str, instead: str, stacklevel: int = 3) -> None:
    """Warn that ``old`` has no effect any more: ``instead`` says what is true now."""
    warnings.warn(
        f"{old} has no effect any more: {instead}; it is refused after one more release",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def moved_module(old: str, new: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that is now called ``new``."""

    def getattr_(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(importlib.import_module(new), name)
        warn(f"{old}.{name}", f"{new}.{name}")
        return value

    return getattr_


def renamed_names(module: str, names: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose former ``names`` have become ``(module, name)``."""

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, new = names[name]
        value = getattr(importlib.import_module(home), new)
        warn(f"{module}.{name}", f"{home}.{new}")
        return value

    return getattr_


def renamed_attribute(old: str, new: str) -> property:
    """A property for a former attribute ``old`` that is now ``new``; ``None`` where it was an argument only."""

    def get(self: Any) -> Any:
        warn(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    def set_(self: Any, value: Any) -> None:
        warn(f"{type(self).__name__}.{old}", new)
        setattr(self, new, value)

    return property(get, set_, doc=f"The former name of `{new}`.")


def dropped_parameters(**instead: str) -> Callable[[type[T]], type[T]]:
    """A class whose constructor ignores former parameters, ``old="what is true now"``; they are its ``dropped``."""

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @functools.wraps(init)
        def __init__(self: T, *args: Any, **kwargs: Any) -> None:
            for old in instead.keys() & kwargs.keys():
                warn_dropped(f"{cls.__name__}({old}=...)", instead[old])
                del kwargs[old]
            init(self, *args, **kwargs)

        cls.__init__, cls.dropped = __init__, instead  # type: ignore[assignment, attr-defined]
        return cls

    return decorate


def renamed_parameters(**names: str) -> Callable[[type[T]], type[T]]:
    """A class whose constructor also takes former parameters, ``old="new"``."""

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @functools.wraps(init)
        def __init__(self: T, *args: Any, **kwargs: Any) -> None:
            for old in names.keys() & kwargs.keys():
                warn(f"{cls.__name__}({old}=...)", f"{names[old]}=...")
                kwargs[names[old]] = kwargs.pop(old)
            init(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[assignment]
        return cls

    return decorate
