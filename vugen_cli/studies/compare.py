"""One page with what several samplers draw for the same prompts and seeds (the paper's Figure 4)."""

import base64
import html
import re
from pathlib import Path
from string import Template

from vugen_cli.errors import VugenError
from vugen_cli.files import whole_file
from vugen_cli.metrics.samples import DrawnImage, read_samples

PAGE = Path(__file__).with_name("compare.html")

Shown = tuple[DrawnImage, Path]  # a line of samples.jsonl, and its picture


def read_shown(folder: Path) -> list[Shown]:
    """What `vugen sample` left in a folder.

    Raises:
        VugenError: there is no `samples.jsonl`, it is not what `vugen sample` writes, or a picture is gone.
    """
    listing = folder / "samples.jsonl"
    if not listing.is_file():
        raise VugenError(f"{folder} holds no samples.jsonl: give a folder that `vugen sample` wrote")
    shown = [(sample, folder / sample.file) for sample in read_samples(folder)]
    if gone := [path.name for _, path in shown if not path.is_file()]:
        raise VugenError(f"{folder} lacks {gone[0]}, which its samples.jsonl lists: draw it again")
    return shown


def write_comparison(sources: dict[str, list[Shown]], out: Path) -> int:
    """Write the page: a section a prompt, the sources side by side. It needs no other file and no network.

    Args:
        sources: what each sampler drew, by the name to show.
        out: the HTML file.

    Returns:
        The number of prompts that all sources have.

    Raises:
        VugenError: they have no prompt in common.
    """
    first, *others = (dict.fromkeys(sample.asked for sample, _ in shown) for shown in sources.values())
    common = [asked for asked in first if any(asked) and all(asked in other for other in others)]
    if not common:
        raise VugenError(f"{' and '.join(sources)} have no prompt in common: draw the same prompts with each")
    sections = []
    for asked in common:
        columns = [
            f"<div><h3>{html.escape(name)}</h3><div class=pictures>"
            + "".join(_figure(sample, path) for sample, path in shown if sample.asked == asked)
            + "</div></div>"
            for name, shown in sources.items()
        ]
        given = _given(next(each for each in next(iter(sources.values())) if each[0].asked == asked))
        title = html.escape(asked[0] or "variations")
        sections.append(f"<section><h2>{title}</h2><div class=side>{given}{''.join(columns)}</div></section>")
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{len(sources)} samplers, {len(common)} prompts"),
        about="; ".join(html.escape(_settings(name, shown[0][0])) for name, shown in sources.items()),
        sections="\n".join(sections),
    )
    with whole_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return len(common)


def _given(shown: Shown) -> str:
    """The pictures of a prompt, as a column before what was drawn."""
    sample, path = shown
    figures = [_picture(path.parent / name, "source") for name in sample.sources]
    return f"<div><h3>given</h3><div class=pictures>{''.join(figures)}</div></div>" if figures else ""


def names_of(paths: list[Path]) -> list[str]:
    """A short name for each path, and a longer one for those that would be alike."""
    short = [path.stem if path.is_file() else path.resolve().name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def folder_name(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "sampler"


def _figure(sample: DrawnImage, path: Path) -> str:
    seed, index = ("?" if each is None else each for each in (sample.seed, sample.index))
    return _picture(path, f"seed {seed}, image {index}", sample.prompt or "")


def _picture(path: Path, label: str, prompt: str = "") -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    label = html.escape(label, quote=True)
    alt = html.escape(f"{prompt}, {label}" if prompt else label, quote=True)
    image = f'<img src="data:image/png;base64,{data}" alt="{alt}">'
    return f"<figure>{image}<figcaption>{label}</figcaption></figure>"


def _settings(name: str, sample: DrawnImage) -> str:
    settings = {
        "steps": sample.steps,
        "guidance": sample.guidance,
        "image guidance": sample.image_guidance,
        "solver": sample.solver,
    }
    said = [f"{key} {value}" for key, value in settings.items() if value is not None]
    if sample.step is not None:
        said.insert(0, f"trained to step {sample.step}")
    return f"{name}: {sample.sampler or 'samples'} ({', '.join(said)})"
