"""What every type in transformers' image-text-to-text mapping comes to: it works, or why not.

`python tests/matrix.py` tries all of them and writes docs/vlms.json, from which docs/write_vlms.py makes the
page. The suite tries one type of each kind of vision side and compares with that file.
"""

import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tiny_vlms
import torch
from torch import Tensor

from vugen_cli.card import LatentsCard
from vugen_cli.checkpoint import combined_digest, weight_digests
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.recipe import Expert, load_recipe
from vugen_cli.sampling.trained import load_sampler, new_expert, try_expert
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm
from vugen_cli.vlm.latents import check_grid
from vugen_cli.vlm.prefix import Prefix
from vugen_cli.vlm.prompts import Prompt

PROMPTS = ["a bear", "two apples to the left of a red car in a city at night", ""]
RESULTS = Path(__file__).parent.parent / "docs" / "vlms.json"
DIT = "expert.kind=dit"  # what an error says of a decoder that the copy cannot follow


def examine(model_type: str, folder: Path, scenes: Path | None = None) -> dict[str, Any]:
    """Build a tiny model of a type, load it as a user would, and run all that the method asks of it.

    Args:
        model_type: as transformers maps it.
        folder: to build in.
        scenes: a prepared data set: a step of both stages and a picture, too.
    """
    try:
        vlm = load_vlm(str(tiny_vlms.build(model_type, folder / model_type)))
        check_grid(vlm, 64)
        z = vlm.encode(torch.full((2, 3, 64, 64), 127, dtype=torch.uint8))
        found = {"tap": vlm.taps[0].name, "grid": list(z.shape[1:3]), "width": z.shape[3]}
        before = combined_digest(weight_digests(vlm.model))
        try:
            reads = check_expert(vlm, z, Expert())
            found = {"result": "works", **found}
        except VugenError as error:
            if DIT not in str(error):
                raise
            reads = check_expert(vlm, z, Expert(kind="dit", width=32, heads=2, depth=2))
            why = (
                reason(error, vlm.name)
                .removesuffix(f": set {DIT}")
                .removesuffix(", so no copy of its decoder can follow")
            )
            found = {"result": "works with `expert.kind: dit` only", **found, "reason": why}
        found["pictures"] = pictures(vlm, reads)
        if scenes:
            check_line(vlm.name, "dit" if "reason" in found else "copy", scenes, folder)
        assert combined_digest(weight_digests(vlm.model)) == before
        return found
    except VugenError as error:
        name = str(folder / model_type)
        return {"result": "refused", "reason": reason(error, name).removeprefix(f"({model_type}) ")}


def reason(error: Exception, name: str) -> str:
    """An error's line without the model's own name."""
    return str(error).replace(f"{name} ", "").replace("cannot be used: ", "")


def check_expert(vlm: FrozenVLM, z: Tensor, recipe: Expert) -> list[int] | None:
    """A padded batch gives prefix and velocities as each prompt does alone; gradients reach the expert.

    Returns:
        The layers whose inputs the expert reads; None: it reads keys and values.
    """
    side = min(4, *z.shape[1:3])
    latents = LatentsCard(channels=4, grid=(side, side), width=z.shape[3])
    torch.manual_seed(0)
    expert = new_expert(vlm, latents, recipe)
    try_expert(expert, vlm, latents)
    batch = vlm.prefix(PROMPTS, 40, hidden=expert.reads)
    for name, parameter in expert.named_parameters():
        if not parameter.any():  # zero at the start, which would hide what lies before
            torch.nn.init.normal_(parameter, std=0.1) if "weight" in name else None
    x, t = torch.randn(3, side, side, 4), torch.tensor([0.1, 0.5, 0.9])
    together = expert(x, t, batch)
    together.square().mean().backward()
    trained = [p.grad is not None and bool(p.grad.any()) for p in expert.parameters()]
    assert sum(trained) > len(trained) // 2
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            alone = vlm.prefix([prompt], hidden=expert.reads)
            length = int(alone.lengths)
            for mine, theirs in zip(batch.keys + batch.values, alone.keys + alone.values, strict=True):
                torch.testing.assert_close(mine[i, :, :length], theirs[0], atol=1e-5, rtol=1e-5)
            single = expert(x[i : i + 1], t[i : i + 1], alone)[0]
            torch.testing.assert_close(together[i], single, atol=1e-5, rtol=1e-5)
        other = expert(x, t, vlm.prefix(["a cat on a beach"] * 3, hidden=expert.reads))
    assert (other - together).abs().max() > 1e-6
    return expert.reads


