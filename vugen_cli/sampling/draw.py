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
from vugen_cli.processes import all_gather, barrier, broadcast, is_first, rank, world_size
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
        if file.is_dir():
            texts = [" ".join(_text(path).split()) for path in sorted(file.glob("[!.]*.txt"))]
            if not texts:
                raise VugenError(f"--prompts {file} holds no .txt: give a folder with a prompt in each")
        else:
            texts = [line.strip() for line in _text(file).split("\n")]
        prompts += [text for text in texts if text]
    if not prompts:
        raise VugenError('no prompt: say what to draw, as in `vugen sample "a bear in a forest"`')
    if any(p != encodable(p) for p in prompts):
        raise VugenError("a prompt is no UTF-8: set a UTF-8 locale, or give it in a file with --prompts")
    if any(not p.strip() for p in prompts):
        raise VugenError('a prompt is empty: say what to draw, as in `vugen sample "a bear in a forest"`')
    once = list(dict.fromkeys(p.strip() for p in prompts))
    if repeats := len(prompts) - len(once):
        print(f"{repeats} of {len(prompts)} prompts are repeats: each is drawn once")
    return once


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # some editors put a mark before the first prompt
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text in UTF-8"
        raise VugenError(f"--prompts {file}: {why}") from error


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
    listing is removed first, and the new one written last: a folder that has one is whole. Where a drawing
    did not finish, those of its pictures stay that this one would draw again, as what is written in them
    says. With `study`, the listing says that the pictures are none of the user's, who did not ask for them.

    Returns:
        The folder.

    Raises:
        VugenError: another process draws into the folder, it cannot be written, or as `Sampler.sample`.
    """
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    settings = sampler.settings(steps, guidance, solver, image_guidance)
    mine = range(rank(), len(prompts), world_size())
    rows = _rows(sampler, asked, mine, n, seed, settings, size)
    # Where a drawing did not finish, what it did draw.
    goes_on = broadcast((out / UNFINISHED).exists() and not (out / "samples.jsonl").exists())
    drawn = {key for key, row in rows.items() if goes_on and _said_by(out / row["file"]) == _said(row)}
    if drawn:
        print(f"{len(drawn)} pictures of a drawing that did not finish stay")
    there = {(k, i) for k, p in enumerate(mine) for i in range(n) if (p, i) in drawn}
    if any(p.pictures for p in asked) and not any(asked[p].pictures for p in mine):
        image_guidance = None  # others guide: this process has none to do it with
    images = sampler.sample(
        [asked[p] for p in mine], n, seed, steps, guidance, solver, image_guidance, size, there
    )
    shown: dict[tuple[int, int], torch.Tensor] = {}
    with _held(out):
        for p in mine:
            for name, picture in zip(rows[p, 0].get("sources", ()), asked[p].pictures, strict=True):
                (out / name).parent.mkdir(exist_ok=True)
                with whole_file(out / name) as temporary:
                    Image.fromarray(_pixels(picture)).save(temporary, format="PNG")
        for k, i, image in progress_bar(
            images, total=n * len(mine), initial=len(there), desc="sample", unit="img"
        ):
            with whole_file(out / rows[mine[k], i]["file"]) as temporary:
                temporary.write_bytes(png(image, rows[mine[k], i]))
                (out / UNFINISHED).touch()
            if mine[k] * n + i < GRID_IMAGES:
                shown[mine[k], i] = image
        for p, i in drawn:
            if p * n + i < GRID_IMAGES:
                with Image.open(out / rows[p, i]["file"]) as kept:
                    shown[p, i] = torch.from_numpy(np.array(kept)).permute(2, 0, 1)
        barrier(f"{out} drawn")
        for others_rows, others_shown in all_gather((rows, shown)):
            rows |= others_rows
            shown |= others_shown
        if is_first():
            labels = [asked[p].text for p, _ in sorted(shown)] if len(prompts) > 1 else None
            columns = n if len(prompts) > 1 and n > 1 else None
            save_grid(torch.stack([shown[key] for key in sorted(shown)]), out / "grid.png", columns, labels)
            of = {"study": True} if study else {}
            with whole_file(out / "samples.jsonl") as temporary:
                lines = "".join(json.dumps(rows[key] | of, ensure_ascii=False) + "\n" for key in sorted(rows))
                temporary.write_text(lines, encoding="utf-8")
        barrier(f"{out} listed")
    return out


def _rows(
    sampler: Sampler,
    asked: Sequence[Prompt],
    mine: Sequence[int],
    n: int,
    seed: int,
    settings: Sampling,
    size: Shape | None,
) -> dict[tuple[int, int], dict[str, Any]]:
    """What the listing says of each picture of some of the prompts, by the numbers of prompt and picture."""
    about = {
        "seed": seed,
        **settings.model_dump(mode="json", exclude={"image_guidance"}),
        "sampler": str(sampler.path),
        "step": sampler.card.step,
        "card": hashlib.sha256(sampler.card.model_dump_json().encode()).hexdigest()[:12],
        **({"size": shape_name(size)} if size else {}),
        **({"decoder": sampler.card.decoder} if sampler.card.decoder else {}),
        **({"adapters": sampler.card.adapters} if sampler.card.adapters else {}),
        "vlm": sampler.vlm.name,
        "dataset": sampler.card.data.dataset,
        "reference": sampler.card.data.path,
    }
    stems, rows = file_stems(asked), {}
    for p in mine:
        hashes = [hashlib.sha256(_pixels(picture).tobytes()).hexdigest() for picture in asked[p].pictures]
        sources = [f"sources/{digest[:12]}.png" for digest in hashes]
        guided = {"sources": sources, "image_guidance": settings.image_guidance} if sources else {}
        for i in range(n):
            name = f"{stems[p]}-{i:04d}.png"
            rows[p, i] = {"file": name, "prompt": asked[p].text, "index": i, **about, **guided}
    return rows


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
    for key, value in _said(about).items():
        text.add_itxt(key, value)
    file = BytesIO()
    Image.fromarray(_pixels(image)).save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def _said(about: dict[str, Any]) -> dict[str, str]:
    return {f"vugen:{key}": str(value) for key, value in about.items()}


def _said_by(file: Path) -> dict[str, str] | None:
    """What a picture says that it is; None where there is none."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            told = ((str(key), str(value)) for key, value in picture.info.items())
            return {key: value for key, value in told if key.startswith("vugen:")}
    except (OSError, ValueError, SyntaxError):  # Pillow's errors, of a damaged file too
        return None


def _pixels(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


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
