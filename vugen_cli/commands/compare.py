"""`vugen compare`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer, DeviceOption
from vugen_cli.errors import VugenError


def compare(
    sources: Annotated[list[Path], typer.Argument(help="Samplers, or folders that `vugen sample` wrote.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What the samplers draw. Repeatable.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="More prompts: a text file, one a line.")] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Images of each prompt.", show_default="4")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same for all samplers.", show_default="0")
    ] = None,
    vlm: Annotated[
        str | None, typer.Option(help="Where the VLM is now, if not where the checkpoints say.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    device: DeviceOption = None,
) -> Answer:
    """Set several samplers side by side on one page: the same prompts, the same seeds.

    The page holds its pictures and needs no network. Samplers draw into a folder beside it; folders are shown
    as they are. Without --prompt, samplers draw the prompts of the first folder.

    \b
    Examples:
      vugen compare sampler.safetensors baseline.safetensors --prompt "a bear in a forest"
      vugen compare samples-monday samples-tuesday --out week.html
    """
    from vugen_cli.commands.answers import Compared
    from vugen_cli.engine.device import pick_device
    from vugen_cli.hub import INDEX, PREFIX
    from vugen_cli.sampling.draw import collect_prompts, draw
    from vugen_cli.sampling.trained import load_sampler
    from vugen_cli.studies.compare import folder_name, names_of, read_shown, write_comparison
    from vugen_cli.vlm.prompts import refuse_places

    remote = [path for path in sources if str(path).startswith(PREFIX)]
    if missing := [path for path in sources if path not in remote and not path.exists()]:
        raise VugenError(f"no {missing[0]}: give samplers, or folders of samples")
    folders = [path for path in sources if path.is_dir() and not (path / INDEX).is_file()]
    if len({path.resolve() for path in sources}) < len(sources):
        raise VugenError("the same sampler or folder is given twice")
    given_for = {"--prompt": prompt, "--prompts": prompts, "-n": n, "--seed": seed, "--vlm": vlm}
    unread = [option for option, value in given_for.items() if value not in (None, [])]
    if len(folders) == len(sources) and unread:
        raise VugenError(f"{unread[0]} is for samplers to draw with, and these are all folders")
    if out.is_dir() or (not out.suffix and len(folders) < len(sources)):  # a folder has the stem
        raise VugenError(f"--out {out}: give the name of a page, as week.html")
    drawn_before = {path: read_shown(path) for path in folders}
    given = list(prompt or [])
    if folders and not given and not prompts:
        first = drawn_before[folders[0]]
        given = [sample.prompt for sample, _ in first if sample.prompt and not sample.sources]
        if first and not given and len(folders) < len(sources):
            raise VugenError(f"{folders[0]} holds edits alone, which samplers do not draw here: give folders")
    texts = collect_prompts(given, prompts) if len(folders) < len(sources) else []
    refuse_places(texts, "leave it out")
    shown = {}
    for number, (path, name) in enumerate(zip(sources, names_of(sources), strict=True)):
        if path in folders:
            shown[name] = drawn_before[path]
            continue
        samples = out.with_suffix("") / f"{number}-{folder_name(name)}"
        draw(load_sampler(path, vlm, pick_device(device)), texts, n or 4, samples, seed or 0, study=True)
        shown[name] = read_shown(samples)
    count = write_comparison(shown, out)
    typer.echo(f"wrote {out}: {len(shown)} side by side, {count} prompts")
    return Compared(out=str(out), sources=list(shown), prompts=count)
