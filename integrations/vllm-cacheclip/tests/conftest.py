"""Tests of the pure parts run anywhere; those in vllm/ need vLLM, and an environment of their own (run_tests)."""

from __future__ import annotations

from importlib.util import find_spec

vllm = find_spec("vllm")
# The folder beside this file is found, too, as a namespace without a file of its own.
collect_ignore = [] if vllm is not None and vllm.origin else ["vllm"]
