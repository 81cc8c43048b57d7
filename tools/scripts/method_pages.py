"""A page of the documentation for each method, made from its docstrings. A hook of mkdocs (see mkdocs.yml)."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

PARTS = {
    "encode": "At ingestion",
    "select": "Which tokens are recomputed",
    "recompute": "How they are recomputed",
    "attend": "How the context is weighed",
    "fit": "Which variant is placed",
    "exact": "Exact reuse",
}


def pages() -> dict[str, str]:
    """Markdown by file name, in the order of the table of methods."""
    from cacheclip_rag.methods import METHODS

    return {f"methods/{name}.md": page(method) for name, method in METHODS.items()}


def page(method: Any) -> str:
    """The recipe, then each of its parts: what it does and its parameters, as its docstring and fields say."""
    lines = [f"# {method.name}", "", f"`{method!r}`", "", f"Default recompute ratio: {method.recompute_ratio:g}.", ""]
    if method.positions != "global":
        lines += [f"Positions: {method.positions}.", ""]
    for name, title in PARTS.items():
        part = getattr(method, name)
        if part is None or (method.prefix_cache is not None and name != "exact"):
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
    """mkdocs calls this: the pages go into the navigation."""
    methods = next(page["Methods"] for section in config.nav for page in section.get("Inside", []) if "Methods" in page)
    methods += [{name.split("/")[1].removesuffix(".md"): name} for name in pages()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this: the pages are files that no folder holds."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files
