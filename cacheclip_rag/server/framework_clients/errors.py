"""Errors of OpenAI's client as this library's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import ServerError


@contextmanager
def servers_errors(base_url: str) -> Iterator[None]:
    """What goes wrong inside is a `ServerError` that says what the server says, with its status, if it has one."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        raise ServerError(f"{error.status_code}, {_said(error)}", error.status_code) from error
    except openai.APITimeoutError as error:
        raise ServerError(f"{base_url} did not answer in time: {error.message}") from error
    except openai.APIConnectionError as error:
        raise ServerError(f"{base_url} did not answer: {_reason(error)}") from error
    except openai.APIError as error:  # in the middle of a stream
        raise ServerError(_said(error)) from error


def _said(error: Exception) -> str:
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return str(said or getattr(error, "message", error))


def _reason(error: BaseException) -> str:
    """What the network said, beneath what clients make of it ("Connection error.")."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
