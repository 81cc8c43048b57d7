"""Replacing a document's chunks: new ones in, vanished ones out, unchanged ones kept, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import ConfigurationError, Engine, StoreError
from cacheclip_rag.store import DiskStore, files
from cacheclip_rag.store.admin import Administration

BACKBONE, OTHER = tiny_backbone(), tiny_backbone("qwen2")
CHANGES = [
    *("publish", "reserve", "fill", "discard", "mark", "overwrite", "make_directory", "remove", "rename"),
    *("touch", "sync_folder"),
]
"""What of `store.files` changes something on the disk."""


def open_engine(folder: Path, **options: Any) -> Engine:
    return Engine(options.pop("backbone", BACKBONE), method="naive", store=folder, **options)


def known(engine: Engine) -> list[int]:
    return [number for number, text in enumerate(PASSAGES) if engine.knows(text)]


def stored(folder: Path) -> set[str]:
    return {entry.text for entry in Administration(folder).entries()}


def test_new_chunks_come_vanished_ones_go_and_unchanged_ones_stay(tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        first = engine.replace_document("one", PASSAGES[:3])
        assert (first.encoded, first.removed, first.skipped) == (3, 0, [])
        second = engine.replace_document("one", PASSAGES[1:4])
        assert (second.encoded, len(second.keys), second.removed) == (1, 3, 1)
        assert known(engine) == [1, 2, 3] and stored(tmp_path) == set(PASSAGES[1:4])
        again = engine.replace_document("one", PASSAGES[1:4])
        assert (again.encoded, len(again.keys), again.removed) == (0, 3, 0)
        assert engine.replace_document("one", []).removed == 3
    assert stored(tmp_path) == set()


def test_what_another_document_has_stays(tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        engine.ensure(PASSAGES[:2], document="two")
        engine.replace_document("one", PASSAGES[:3])
        assert engine.replace_document("one", PASSAGES[3:4]).removed == 3
        assert known(engine) == [0, 1, 3]
        engine.forget_document("two")  # nobody has them any more
        assert known(engine) == [3]


def test_other_models_and_later_processes_know_it_too(tmp_path: Path) -> None:
    for backbone in (BACKBONE, OTHER):
        with open_engine(tmp_path, backbone=backbone) as engine:
            engine.ensure(PASSAGES[:2], document="one")
    with open_engine(tmp_path) as engine:
        engine.replace_document("one", PASSAGES[1:2])
    assert stored(tmp_path) == {PASSAGES[1]}


def test_a_single_text_is_refused_before_anything_changes(tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        engine.ensure(PASSAGES[:1], document="one")
        with pytest.raises(ConfigurationError, match="several texts"):
            engine.replace_document("one", PASSAGES[1])
        assert known(engine) == [0]


def test_what_cannot_be_noted_is_an_error_and_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "no space left")

    with open_engine(tmp_path) as engine:
        engine.ensure(PASSAGES[:2], document="one")
        with monkeypatch.context() as patch:
            patch.setattr(files, "mark", full)
            with pytest.raises(StoreError, match="no space left"):
                engine.replace_document("one", PASSAGES[2:4])
        assert known(engine) == [0, 1]


def test_chunks_that_are_not_kept_are_told_by_their_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = [PASSAGES[0], PASSAGES[0] + " And more."]
    with open_engine(tmp_path) as engine:
        put = DiskStore.put
        monkeypatch.setattr(DiskStore, "put", lambda self, key, kv: kv.text != like[1] and put(self, key, kv))
        result = engine.replace_document("one", [*like, "short"])
    assert set(result.reasons) == {"short", like[1]} and "keep" in result.reasons[like[1]]
    assert len(result.keys) == 1 and result.not_kept == 1


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it, and nothing is written after it."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], bool]:
    """From now on, the process dies at the change of the disk after so many. Returns whether it has."""
    count = 0

    def mortal(change: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > after:
                raise Killed
            return change(*args, **options)

        return changing

    for name in CHANGES:
        monkeypatch.setattr(files, name, mortal(getattr(files, name)))
    return lambda: count > after


@pytest.mark.parametrize("repeated", [range(2, 5), range(2)], ids=["the same again", "the former again"])
def test_killed_at_any_change_of_the_disk_it_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeated: range
) -> None:
    """The document has passages 0 to 2 and is to have 2 to 4; passage 1 is another one's as well."""
    wanted = [PASSAGES[number] for number in repeated]
    for after in range(100):
        folder = tmp_path / str(after)
        with open_engine(folder) as engine:
            engine.ensure(PASSAGES[:3], document="one")
            engine.ensure(PASSAGES[1:2], document="two")
        with open_engine(folder) as engine, monkeypatch.context() as patch:
            died = dying(patch, after)
            try:
                engine.replace_document("one", PASSAGES[2:5])
            except Killed:
                pass
        with open_engine(folder) as engine:
            assert not Administration(folder).verify().bad
            result = engine.replace_document("one", wanted)
            assert result.skipped == [] and len(result.keys) == len(wanted)
        assert stored(folder) == {PASSAGES[1], *wanted}
        with open_engine(folder) as engine:
            engine.forget_document("one", "two")
        assert stored(folder) == set() and not list((folder / "documents").iterdir())
        if not died():
            break
    assert 10 < after < 99, "it was killed everywhere"
