"""The two halves of the evaluation sets: questions for choosing between methods, and questions for reporting on them.

`REPORTING` lists, by data set, the questions that no file in benchmarks/results had used when the list was made
(2026-11-29), spread evenly over the file. Nothing may be chosen on them: rows of these questions stand in files called
``report-*.jsonl`` only (tests/test_halves.py). Every other question may be used for choosing. The questions are apart,
their passages not always: XQuAD's paragraphs serve many questions, and NQ's distractors are other questions' passages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cacheclip_eval.sources import Source, sources

from cacheclip_rag.errors import ConfigurationError

Half = Literal["choosing", "reporting"]

SETS = {
    "hotpotqa_distractor": "",
    "2wikimultihopqa": "",
    "musique_cacheblend": "?answer_in_passages=True&passages=4",
    "nq_multidoc": "",
    "xquad_fusion": "",
}
"""The data sets, with the conditions on their items (`cacheclip_eval.sources`)."""

_IDS = {
    "hotpotqa_distractor": """
        hotpot-5abdd0f15542991f6610604d hotpot-5a8e27d45542995a26add46a hotpot-5a845d735542996488c2e52e
        hotpot-5a7b537555429927d897bf90 hotpot-5ab6f7415542991d322236f4 hotpot-5a87bd4e5542994846c1cde0
        hotpot-5aba52e655429939ce03dc94 hotpot-5ae66d515542992ae0d16346 hotpot-5a8e60ca5542995a26add4d9
        hotpot-5a7f7b3b5542992097ad2f81 hotpot-5ac532335542994611c8b41c hotpot-5ab94fa25542996be2020474
        hotpot-5ae1e22a5542997f29b3c160 hotpot-5ae6316d5542996de7b71b87 hotpot-5a9064c755429916514e74a6
        hotpot-5a83a31c554299123d8c2179 hotpot-5abaca935542996606241610 hotpot-5ab29346554299545a2cf997
        hotpot-5ab484415542990594ba9c44 hotpot-5a81c7d15542990a1d231ea9 hotpot-5a716ec85542994082a3e82d
        hotpot-5abba3cd554299642a094aee hotpot-5ae789615542997ec2727695 hotpot-5adf95745542995534e8c7f8
        hotpot-5a80721b554299485f5985ef hotpot-5ac509e95542994611c8b333 hotpot-5a7b63eb55429931da12ca7e
        hotpot-5a7ea14655429930675135ab
    """,
    "2wikimultihopqa": """
        2wiki-hipporag-002 2wiki-hipporag-007 2wiki-hipporag-008 2wiki-hipporag-013 2wiki-hipporag-019
        2wiki-hipporag-020 2wiki-hipporag-027 2wiki-hipporag-029 2wiki-hipporag-030 2wiki-hipporag-035
        2wiki-hipporag-036 2wiki-hipporag-039 2wiki-hipporag-042 2wiki-hipporag-044 2wiki-hipporag-045
        2wiki-hipporag-047 2wiki-hipporag-049 2wiki-hipporag-050 2wiki-hipporag-059 2wiki-hipporag-060
        2wiki-hipporag-063 2wiki-hipporag-065 2wiki-hipporag-068 2wiki-hipporag-070 2wiki-hipporag-075
        2wiki-hipporag-082 2wiki-hipporag-084 2wiki-hipporag-087 2wiki-hipporag-095
    """,
    "musique_cacheblend": """
        musique_s-005 musique_s-006 musique_s-016 musique_s-019 musique_s-022 musique_s-030 musique_s-040
        musique_s-043 musique_s-051 musique_s-061 musique_s-063 musique_s-069 musique_s-071 musique_s-073
        musique_s-078 musique_s-083 musique_s-087 musique_s-088 musique_s-094 musique_s-096 musique_s-103
        musique_s-110 musique_s-113 musique_s-119 musique_s-123 musique_s-131 musique_s-132 musique_s-136
        musique_s-137 musique_s-145
    """,
    "nq_multidoc": """
        nq-0202 nq-2188 nq-1400 nq-2599 nq-1508 nq-2569 nq-2644 nq-1883 nq-0731 nq-2003 nq-1559 nq-0895 nq-0709
        nq-0930 nq-1669 nq-2465 nq-2199 nq-0399 nq-2383 nq-1515 nq-0102 nq-1473 nq-1662 nq-1793 nq-0301 nq-0062
        nq-2589 nq-1372 nq-0090 nq-1393 nq-1213 nq-1660 nq-2276 nq-0180 nq-0502 nq-0241 nq-0643 nq-0341 nq-1321
        nq-0984 nq-2522 nq-1522 nq-2623 nq-2297 nq-1565 nq-0540 nq-0672 nq-0966 nq-1033 nq-2264 nq-1612 nq-2147
        nq-0517 nq-1558 nq-1600 nq-0571 nq-1776 nq-0140 nq-2648 nq-1042 nq-0923 nq-0118 nq-1458 nq-2274 nq-1601
        nq-2002 nq-2455 nq-2159 nq-0741 nq-0507 nq-0232 nq-1415 nq-1659 nq-1029 nq-1882 nq-2240 nq-0063 nq-2031
        nq-1072 nq-0332 nq-2243 nq-0191 nq-1088 nq-0162 nq-0705 nq-2180 nq-2547 nq-1414 nq-2336 nq-0759
    """,
    "xquad_fusion": """
        xquad-57339c16d058e614000b5ec6 xquad-5733a32bd058e614000b5f33 xquad-57338007d058e614000b5bdc
        xquad-5733834ed058e614000b5c26 xquad-56dfa0d84a1a83140091ebb7 xquad-56e0bb9f7aa994140058e6cd
        xquad-56dfb5777aa994140058e025 xquad-56e0d6cf231d4119001ac424 xquad-56e10aa5cd28a01900c674b3
        xquad-56e16182e3433e1400422e28 xquad-56e181d9e3433e1400422fa2 xquad-56e1b62ecd28a01900c67aa5
        xquad-56f8094aa6d7ea1400e17391 xquad-56f84485aef2371900625f71 xquad-56f86e91aef2371900626068
        xquad-56f8720eaef2371900626091 xquad-5705f7c875f01819005e77dd xquad-5706074552bb8914006897d5
        xquad-570610b275f01819005e792c xquad-5706143575f01819005e7952 xquad-5706149552bb891400689883
        xquad-570967c4ed30961900e840ba xquad-57096b66200fba1400367fa7 xquad-57097c8fed30961900e841f3
        xquad-57097d63ed30961900e841fe xquad-570d28bdb3d812140066d4a5 xquad-570d2f5bfed7b91900d45cd2
        xquad-570d47b8b3d812140066d62d xquad-570d4a6bfed7b91900d45e13 xquad-57107d73b654c5140001f91f
        xquad-5710eca0a58dae1900cd6b3e xquad-57111380a58dae1900cd6bda xquad-57111b95a58dae1900cd6c51
        xquad-571144d1a58dae1900cd6d70 xquad-57114667a58dae1900cd6d83 xquad-57114e8d50c2381900b54a5e
        xquad-57115ff82419e314009555c3 xquad-571c8539dd7acb1400e4c0e4 xquad-571c9348dd7acb1400e4c116
        xquad-571cb27fdd7acb1400e4c136 xquad-571cbe35dd7acb1400e4c140 xquad-5725c604271a42140099d186
        xquad-5725d79e89a1e219009abf93 xquad-5725db4aec44d21400f3d6c0 xquad-5725f39638643c19005acef7
        xquad-5725cc38ec44d21400f3d5bc xquad-57268e2bf1498d1400e8e3b1 xquad-572651f9f1498d1400e8dbf1
        xquad-5726938af1498d1400e8e44a xquad-5726975c708984140094cb20 xquad-5726a299dd62a815002e8ba2
        xquad-5725b81b271a42140099d097 xquad-5728349dff5b5019007d9efe xquad-5729e2316aef0514001550c6
        xquad-5729feaf6aef05140015518b xquad-572a005f1d046914007796bb xquad-572a020f6aef05140015519c
        xquad-5725edfe38643c19005ace9f xquad-5725f00938643c19005aced9 xquad-5725f8f5ec44d21400f3d7b3
        xquad-5725fcbe271a42140099d3b0 xquad-57264b3edd62a815002e80aa xquad-57264f18f1498d1400e8dbb0
        xquad-5726534d708984140094c271 xquad-57265642f1498d1400e8dc6a xquad-572663a9f1498d1400e8ddf4
        xquad-572669a9dd62a815002e8419 xquad-57268066708984140094c824 xquad-57268527708984140094c8bf
        xquad-572685cd5951b619008f7575 xquad-5726bf325951b619008f7cff xquad-5726e37ef1498d1400e8eedb
        xquad-5726f1ec708984140094d6a9 xquad-5726f4a0708984140094d6ed xquad-5726ddf6f1498d1400e8ee05
        xquad-5726e08e5951b619008f8111 xquad-5726ea985951b619008f8263 xquad-5726f48df1498d1400e8f0dd
        xquad-57274beff1498d1400e8f5e4 xquad-5727515f708984140094dc14 xquad-572757bef1498d1400e8f690
        xquad-5727aec03acd2414000de992 xquad-5727cc15ff5b5019007d9577 xquad-5727d1c93acd2414000ded40
        xquad-5727c94bff5b5019007d954a xquad-5727cb4b2ca10214002d9676 xquad-57280fd3ff5b5019007d9c27
        xquad-57281ab63acd2414000df495 xquad-572824f13acd2414000df591 xquad-572a1046af94a219006aa791
        xquad-572a13841d0469140077973b xquad-572a18a4af94a219006aa7df xquad-572a1a5c6aef051400155285
        xquad-572957ad1d046914007792db xquad-5729582b1d046914007792e7 xquad-572968cf1d046914007793cf
        xquad-57296d1b1d0469140077940e xquad-57296d571d04691400779416 xquad-57296f293f37b319004783a7
        xquad-57299a6f6aef051400155016 xquad-5729a26d6aef05140015505b xquad-572f6a0ba23a5019007fc5ee
        xquad-572ff673b2c2fd140056866a xquad-572ffd75b2c2fd14005686e8 xquad-572fffb404bcaa1900d76ff3
        xquad-572ff932a23a5019007fcbd6 xquad-572ffe6fb2c2fd14005686f2 xquad-572ffee1947a6a140053cf17
        xquad-57302700a23a5019007fce8c xquad-57302bd0b2c2fd14005689df xquad-57308f6b8ab72b1400f9c580
        xquad-573093598ab72b1400f9c5af xquad-57309ef18ab72b1400f9c602 xquad-5730a4d02461fd1900a9cf2d
        xquad-5730b2312461fd1900a9cfad xquad-5730b9852461fd1900a9cff9 xquad-5730d26fb54a4f140068cc96
        xquad-57373d0cc3c5551400e51e89 xquad-57378b141c4567190057449f xquad-57378c9b1c456719005744a7
    """,
}

REPORTING = {name: frozenset(ids.split()) for name, ids in _IDS.items()}
"""The ids of the reporting half, by data set."""


def choosing(source: Source) -> Source:
    """The source without questions of the reporting half, whichever set they are of."""
    reporting = frozenset().union(*REPORTING.values())
    known = {item.id for item in source.all()} if source.ids is None else source.ids
    return dataclasses.replace(source, ids=frozenset(known) - reporting)


def half(data: Path, which: Half, names: Sequence[str] = tuple(SETS)) -> list[Source]:
    """The sources in the folder ``data``, restricted to one half of their questions.

    Raises `ConfigurationError` for a missing data set, and for one that lacks questions of the reporting half.
    """
    found = sources([f"{data / name}{SETS[name]}" for name in names])
    parts = []
    for source in found:
        known = {item.id for item in source.all()}
        wanted = REPORTING[source.name]
        if lost := sorted(wanted - known):
            raise ConfigurationError(f"{source.path} lacks {len(lost)} questions of the reporting half: {lost[0]}, ...")
        parts.append(dataclasses.replace(source, ids=wanted if which == "reporting" else frozenset(known - wanted)))
    return parts
