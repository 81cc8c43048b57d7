"""Short versions of what ``make torture`` does at length, and a model of the store that hypothesis argues with."""

from __future__ import annotations

import errno
import json
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
from torture import HUGE, MODEL, chunk_of, chunks, same


def verdict(tally: torture.Tally) -> None:
    print(tally)
    assert tally.good, str(tally)


def test_an_error_at_any_system_call_is_no_error(tmp_path: Path) -> None:
    tally = torture.faults(tmp_path, (errno.ENOSPC, errno.EIO), stride=3)
    verdict(tally)
    assert tally.faults > 40


def test_files_that_may_not_grow_are_no_error(tmp_path: Path) -> None:
    verdict(torture.full(tmp_path))


def test_killed_at_any_system_call_nothing_is_lost_or_wrong(tmp_path: Path) -> None:
    tally = torture.kill_points(tmp_path, stride=3)
    verdict(tally)
    assert tally.kills > 20


def test_killed_at_random_moments_nothing_is_lost_or_wrong(tmp_path: Path) -> None:
    tally = torture.kills(tmp_path, rounds=20)
    verdict(tally)
    assert tally.kills == 40


def test_a_power_cut_loses_nothing_that_was_synced(tmp_path: Path) -> None:
    tally = torture.power_cuts(tmp_path, rounds=60)
    verdict(tally)
    assert tally.faults > 30


def test_damaged_and_forged_files_are_never_served(tmp_path: Path) -> None:
    verdict(torture.damage(tmp_path, inputs=600))


def test_processes_share_a_folder_and_its_cap(tmp_path: Path) -> None:
    tally = torture.company(tmp_path, seconds=2.0, processes=3, kill=True)
    verdict(tally)
    assert tally.puts and tally.kills == 1 and tally.looks > 20


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


class Model(RuleBasedStateMachine):
    """Two processes' stores over one folder, one of them behind memory, against a dictionary."""

    NUMBERS = st.integers(0, 7)

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.model: dict[str, Any] = {}
        self.stores = [self.open(0), self.open(1)]

    def open(self, which: int) -> Any:
        disk = DiskStore(self.folder, MODEL, HUGE, sync=False)
        return disk if which == 0 else TieredStore(MemoryStore(1500), disk)

    def tick(self) -> None:
        """The stores look again, as they do before every prompt; a folder's time of change may be the same."""
        for store in self.stores:
            for disk in store.tiers if isinstance(store, TieredStore) else [store]:
                if isinstance(disk, DiskStore):
                    disk._seen = -1
            store.refresh()

    @rule(which=st.integers(0, 1), number=NUMBERS)
    def put(self, which: int, number: int) -> None:
        chunk = chunk_of(number)
        assert self.stores[which].put(MODEL.key(chunk.text), chunk)
        self.model[MODEL.key(chunk.text)] = chunk
        self.tick()

    @rule(which=st.integers(0, 1), number=NUMBERS)
    def get(self, which: int, number: int) -> None:
        key = MODEL.key(chunk_of(number).text)
        got = self.stores[which].get(key)
        assert (got is not None) == (key in self.model)
        assert got is None or same(got, self.model[key])

    @rule(which=st.integers(0, 1), number=NUMBERS)
    def delete(self, which: int, number: int) -> None:
        key = MODEL.key(chunk_of(number).text)
        self.stores[which].delete([key])
        self.model.pop(key, None)
        self.tick()

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.stores[which] = self.open(which)

    @rule(number=NUMBERS, at=st.integers(0, 400))
    def damage(self, number: int, at: int) -> None:
        key = MODEL.key(chunk_of(number).text)
        path = self.stores[0].path / f"{key}.safetensors"
        if path.exists():
            data = bytearray(path.read_bytes())
            data[at % len(data)] ^= 1
            path.write_bytes(data)
            assert self.open(0).get(key) is None
            del self.model[key]
            self.tick()

    @rule(what=st.sampled_from([".usage", ".lock", "namespace.json"]))
    def lose_the_notes(self, what: str) -> None:
        for path in self.folder.rglob(what):
            path.unlink()

    @invariant()
    def all_agree(self) -> None:
        if hasattr(self, "stores"):
            for store in self.stores:
                assert {entry.key for entry in store.entries()} == set(self.model)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


Model.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
test_the_store_behaves_like_a_dictionary = Model.TestCase