def pictures(vlm: FrozenVLM, reads: Sequence[int] | None) -> str:
    """What becomes of prompts with a picture: `works`, or in one line why not.

    Works: in a padded batch each gives the prefix that it gives alone, and another picture gives another one.

    Args:
        vlm: of any type.
        reads: the layers whose inputs its expert reads; None: it reads keys and values.
    """
    one, two, three = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    prompts = [
        Prompt("put it in the snow", (one,)),
        "a bear",
        Prompt("two apples", (two,)),
        Prompt("", (two,)),
    ]
    try:
        batch = vlm.prefix(prompts, hidden=reads)
    except VugenError as error:
        return str(error).partition("cannot read pictures in a prompt: ")[2] or reason(error, vlm.name)
    for i, prompt in enumerate(prompts):
        alone = vlm.prefix([prompt], hidden=reads)
        length = int(alone.lengths)
        assert length == batch.lengths[i] and alone.first_free == batch.first_free[i]
        for mine, theirs in zip(states(batch), states(alone), strict=True):
            torch.testing.assert_close(mine[i, ..., :length, :], theirs[0], atol=5e-5, rtol=1e-5)
    other, alone = (vlm.prefix([Prompt("put it in the snow", (p,))], hidden=reads) for p in (three, one))
    assert not all(map(torch.equal, states(other), states(alone)))  # pictures are read
    return "works"


def states(prefix: Prefix) -> list[Tensor]:
    """What an expert reads of a prompt: [B, heads, T, d] or [B, T, d]."""
    return prefix.keys + prefix.values + prefix.hidden


def check_line(vlm: str, kind: str, scenes: Path, folder: Path) -> None:
    """A step of each stage and a picture, from the model's directory."""
    settings = ["decoder.channels=[8,16]", "decoder.heads=2", "decoder.middle_layers=1", "reducer.channels=4"]
    settings += [f"vlm={vlm}", "data.workers=0", "sampling.steps=2", f"expert.kind={kind}"]
    settings += ["expert.width=32", "expert.heads=2", "expert.depth=2"] if kind == "dit" else []
    for stage in ("train_reducer", "train_sampler"):
        settings += [
            f"{stage}.{s}" for s in ("steps=1", "batch_size=2", "precision=float32", "optimizer=adamw")
        ]
    recipe, cpu = load_recipe(None, settings), torch.device("cpu")
    reducer = train_reducer(recipe, scenes, folder / "reducer.safetensors", cpu)
    sampler = load_sampler(train_sampler(recipe, reducer, scenes, folder / "sampler.safetensors", cpu))
    ((_, _, image),) = sampler.sample(["a bear"])
    assert image.shape == (3, 64, 64)


def main(types: list[str]) -> None:
    """Examine some types, all by default, count parameters at full size, and keep what each came to."""
    import full_size
    from transformers import __version__
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"types": {}, "sizes": {}}
    broken = []
    data = tempfile.TemporaryDirectory()
    scenes = Path(data.name) / "scenes"
    write_dataset(OpenMojiScenes(8, "train", 64), scenes, "train", 64)
    for model_type in types or tiny_vlms.TYPES:
        begun = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = examine(model_type, Path(folder), scenes)
                kept["types"][model_type] = found | full_size.default(model_type)
            said = json.dumps(kept["types"][model_type])
        except Exception:  # a fault of ours: go on, and fail in the end
            broken.append(model_type)
            said = traceback.format_exc(limit=-3)
        print(f"{model_type}: {time.perf_counter() - begun:.1f} s, {said}", flush=True)
    for name in () if types else full_size.SIZES:
        kept["sizes"][name] = full_size.known(name)
        print(f"{name}: {kept['sizes'][name]}", flush=True)
    kept["transformers"] = __version__
    kept["types"] = {name: kept["types"][name] for name in tiny_vlms.TYPES if name in kept["types"]}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    if broken:
        sys.exit(f"neither works nor is refused: {', '.join(broken)}")


if __name__ == "__main__":
    main(sys.argv[1:])
