"""One page with what several samplers draw for the same prompts and seeds (the paper's Figure 4)."""

import base64
import html
import re
from pathlib import Path
from string import Template
from typing import Any

from vugen_cli.errors import VugenError
from vugen_cli.files import whole_file
from vugen_cli.metrics.image_sets import read_jsonl, sample_files

PAGE = Path(__file__).with_name("compare.html")

Row = dict[str, Any]  # a line of samples.jsonl, with `path` of its picture


def read_samples(folder: Path) -> list[Row]:
    """What `vugen sample` left in a folder.

    Raises:
        VugenError: there is no `samples.jsonl`, it is not what `vugen sample` writes, or a picture is gone.
    """
    listing = folder / "samples.jsonl"
    if not listing.is_file():
        raise VugenError(f"{folder} holds no samples.jsonl: give a folder that `vugen sample` wrote")
    sample_files(folder)  # refuses names that lead out of the folder
    rows = [{**row, "path": folder / row["file"]} for row in read_jsonl(listing)]
    if gone := [row["file"] for row in rows if not row["path"].is_file()]:
        raise VugenError(f"{folder} lacks {gone[0]}, which its samples.jsonl lists: draw it again")
    return rows


def write_comparison(sources: dict[str, list[Row]], out: Path) -> int:
    """Write the page: a section a prompt, the sources side by side. It needs no other file and no network.

    Args:
        sources: rows of each sampler, by the name to show.
        out: the HTML file.

    Returns:
        The number of prompts that all sources have.

    Raises:
        VugenError: they have no prompt in common.
    """
    prompts = [row["prompt"] for row in next(iter(sources.values()))]
    common = [
        prompt
        for prompt in dict.fromkeys(prompts)
        if all(any(row["prompt"] == prompt for row in rows) for rows in sources.values())
    ]
    if not common:
        raise VugenError(f"{' and '.join(sources)} have no prompt in common: draw the same prompts with each")
    sections = []
    for prompt in common:
        columns = [
            f"<div><h3>{html.escape(name)}</h3><div class=pictures>"
            + "".join(_figure(row) for row in rows if row["prompt"] == prompt)
            + "</div></div>"
            for name, rows in sources.items()
        ]
        sections.append(
            f"<section><h2>{html.escape(prompt)}</h2><div class=side>{''.join(columns)}</div></section>"
        )
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{len(sources)} samplers, {len(common)} prompts"),
        about="; ".join(html.escape(_settings(name, rows[0])) for name, rows in sources.items()),
        sections="\n".join(sections),
    )
    with whole_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return len(common)


def names_of(paths: list[Path]) -> list[str]:
    """A short name for each path, and a longer one for those that would be alike."""
    short = [path.stem if path.is_file() else path.name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def folder_name(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "sampler"


def _figure(row: Row) -> str:
    data = base64.b64encode(row["path"].read_bytes()).decode()
    label = html.escape(f"seed {row.get('seed', '?')}, image {row.get('index', '?')}", quote=True)
    alt = html.escape(f"{row['prompt']}, {label}", quote=True)
    image = f'<img src="data:image/png;base64,{data}" alt="{alt}">'
    return f"<figure>{image}<figcaption>{label}</figcaption></figure>"


def _settings(name: str, row: Row) -> str:
    said = [f"{key} {row[key]}" for key in ("step", "steps", "guidance", "solver") if key in row]
    return f"{name}: {row.get('sampler', 'samples')} ({', '.join(said)})".replace(
        "(step ", "(trained to step "
    )
