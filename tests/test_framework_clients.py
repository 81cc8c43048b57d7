"""What the integrations' clients of a server are made of: connections of a process, and reports."""

from __future__ import annotations

import copy
import os
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from cacheclip_rag.server.framework_clients import PerProcess, ServerHandle, report_in


def test_what_belongs_to_a_process_is_not_copied() -> None:
    kept = PerProcess[Any]()
    made = kept.get(object)
    owner = ServerHandle("http://localhost")
    assert kept.get(object) is made is not kept.get(object, owner) and kept.get(object, owner) is kept.get(
        object, owner
    )
    for other in (copy.copy(kept), copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert other.get(lambda: "new") == "new" and kept.get(object) is made


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_opens_connections_of_its_own() -> None:
    handle = ServerHandle("http://localhost:8000")
    mine = handle.chunks
    with mine:
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if handle.chunks is not mine and handle.chunks is handle.chunks else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and handle.chunks is mine


@pytest.mark.parametrize(
    "transfer",
    [
        None,
        7,
        {},
        {"cacheclip": None},
        {"cacheclip": {"method": "auto", "chunks": [{"key": "one"}]}},
        {"cacheclip": {"tokens": {"reused": "many"}}},
        {"cacheclip": {"tokens": 3}},
    ],
)
def test_a_report_that_cannot_be_read_is_none(transfer: Any) -> None:
    assert report_in({"kv_transfer_params": transfer}) is None


def test_a_report_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    given = {"method": "auto", "requested_ratio": 0.2, "prompt_tokens": 9, "reused": 7, "chunks": [], "unheard": 1}
    report = report_in(SimpleNamespace(kv_transfer_params={"cacheclip": given}, usage={"completion_tokens": 4}))
    assert report is not None and (report.reused, report.prompt_tokens, report.completion_tokens) == (7, 9, 4)
    assert "7 of 9" in str(report)
