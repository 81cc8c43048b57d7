"""Tests of the pure parts run anywhere; those in vllm/ need vLLM, and an environment of their own (run_tests)."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") is not None else ["vllm"]
