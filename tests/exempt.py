"""Which methods the shared tests leave out, and why. All others, those that are added later too, are held to them."""

from __future__ import annotations

from cacheclip_rag import METHODS

COMPUTES_ALL = dict.fromkeys(["full", "prefix-cache", "ragcache"], "computes all that was not there before")
REPAIRS_NOTHING = dict.fromkeys(["naive", "promptcache", "link0", "ape", "sel"], "recomputes no chunk token at all")
OWN_COUNT = {
    "legolink": "takes a fixed number of tokens of each chunk, whatever the ratio",
    "cachecraft": "each variant's fix-up overhead says how many, and the ratio says nothing",
    "droidspeak": "selects twice, as many each time",
}

NEEDS_A_FOLDER = dict.fromkeys(["kvlink", "kvpacket"], "refused without what was trained: tests/test_soft_tokens.py")

NOT_AT_ALL_TOKENS = COMPUTES_ALL | REPAIRS_NOTHING | OWN_COUNT | NEEDS_A_FOLDER
"""Methods that do not recompute every placed token where the budget is all of them."""

OTHER_BUDGET = COMPUTES_ALL | REPAIRS_NOTHING | OWN_COUNT | NEEDS_A_FOLDER
"""Methods that do not recompute exactly the share of placed tokens that is asked for."""


def but(exempt: dict[str, str]) -> list[str]:
    """The names of all methods but these."""
    assert exempt.keys() <= METHODS.keys()
    return [name for name in METHODS if name not in exempt]
