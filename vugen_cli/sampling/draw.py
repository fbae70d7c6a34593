"""What `vugen sample` does around the sampler: prompts in, a folder of pictures out."""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vugen_cli.checkpoint import read_card
from vugen_cli.data.sample import encodable
from vugen_cli.data.shapes import Shape, shape_name
from vugen_cli.errors import VugenError
from vugen_cli.files import bundle, locked, whole_file
from vugen_cli.flow import Solver
from vugen_cli.metrics.samples import UNFINISHED
from vugen_cli.pictures import save_grid
from vugen_cli.processes import all_gather, barrier, is_first, rank, world_size
from vugen_cli.progress import progress_bar
from vugen_cli.recipe import Sampling
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.vlm.prompts import Prompt

GRID_IMAGES = 64  # more would not be looked at


def collect_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts from the command line and from a file, in order, without repeats.

    Args:
        given: prompts.
        file: a text file of a prompt a line, or a folder of `.txt` files, each one prompt, in order of name.

    Raises:
        VugenError: no prompt, an empty one, or an unreadable file.
    """
    prompts = list(given)
    if file is not None:
        try:
            if file.is_dir():
                texts = [" ".join(_text(path).split()) for path in sorted(file.glob("*.txt"))]
                if not texts:
                    raise VugenError(f"--prompts {file} holds no .txt: give a folder with a prompt in each")
            else:
                texts = [line.strip() for line in _text(file).split("\n")]
            prompts += [text for text in texts if text]
        except (OSError, UnicodeDecodeError) as error:
            raise VugenError(
                f"--prompts {file}: {getattr(error, 'strerror', None) or 'not a text file'}"
            ) from error
    if not prompts:
        raise VugenError('no prompt: say what to draw, as in `vugen sample "a bear in a forest"`')
    if any(p != encodable(p) for p in prompts):
        raise VugenError("a prompt is no UTF-8: set a UTF-8 locale, or give it in a file with --prompts")
    if any(not p.strip() for p in prompts):
        raise VugenError('a prompt is empty: say what to draw, as in `vugen sample "a bear in a forest"`')
    return list(dict.fromkeys(p.strip() for p in prompts))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig")  # some editors put a mark before the first prompt


def pick_sampler(given: Path | None) -> Path:
    """The sampler asked for, else the newest in the working directory, else the bundled one; says which."""
    if given is not None:
        return given
    dated = []
    for path in Path().glob("[!.]*.safetensors"):  # hidden ones are still being written
        with contextlib.suppress(OSError):  # a link to nothing, or gone meanwhile
            dated.append((path.stat().st_mtime, path))
    for _, path in sorted(dated, reverse=True):
        try:
            if read_card(path).stage == "sampler":
                print(f"sampler: {path}, the newest here")
                return path
        except VugenError:
            continue
    path = bundle("sampler.safetensors")
    if not path.is_file():
        raise VugenError("no sampler here: train one with `vugen train-sampler`, or pass --sampler FILE")
    print("sampler: the bundled one (nano, OpenMoji scenes)")
    return path


def draw(
    sampler: Sampler,
    prompts: Sequence[str | Prompt],
    n: int,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    solver: Solver | None = None,
    image_guidance: float | None = None,
    size: Shape | None = None,
    study: bool = False,
) -> Path:
    """Draw n pictures for each prompt into a folder; the processes of a job share the prompts out.

    Writes `<prompt>-<hash>-<index>.png` with PNG text metadata, `grid.png` (the first 64) and
    `samples.jsonl`, one line a picture: file, prompt, index, seed, settings, checkpoint, and the data set to
    compare with. The pictures of a prompt go into the folder `sources`, as the VLM saw them. An earlier
    listing is removed first, and the new one written last: a folder that has one is whole. With `study`, it
    says that the pictures are none of the user's, who did not ask for these prompts.

    Returns:
        The folder.

    Raises:
        VugenError: another process draws into the folder, it cannot be written, or as `Sampler.sample`.
    """
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    settings = sampler.settings(steps, guidance, solver, image_guidance)
    about = {
        "seed": seed,
        **settings.model_dump(mode="json", exclude={"image_guidance"}),
        "sampler": str(sampler.path),
        "step": sampler.card.step,
        **({"size": shape_name(size)} if size else {}),
        **({"decoder": sampler.card.decoder} if sampler.card.decoder else {}),
        **({"adapters": sampler.card.adapters} if sampler.card.adapters else {}),
        "vlm": sampler.vlm.name,
        "dataset": sampler.card.data.dataset,
        "reference": sampler.card.data.path,
    }
    stems = file_stems(asked)
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    shown: dict[tuple[int, int], torch.Tensor] = {}
    mine = range(rank(), len(prompts), world_size())
    if any(p.pictures for p in asked) and not any(asked[p].pictures for p in mine):
        image_guidance = None  # others guide: this process has none to do it with
    images = sampler.sample([asked[p] for p in mine], n, seed, steps, guidance, solver, image_guidance, size)
    with _held(out):
        with_sources = {p: _save_sources(asked[p], out, settings) for p in mine if asked[p].pictures}
        for p, i, image in progress_bar(
            ((mine[p], i, image) for p, i, image in images),
            total=n * len(mine),
            desc="sample",
            unit="img",
        ):
            name = f"{stems[p]}-{i:04d}.png"
            row = {"file": name, "prompt": asked[p].text, "index": i, **about, **with_sources.get(p, {})}
            rows[p, i] = {**row, "study": True} if study else row
            with whole_file(out / name) as temporary:
                temporary.write_bytes(png(image, row))
            if p * n + i < GRID_IMAGES:
                shown[p, i] = image
        barrier(f"{out} drawn")
        for others_rows, others_shown in all_gather((rows, shown)):
            rows |= others_rows
            shown |= others_shown
        if is_first():
            labels = [asked[p].text for p, _ in sorted(shown)] if len(prompts) > 1 else None
            columns = n if len(prompts) > 1 and n > 1 else None
            save_grid(torch.stack([shown[key] for key in sorted(shown)]), out / "grid.png", columns, labels)
            with whole_file(out / "samples.jsonl") as temporary:
                lines = "".join(json.dumps(rows[key], ensure_ascii=False) + "\n" for key in sorted(rows))
                temporary.write_text(lines, encoding="utf-8")
        barrier(f"{out} listed")
    return out


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold a folder against other drawings, from before its first picture to its listing."""
    busy = f"another process is drawing into {out}: wait for it or choose another --out"
    with locked(out, busy) if is_first() else contextlib.nullcontext():
        if is_first():
            with contextlib.suppress(FileNotFoundError):
                (out / "samples.jsonl").replace(out / UNFINISHED)
        barrier(f"{out} held")
        yield
        if is_first():
            (out / UNFINISHED).unlink(missing_ok=True)


