"""PyTorch's inference mode, left also by who is interrupted.

`torch.inference_mode` is entered and left by Python code. A signal handler that raises at the beginning of that keeps
the thread in the mode; worse, the former one is restored later by whichever thread the garbage collector runs on, which
falls out of inference mode in the middle of a forward. What is underneath it is left in one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_Mode: Callable[[bool], AbstractContextManager[Any]] = getattr(torch._C, "_InferenceMode", torch.inference_mode)


def inference() -> AbstractContextManager[Any]:
    """As `torch.inference_mode` in a ``with`` statement."""
    return _Mode(True)


def inferring(function: F) -> F:
    """As `torch.inference_mode` for a function."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with _Mode(True):
            return function(*arguments, **options)

    return wrapped  # type: ignore[return-value]
