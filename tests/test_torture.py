"""What ``make torture`` does at length, and a model of the store that hypothesis argues with."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cacheclip_rag.store import DiskStore, MemoryStore, TieredStore, format

pytest.importorskip("fcntl")  # limits, signals and forks are Unix's
import torture
from stores import HUGE, later, same
from torture_harness import MODEL, Tally, chunk_of, chunks


def verdict(tally: Tally) -> None:
    print(tally)
    assert tally.good, str(tally)


def test_an_error_at_any_system_call_is_no_error(tmp_path: Path) -> None:
    tally = torture.faults(tmp_path, (errno.ENOSPC, errno.EIO))
    verdict(tally)
    assert tally.faults > 200


def test_files_that_may_not_grow_are_no_error(tmp_path: Path) -> None:
    verdict(torture.full(tmp_path, mount=True))  # on a small disk, too, where root may make one


def test_killed_at_any_system_call_nothing_is_lost_or_wrong(tmp_path: Path) -> None:
    tally = torture.kill_points(tmp_path)
    verdict(tally)
    assert tally.kills > 80


def test_killed_at_random_moments_nothing_is_lost_or_wrong(tmp_path: Path) -> None:
    tally = torture.kills(tmp_path, rounds=200)
    verdict(tally)
    assert tally.kills == 400


def test_a_power_cut_loses_nothing_that_was_synced(tmp_path: Path) -> None:
    tally = torture.power_cuts(tmp_path, rounds=60)
    verdict(tally)
    assert tally.faults > 30


def test_damaged_and_forged_files_are_never_served(tmp_path: Path) -> None:
    verdict(torture.damage(tmp_path, inputs=600))


def test_processes_share_a_folder_and_its_cap(tmp_path: Path) -> None:
    tally = torture.several_processes(tmp_path / "all live", seconds=30.0, processes=8)
    tally.add(torture.several_processes(tmp_path / "half die", seconds=4.0, processes=8, kill=True))
    verdict(tally)
    assert tally.puts and tally.kills == 4 and tally.looks > 100


KEY, CHUNK = next(iter(chunks(1).items()))
GOOD = format.dump(KEY, CHUNK, MODEL)
LENGTH = int.from_bytes(GOOD[:8], "little")

json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_headers_that_lie_are_never_served(data: st.DataObject) -> None:
    header = json.loads(GOOD[8 : 8 + LENGTH])
    for _ in range(data.draw(st.integers(1, 3))):
        target = header
        name = data.draw(st.sampled_from(sorted(header)))
        if isinstance(header[name], dict) and header[name] and data.draw(st.booleans()):
            target, name = header[name], data.draw(st.sampled_from(sorted(header[name])))
        if data.draw(st.booleans()):
            target[name] = data.draw(json_values)
        else:
            target[data.draw(st.text(max_size=6))] = target.pop(name)
        if not header:
            break
    new = json.dumps(header).encode()
    length = data.draw(st.sampled_from([len(new), len(new) + 1, len(new) - 1, 0, 1 << 40]))
    try:
        got = format.load(length.to_bytes(8, "little") + new + GOOD[8 + LENGTH :], KEY, MODEL)
    except format.Rejected:
        return
    assert same(got, CHUNK)


class Here:
    """A store, behind memory or not, that is spoken to in numbers of chunks."""

    def __init__(self, folder: Path, near: bool = False) -> None:
        self.disk = DiskStore(folder, MODEL, HUGE, sync=False)
        self.store = TieredStore(MemoryStore(1500), self.disk) if near else self.disk

    def put(self, number: int) -> bool:
        return self.store.put(key_of(number), chunk_of(number))

    def get(self, number: int) -> str:
        got = self.store.get(key_of(number))
        return "missing" if got is None else "right" if same(got, chunk_of(number)) else "wrong"

    def delete(self, number: int) -> None:
        self.store.delete([key_of(number)])

    def keys(self) -> set[str]:
        return {entry.key for entry in self.store.entries()}

    def refresh(self) -> None:
        """Look again, as before every prompt, though the folder's time of change may be the same."""
        later(self.disk.path)
        self.store.refresh()

    def close(self) -> None:
        pass


class Elsewhere:
    """`Here`, behind memory, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.pipe, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=serve, args=(folder, there), daemon=True)
        self.process.start()

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: int) -> Any:
            self.pipe.send((name, arguments))
            answer = self.pipe.recv()
            assert not isinstance(answer, Exception), answer
            return answer

        return ask

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def serve(folder: Path, pipe: Any) -> None:
    here = Here(folder, near=True)
    while (asked := pipe.recv()) is not None:
        name, arguments = asked
        try:
            pipe.send(getattr(here, name)(*arguments))
        except Exception as error:
            pipe.send(error)


def key_of(number: int) -> str:
    return MODEL.key(chunk_of(number).text)


class Model(RuleBasedStateMachine):
    """Two processes' stores over one folder, one of them behind memory, against a dictionary."""

    NUMBERS = st.integers(0, 7)

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.model: set[str] = set()
        self.stores: list[Any] = [self.open(0), self.open(1)]

    def open(self, which: int) -> Any:
        return Elsewhere(self.folder) if which else Here(self.folder)

    def tick(self) -> None:
        for store in self.stores:
            store.refresh()

    @rule(which=st.integers(0, 1), number=NUMBERS)
    def put(self, which: int, number: int) -> None:
        assert self.stores[which].put(number)
        self.model.add(key_of(number))
        self.tick()

    @rule(which=st.integers(0, 1), number=NUMBERS)
    def get(self, which: int, number: int) -> None:
        assert self.stores[which].get(number) == ("right" if key_of(number) in self.model else "missing")

    @rule(which=st.integers(0, 1), number=NUMBERS)
    def delete(self, which: int, number: int) -> None:
        self.stores[which].delete(number)
        self.model.discard(key_of(number))
        self.tick()

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.stores[which].close()
        self.stores[which] = self.open(which)

    @rule(number=NUMBERS, at=st.integers(0, 400))
    def damage(self, number: int, at: int) -> None:
        path = self.stores[0].disk.path / f"{key_of(number)}.safetensors"
        if path.exists():
            data = bytearray(path.read_bytes())
            data[at % len(data)] ^= 1
            path.write_bytes(data)
            assert Here(self.folder).get(number) == "missing"
            self.model.remove(key_of(number))
            self.tick()

    @rule(what=st.sampled_from([".usage", ".lock", "namespace.json"]))
    def lose_the_notes(self, what: str) -> None:
        for path in self.folder.rglob(what):
            path.unlink()

    @invariant()
    def all_agree(self) -> None:
        if hasattr(self, "stores"):
            for store in self.stores:
                assert store.keys() == self.model

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for store in self.stores:
                store.close()
            shutil.rmtree(self.folder)


Model.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
test_the_store_behaves_like_a_dictionary = Model.TestCase