def png(image: torch.Tensor, about: dict[str, Any]) -> bytes:
    """A picture, uint8 [3, H, W], as a PNG file that says in its text chunks (`vugen:...`) what it is."""
    text = PngInfo()
    for key, value in about.items():
        text.add_itxt(f"vugen:{key}", str(value))
    file = BytesIO()
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def _save_sources(prompt: Prompt, out: Path, settings: Sampling) -> dict[str, Any]:
    """Write a prompt's pictures into `out/sources` and return what a line of `samples.jsonl` says of them."""
    (out / "sources").mkdir(exist_ok=True)
    names = []
    for picture in prompt.pictures:
        pixels = np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())
        names.append(f"sources/{hashlib.sha256(pixels.tobytes()).hexdigest()[:12]}.png")
        with whole_file(out / names[-1]) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
    return {"sources": names, "image_guidance": settings.image_guidance}


def file_stems(prompts: Sequence[str | Prompt]) -> list[str]:
    """Readable file names of prompts; a hash keeps long or similar ones apart, a longer one if it must."""
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    stems = {prompt.key: _file_stem(prompt, 6) for prompt in asked}
    alike = Counter(stems.values())
    return [_file_stem(p, 12) if alike[stems[p.key]] > 1 else stems[p.key] for p in asked]


def _file_stem(prompt: Prompt, digits: int) -> str:
    nameless = "variation" if prompt.pictures else "prompt"
    words = re.sub(r"[^a-z0-9]+", "-", prompt.text.lower()).strip("-")[:60].strip("-") or nameless
    return f"{words}-{hashlib.sha256(prompt.key.encode()).hexdigest()[:digits]}"
