"""Errors in the shape of OpenAI's API, ``{"error": {"message", "type", "param", "code"}}``, and their status codes."""

from __future__ import annotations

from typing import Any

from ..errors import CacheClipError, ConfigurationError, PromptError, ServerError, StoreError
from .service import TenantRefused

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "method_not_allowed",
    413: "request_too_large",
    507: "insufficient_storage",
}

_STATUS: dict[type[BaseException], int] = {
    ConfigurationError: 400,
    PromptError: 400,
    NotImplementedError: 400,  # tools, for a model whose chat template has none
    TenantRefused: 403,
    StoreError: 507,
    CacheClipError: 500,
}


def status_of(error: BaseException) -> int:
    """The status code that this error is answered with; 500 for one that is nobody's fault but ours."""
    if isinstance(error, ServerError) and error.status is not None:
        return error.status
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def problem(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def problem_of(error: BaseException) -> dict[str, Any]:
    """What went wrong inside is said in the log, not to clients."""
    status = status_of(error)
    return problem(status, str(error) if status != 500 or isinstance(error, CacheClipError) else "internal error")
