"""The report as people see it: as HTML, as a figure, at a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import ChunkUse, Engine, Report
from cacheclip_rag.report import TokenSource, TokenSources, summary

HOSTILE = (
    "</span></div><script>alert('owned')</script><img src=x onerror=\"alert(1)\"> & <style>*{display:none}</style> "
    "\x1b[2J\x1b]0;owned\x07 $\\frac{x$ {{template}} and enough ordinary words to be taken for a chunk of its own."
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny_backbone(), method="query_guided") as engine:
        engine.ensure([*PASSAGES, HOSTILE])
        yield engine


def ask(engine: Engine, *texts: str, **options: object) -> Report:
    prompt = engine.backbone.chat([{"role": "user", "content": "\n\n".join([*texts, "Who built it?"])}])
    return engine.generate(prompt, max_new_tokens=1, **options).report


def made(runs: int, chunks: int = 0) -> Report:
    """A report with this many runs of two tokens of four characters, by turns reused, recomputed and fresh."""
    tokens = 2 * runs
    kinds = np.repeat(np.resize([TokenSource.REUSED, TokenSource.RECOMPUTED, TokenSource.FRESH], runs), 2)
    report = Report("naive", 0.1, prompt_tokens=tokens, ttft=1.0, seconds={"recompute": 0.9})
    report.token_sources = TokenSources.of("word" * tokens, 4 * np.arange(tokens), kinds)
    counts = report.token_sources.counts()
    report.reused, report.recomputed, report.fresh = (
        counts[f] for f in (TokenSource.REUSED, TokenSource.RECOMPUTED, TokenSource.FRESH)
    )
    report.chunks = [ChunkUse(f"key{n}", 8 * n, 8 * n + 8, 2, 0, 0, True, False) for n in range(chunks)]
    return report


@pytest.mark.parametrize("method", ["full", "naive", "query_guided", "prefix-cache", "epic", "cachecraft"])
def test_every_token_has_the_fate_it_was_counted_under(engine: Engine, method: str) -> None:
    engine.ensure(PASSAGES, method=method)
    for texts in (PASSAGES[:3], PASSAGES[:2], ["Nobody has read this yet, and yet it is long enough to be a chunk."]):
        report = ask(engine, *texts, method=method)
        assert report.token_sources is not None
        counts = report.token_sources.counts()
        assert sum(counts.values()) == report.token_sources.tokens == report.prompt_tokens
        assert counts[TokenSource.PREFIX] == report.prefix
        assert counts[TokenSource.REUSED] + counts[TokenSource.IN_PLACE] == report.reused
        assert counts[TokenSource.RECOMPUTED] == report.recomputed
        assert counts[TokenSource.FRESH] + counts[TokenSource.EDGE] == report.fresh


def test_runs_are_the_whole_prompt_cut_at_chunks(engine: Engine) -> None:
    report = ask(engine, *PASSAGES[:3])
    assert report.token_sources is not None
    pieces = list(summary.pieces(report))
    prompt = report.token_sources.prompt
    assert "".join(prompt[run.start : run.end] for piece in pieces for run in piece.runs) == prompt
    inside = [piece for piece in pieces if piece.use is not None]
    assert [prompt[p.runs[0].start : p.runs[-1].end] for p in inside] == PASSAGES[:3]
    for piece in inside:  # and each chunk's own counts are those of its runs
        assert piece.use is not None
        reused = sum(run.tokens for run in piece.runs if run.source in (TokenSource.REUSED, TokenSource.IN_PLACE))
        recomputed = sum(run.tokens for run in piece.runs if run.source is TokenSource.RECOMPUTED)
        assert (reused, recomputed) == (piece.use.reused, piece.use.recomputed)


def test_a_chunk_behind_its_own_prefix_is_exact(engine: Engine) -> None:
    head = engine.backbone.shared_prefix()
    report = engine.generate(head + PASSAGES[3] + "\n\nWho won?", max_new_tokens=1, method="naive").report
    assert report.chunks[0].in_place and report.token_sources is not None
    assert report.token_sources.counts()[TokenSource.IN_PLACE] == report.chunks[0].reused > 0


def test_numbers_carry_no_text(engine: Engine) -> None:
    """Logs, rows and responses are made of these."""
    report = ask(engine, *PASSAGES[:2])
    report.sources = {report.chunks[0].key: "secret.pdf"}
    for text in (json.dumps(report.as_dict()), repr(report), report.line):
        assert "lighthouse" not in text and "Who built it" not in text and "secret.pdf" not in text
    assert report.as_dict()["chunks"][0]["reused"] == report.chunks[0].reused


def test_a_log_line_is_one_line() -> None:
    report = Report("naive", 0.0, fallbacks=["full prefill: RuntimeError: first\nsecond", "chunk prefilled"])
    assert "\n" not in report.line
    assert "first second" in report.line and "chunk prefilled" in report.line


class Page(HTMLParser):
    """The tags of a page, the classes and text of its prompt."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append("text" if ("class", "text") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "text" in self._open and "small" not in self._open:
            self.text += data


