"""Generates the documentation of methods from their table: a page per method, and the overview in docs/methods.md.

    python tools/scripts/method_pages.py          write the overview
    python tools/scripts/method_pages.py --check  fail if it differs from the table of methods

The pages are generated while the site is built: this is a hook of mkdocs (see mkdocs.yml).
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

PARTS = {
    "encode": "At ingestion",
    "select": "Which tokens are recomputed",
    "recompute": "How they are recomputed",
    "attend": "How the context is attended to",
    "fit": "Which variant is used",
    "prefix_cache": "Prefix caching",
}


PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- methods: written by tools/scripts/method_pages.py -->", "<!-- /methods -->"


def overview() -> str:
    """One row per method: its name, what it does, and its default ratio."""
    from cacheclip_rag.methods import METHODS

    rows = ["| name | what it does (source) | default ratio |", "|---|---|---|"]
    for name, method in METHODS.items():
        ratio = "–" if method.strategy in ("full", "prefix") else f"{method.recompute_ratio:g}"
        if method.fitted_ratio is not None:
            ratio += f" to {method.fitted_ratio:g}"
        rows.append(f"| `{name}` | {method.about} | {ratio} |")
    return "\n".join(rows)


def main(check: bool) -> int:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    now = f"{before}{BEGIN}\n\n{overview()}\n\n{END}{rest.partition(END)[2]}"
    if check and now != page:
        print("docs/methods.md is out of date: python tools/scripts/method_pages.py")
        return 1
    PAGE.write_text(now, encoding="utf-8")
    return 0


def pages() -> dict[str, str]:
    """Markdown by file name, in the order of the table of methods."""
    from cacheclip_rag.methods import METHODS

    return {f"methods/{name}.md": page(method) for name, method in METHODS.items()}


def page(method: Any) -> str:
    """The method, then each of its parts with its docstring and the values of its parameters."""
    lines = [
        f"# {method.name}",
        "",
        f"{method.about[:1].upper()}{method.about[1:]}.",
        "",
        f"`{method!r}`",
        "",
        f"Default recompute ratio: {method.recompute_ratio:g}.",
        "",
    ]
    if method.positions != "global":
        lines += [f"Positions: {method.positions}.", ""]
    for name, title in PARTS.items():
        part = getattr(method, name)
        if part is None or (method.prefix_cache is not None and name != "prefix_cache"):
            continue
        lines += [f"## {title}: {type(part).__name__}", "", inspect.getdoc(type(part)) or "", ""]
        if fields := dataclasses.fields(part):
            lines += ["| parameter | here |", "|---|---|"]
            lines += [f"| `{field.name}` | `{getattr(part, field.name)!r}` |" for field in fields]
            lines.append("")
    lines += [f'```python\nengine.generate(prompt, method="{method.name}")\n```', ""]
    lines.append("[All methods](../methods.md)")
    return "\n".join(lines)


def on_config(config: Any) -> Any:
    """Called by mkdocs: adds the pages to the navigation."""
    methods = next(page["Methods"] for section in config.nav for page in section.get("Inside", []) if "Methods" in page)
    methods += [{name.split("/")[1].removesuffix(".md"): name} for name in pages()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: adds the pages as generated files."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
