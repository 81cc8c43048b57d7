"""The command `cacheclip serve`: a process of its own, which may be killed while it ingests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from threads import join, start, until
from typer.testing import CliRunner

from cacheclip_rag.cli import main as cli
from cacheclip_rag.errors import ServerError
from cacheclip_rag.server.client import ChunkClient
from cacheclip_rag.store.admin import Administration

TEXTS = [
    f"Entry number {number}: on day {number * 7 + 3} the clerk of room {number * 13 + 5} noted that a parcel had come. "
    + "He weighed it, wrote its number into the ledger and put it on the shelf beside the window. " * 8
    for number in range(80)
]


START = 120.0
"""Seconds that a process may take to import PyTorch and open the model, on a machine that is busy."""


class Process:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def client(self, key: str | None = "red") -> ChunkClient:
        return ChunkClient(self.url, key)

    def end(self, how: int) -> str:
        """What it wrote to stderr."""
        self.process.send_signal(how)
        return self.process.communicate(timeout=60)[1]


@contextmanager
def started(*flags: str) -> Iterator[Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = "from cacheclip_rag.cli import app; app()"
    command = [sys.executable, "-c", call, "serve", *flags, "--embedded", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})

    def healthy() -> bool:
        assert process.poll() is None, process.communicate()[1]
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(healthy, START)
        yield Process(process, f"http://127.0.0.1:{port}/v1")
    finally:
        process.kill()
        process.communicate()


def ingesting(server: Process, least: int) -> Any:
    """A thread that puts the document there, once so many chunks of it are stored; and what becomes of it."""
    raised: list[ServerError] = []

    def put() -> None:
        try:
            server.client().replace("ledger", TEXTS)
        except ServerError as error:
            raised.append(error)

    thread = start(put)
    with server.client() as client:
        until(lambda: client.stats().chunks >= least)
    return thread, raised


def test_it_serves_answers_and_documents(stand_in: str, tmp_path: Path) -> None:
    flags = ("--store", str(tmp_path), "--api-key", "red=acme", "--api-key", "blue", "--method", "naive")
    with started(stand_in, *flags) as server:
        with server.client() as red, server.client("blue") as blue:
            assert red.add(TEXTS[:2]).encoded == 2 and blue.stats().chunks == 0
        client = openai.OpenAI(base_url=server.url, api_key="red")
        messages: Any = [{"role": "user", "content": "\n\n".join([*TEXTS[:2], "What came?"])}]
        answer = client.chat.completions.create(
            model=stand_in, messages=messages, max_tokens=2, extra_body={"cacheclip": {"report": True}}
        )
        report = answer.model_extra["kv_transfer_params"]["cacheclip"]  # type: ignore[index]
        assert report["method"] == "naive" and report["reused"] > 100 and report["fallbacks"] == []
        said = server.end(signal.SIGTERM)
        assert server.process.returncode in (0, -signal.SIGTERM) and "Traceback" not in said
        assert "Entry" not in said
    assert {entry.tenant for entry in Administration(tmp_path).entries()} == {"acme"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ended_in_the_middle_of_an_ingestion_nothing_is_damaged_and_it_goes_on(
    stand_in: str, tmp_path: Path, how: signal.Signals
) -> None:
    flags = (stand_in, "--store", str(tmp_path), "--api-key", "red=acme", "--method", "naive")
    with started(*flags) as server:
        thread, raised = ingesting(server, least=3)
        said = server.end(how)
        join(thread)
        assert raised and raised[0].status == (None if how == signal.SIGKILL else 503)
        assert "Traceback" not in said
    before = Administration(tmp_path).verify()
    assert before.bad == [] and 3 <= before.good < len(TEXTS)
    with started(*flags) as server, server.client() as client:
        result = client.replace("ledger", TEXTS)
        assert (result.encoded, result.kept, result.skipped) == (len(TEXTS) - before.good, before.good, [])
        assert client.replace("ledger", TEXTS[:1]).removed == len(TEXTS) - 1
        client.forget_document("ledger")
    after = Administration(tmp_path).verify()
    assert (after.bad, after.good) == ([], 0) and not list((tmp_path / "documents").iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-model-len", "4096"], "--max-model-len 4096"),
        (["--api-key", ""], "API key"),
        (["--api-keys", "nowhere.txt"], "nowhere.txt"),
        (["--method", "nave"], "nave"),
        (["--method", "cacheclip"], "auxiliary"),
        (["--cap", "much"], "much"),
    ],
)
def test_bad_flags_are_one_line(stand_in: str, tmp_path: Path, flags: list[str], said: str) -> None:
    result = CliRunner().invoke(cli.app, ["serve", stand_in, "--embedded", "--store", str(tmp_path), *flags])
    assert result.exit_code == 2 and said in result.stderr.splitlines()[-1] and len(result.stderr.splitlines()) <= 2
