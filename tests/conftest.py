"""Fixtures of all tests of the core."""

from __future__ import annotations

import pytest

from cacheclip_rag.backbone import Backbone


@pytest.fixture(scope="session")
def smollm2() -> Backbone:
    """The real SmolLM2-135M-Instruct, float32, from the package index or the hub."""
    from cacheclip_rag.pull import resolve

    return Backbone.load(resolve("smollm2-135m-instruct"), dtype="float32")
