"""Damaged, forged and random files, through a whole store."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from stores import HUGE, later, same
from torture_harness import MODEL, Tally, chunks

from cacheclip_rag.store import DiskStore, format


def mutate(good: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A file's bytes after an accident, or after somebody's work."""
    data = bytearray(good)
    header = 8 + int.from_bytes(good[:8], "little")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(header) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
        kind = rng.randrange(9)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 50)]
        elif kind == 4:
            data[at:] = donor[at:]
        elif kind == 5:
            data[:8] = rng.choice((0, 1, header - 7, len(good), 1 << 20, 1 << 33, 1 << 62, (1 << 64) - 1)).to_bytes(
                8, "little"
            )
        elif kind == 6:
            data = bytearray(rng.randbytes(rng.randrange(400)))
        elif kind == 7:
            data += rng.randbytes(rng.randrange(1, 100))
        else:
            data[at : at + 64] = bytes(len(data[at : at + 64]))
    return bytes(data)


def lie(good: bytes, rng: random.Random) -> bytes:
    """A file whose header is well-formed JSON and says something else."""
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    values: list[Any] = ["", "x", 0, -1, 1 << 70, None, [], {}, "F64", "BF16", [0, 0], [1 << 62], True, "chunk 1"]
    name = rng.choice(list(header))
    target = header[name]
    if rng.random() < 0.2:
        header[rng.choice(["more", "extra.more", "keys", "__metadata__"])] = rng.choice([target, *values])
    elif rng.random() < 0.2:
        del header[name]
    else:
        part = rng.choice(list(target))
        if rng.random() < 0.3:
            del target[part]
        else:
            target[part] = rng.choice(values)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + good[8 + length :]


def look_again(store: DiskStore) -> None:
    """Take note of what is in the folder, though the clock may not have ticked since the last look."""
    later(store.path)
    store.refresh()


def damage(folder: Path, inputs: int, seed: int = 0) -> Tally:
    """Damaged, forged and random files, through the whole store: none is served unless it is what was stored."""
    tally, rng = Tally(), random.Random(seed)
    known = chunks(2)
    (key, chunk), (other, donor) = known.items()
    good, second = format.dump(key, chunk, MODEL), format.dump(other, donor, MODEL)
    store = DiskStore(folder / "damage", MODEL, HUGE, sync=False)
    path = store.path / f"{key}{format.SUFFIX}"
    for _ in range(inputs):
        data = lie(good, rng) if rng.random() < 0.4 else mutate(good, second, rng)
        path.unlink(missing_ok=True)
        look_again(store)
        if rng.random() < 0.5:  # known to the index, damaged later
            path.write_bytes(good)
            look_again(store)
        path.write_bytes(data)
        tally.inputs += 1
        try:
            look_again(store)
            got = store.get(key)
        except Exception as error:
            tally.failed.append(f"{type(error).__name__}: {error}")
            continue
        tally.reads += 1
        if got is not None and not same(got, chunk):
            tally.wrong += 1
    return tally