def test_html_is_escaped(engine: Engine) -> None:
    report = ask(engine, HOSTILE, PASSAGES[0])
    assert len(report.chunks) == 2
    report.sources = {report.chunks[1].key: '<script>"x"</script>'}
    report.fallbacks = ["<script>y</script>"]
    page = Page(report._repr_html_())
    assert not {"script", "img"} & set(page.tags) and page.tags.count("style") == 1
    assert not any(name.startswith("on") for name in page.attributes)
    assert report.token_sources is not None and page.text == report.token_sources.prompt


def test_html_is_made_of_runs() -> None:
    report = made(runs=4000, chunks=20)
    page = report._repr_html_()
    assert (
        report.token_sources is not None and report.token_sources.tokens == 8000 and len(report.token_sources) == 4000
    )
    assert page.count("<span") < 4000 + 100
    assert page.count("<path") == 4  # one for each source there is, and the ticks
    assert len(page) < 400_000
    quiet = made(runs=1)
    assert quiet.token_sources is not None
    quiet.token_sources = TokenSources.of("word" * 8000, 4 * np.arange(8000), np.full(8000, TokenSource.REUSED))
    assert len(quiet._repr_html_()) < 8000 * 4 + 10_000


def test_an_empty_report_can_be_shown() -> None:
    report = Report("naive", 0.0)
    assert "naive" in report._repr_html_()
    assert report.plot().axes
    assert "naive" in terminal(report)


def terminal(report: Report) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="truecolor")
    console.print(report)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_tells_the_same_and_is_not_steered(engine: Engine) -> None:
    report = ask(engine, HOSTILE, PASSAGES[0])
    report.fallbacks.append("chunk \x1b[2J prefilled")
    report.full_prefill = 100 * report.ttft
    text = terminal(report)
    assert "\x1b[2J" not in text and "\x1b]0;" not in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b" not in plain
    assert "100.0x faster to the first token than a full prefill" in plain
    assert f"{report.cached_tokens:,} of {report.prompt_tokens:,} prompt tokens from cache" in plain
    assert f"recomputed {report.recomputed:,}" in plain
    assert "The lighthouse at Cape Morrow" in plain


def test_plot_draws_every_token_once(engine: Engine) -> None:
    report = ask(engine, HOSTILE, PASSAGES[0])
    figure = report.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows; and a document's $ is no formula
    strip = figure.axes[1]
    drawn = sum(box.width for bars in strip.collections for box in (path.get_extents() for path in bars.get_paths()))
    assert drawn == report.prompt_tokens
    chunks = figure.axes[2]
    assert sum(bar.get_width() for bar in chunks.patches) == sum(
        use.reused + use.recomputed + use.computed for use in report.chunks
    )


def test_a_full_prefill_is_estimated_or_measured() -> None:
    report = made(runs=30)  # 20 of each source, so 40 of 60 were computed in 0.9 s
    estimate = summary.full_prefill(report)
    assert estimate is not None and estimate == (pytest.approx(0.9 * 60 / 40), False)
    assert "about 1.4x faster" in summary.comparison(report)
    report.full_prefill = 0.5
    assert summary.comparison(report) == "no faster to the first token than a full prefill (0.50 s)"
    assert summary.full_prefill(Report("full", 1.0, prompt_tokens=9, fresh=9, seconds={"recompute": 1.0})) is None


def test_what_was_missed_is_explained(engine: Engine) -> None:
    unknown = ask(engine, "This text was never ingested, but it is as long as any chunk that is worth keeping.")
    assert any("not ingested" in reason for reason in summary.reasons(unknown))
    part = ask(engine, PASSAGES[0][:150])
    assert any("only in part" in reason for reason in summary.reasons(part))
    assert "only a part" in summary.remark(part.chunks[0])
    assert summary.reasons(ask(engine, *PASSAGES[:2])) == []


# ---- in a real browser ----------------------------------------------------------------------------------------------

BROWSER = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


def screenshot(page: Path, dark: bool) -> np.ndarray:
    """The page as a browser shows it to who prefers that theme, ``[height, width, 3]`` uint8."""
    from PIL import Image

    assert BROWSER is not None
    image = page.with_suffix(".png")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,700"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    subprocess.run([*command, f"--screenshot={image}", page.as_uri()], check=True, capture_output=True, timeout=120)
    return np.asarray(Image.open(image).convert("RGB"))


def share(image: np.ndarray, colour: str) -> float:
    """Of all points, those of this colour (``#rrggbb``)."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(image.astype(int) - wanted).max(axis=-1) <= 2).mean())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_it_looks_right_in_a_browser(engine: Engine, tmp_path: Path) -> None:
    report = ask(engine, HOSTILE, *PASSAGES[:3])
    page = tmp_path / "report.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{report._repr_html_()}", encoding="utf-8")
    light, dark = screenshot(page, dark=False), screenshot(page, dark=True)
    for image, ground in ((light, "#ffffff"), (dark, "#17191d")):
        assert share(image, ground) > 0.2
        for source in (TokenSource.REUSED, TokenSource.RECOMPUTED, TokenSource.FRESH):
            assert share(image, summary.COLOURS[source]) > 0.0005, source  # in the strip and the legend
        # something is written, in a colour that stands out: the hostile <style> hid nothing
        brightness = image.mean(axis=-1)
        assert ((brightness > 160) if image is dark else (brightness < 90)).mean() > 0.01
    assert share(dark, "#f3f5f7") < 0.001  # nothing of the light theme is left
