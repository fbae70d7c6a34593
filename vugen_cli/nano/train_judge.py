"""`vugen train-judge`: a network that reads scenes, trained on real ones and on no sampler's pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.checkpoint import fingerprint
from vugen_cli.data.loader import Batch, ShardedImages, held_out_images, training_batches
from vugen_cli.engine.loop import train
from vugen_cli.engine.stage import RunOptions, Stage
from vugen_cli.errors import VugenError
from vugen_cli.nano.caption_judge import tally
from vugen_cli.nano.reader import SIDES, Reading, SceneReader, load_reader, save_reader, told, verdicts
from vugen_cli.nano.vocabulary import COLORS, SETTING_NAMES, SUBJECT_NAMES, Scene
from vugen_cli.pictures import save_grid
from vugen_cli.processes import is_first
from vugen_cli.recipe import Recipe
from vugen_cli.sampling.trained import load_autoencoder
from vugen_cli.seeds import random_rows
from vugen_cli.vlm.frozen import vlm_of

SHIFT = 2  # pixels that a batch is moved by, at most, each way
BLURRED = 0.25  # shares of a batch that the lenient reader sees blurred and with noise,
RECONSTRUCTED = 0.125  # and reconstructed
NOISE = 25.0  # largest standard deviation, of 255
Reconstruct = Callable[[Tensor, Tensor], Tensor]  # images, 0 to 255, and noise as large: the same through z̃


def reading_loss(reading: Reading, scenes: list[Scene]) -> dict[str, Tensor]:
    """How far a reading of B pictures is from what they show, by what is read.

    Poisson's likelihood makes a missed subject dear, but hardly tells two from three: squares do.
    """
    device = reading.counts.device
    counts, settings = torch.zeros_like(reading.counts), []
    pairs: list[list[int]] = []  # row, first subject, second, side
    colours: list[list[int]] = []  # row, subject, colour
    for row, scene in enumerate(scenes):
        settings.append(SETTING_NAMES.index(scene["setting"]))
        subjects = [SUBJECT_NAMES.index(subject["name"]) for subject in scene["subjects"]]
        for number, subject in zip(subjects, scene["subjects"], strict=True):
            counts[row, number] = subject["count"]
            if subject["color"]:
                colours.append([row, number, list(COLORS).index(subject["color"])])
        if scene["relation"] in SIDES:
            pairs.append([row, *subjects, SIDES.index(scene["relation"])])
    losses = {
        "counts": (reading.counts - counts * reading.counts.clamp_min(1e-4).log()).sum(1).mean(),
        "number": 3 * (reading.counts - counts).square().sum(1).mean(),
        "setting": functional.cross_entropy(reading.settings, torch.tensor(settings, device=device)),
        # Of a batch that asks neither too: processes average them all.
        "side": reading.counts.new_zeros(()),
        "colour": reading.counts.new_zeros(()),
    }
    if pairs:
        rows, first, second, side = torch.tensor(pairs, device=device).unbind(1)
        chosen = Reading(*(values[rows] for values in reading))
        losses["side"] = functional.cross_entropy(chosen.sides(first, second), side)
    if colours:
        rows, subject, colour = torch.tensor(colours, device=device).unbind(1)
        losses["colour"] = functional.cross_entropy(reading.colours[rows, subject], colour)
    return losses


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Real scenes a little lighter or darker, redder or bluer, and moved: float [B, 3, S, S], 0 to 255."""
    gain = 1 + 0.1 * (2 * random_rows(torch.rand, (len(images), 3, 1, 1), generator) - 1)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator, device=generator.device).tolist()
    size = images.shape[-1]
    padded = functional.pad(images.float(), (SHIFT,) * 4, mode="replicate")
    return (padded[..., down : down + size, right : right + size] * gain).clamp(0, 255)


def blurred(images: Tensor, share: Tensor, grain: Tensor) -> Tensor:
    """Scenes blurred, and with noise.

    Args:
        images: float [B, 3, S, S], 0 to 255.
        share: of the blur of two pixels, and of the largest noise, [B, 2] from 0 to 1.
        grain: standard normal noise, shaped as the images.
    """
    size = images.shape[-1]
    far = functional.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    far = functional.interpolate(far, size=(size, size), mode="bilinear")
    blur, noise = share[..., None, None, None].unbind(1)
    return (torch.lerp(images, far, blur) + NOISE * noise * grain).clamp(0, 255)


def reconstructing(reducer: Path, device: torch.device) -> tuple[Reconstruct, str]:
    """What passes pictures through a checkpoint's VLM, reducer and decoder; and what those weights are.

    Args:
        reducer: checkpoint of a reducer or a sampler.
        device: where to run.
    """
    autoencoder, _, card = load_autoencoder(reducer, device)
    vlm = vlm_of(card, reducer, None, device, False)

    @torch.no_grad()
    def through(images: Tensor, noise: Tensor) -> Tensor:
        latents = autoencoder.encode(vlm, images.round().to(torch.uint8))
        return autoencoder.decode(latents, noise).to(images)

    return through, fingerprint(autoencoder, "autoencoder.")


class JudgeTraining(nn.Module):
    """The reader and its loss.

    Args:
        reader: to be trained.
        reconstruct: makes it lenient: a part of each batch is reconstructed, another blurred. None: strict.
    """

    def __init__(self, reader: SceneReader, reconstruct: Reconstruct | None):
        super().__init__()
        self.reader, self.reconstruct = reader, reconstruct

    def loss(self, batch: Batch, generator: torch.Generator, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of `reading_loss`, on the scenes as the judge shall know them."""
        images = varied(batch.images, generator)
        if self.reconstruct:
            grain = random_rows(torch.randn, images.shape, generator)
            share = random_rows(torch.rand, (len(images), 2), generator)
            first = max(1, round(RECONSTRUCTED * len(images)))
            last = first + round(BLURRED * len(images))
            soft = blurred(images[first:last], share[first:last], grain[first:last])
            images = torch.cat([self.reconstruct(images[:first], grain[:first]), soft, images[last:]])
        values = reading_loss(self.reader(images), [meta["scene"] for meta in batch.meta])
        return torch.stack(list(values.values())).sum(), values


def reading_accuracy(reader: SceneReader, images: ShardedImages, count: int = 2000) -> dict[str, float]:
    """Shares of scenes that are read right, by group, as `seen_subject`; and the scenes of each group."""
    pictures, scenes = [], []
    for pixels, meta in images.in_order(count):
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
        scenes.append(meta["scene"])
    scores: dict[str, float] = {}
    for group, asked in tally(scenes, verdicts(reader, torch.stack(pictures), scenes)).items():
        scores |= {f"{group}_{what}": sum(right) / len(right) for what, right in asked.items()}
        scores[f"{group}_scenes"] = len(asked.get("subject", []))  # which is asked of each
    return scores


def train_judge(
    recipe: Recipe,
    data: str | Path,
    out: Path,
    device: torch.device,
    options: RunOptions = RunOptions(),
    reducer: Path | None = None,
    init: str | None = None,
) -> dict[str, float]:
    """Train a reader of scenes and save it; its run is kept in `<out without suffix>.run`.

    Args:
        recipe: its `train_judge` section.
        data: OpenMoji scenes, whose meta says what they show.
        out: the safetensors file to write.
        device: where to train.
        options: of the command line.
        reducer: train a lenient reader: on what this checkpoint reconstructs too, and on blurred scenes.
        init: a reader to start from: a file, `strict` or `lenient`.

    Returns:
        `reading_accuracy` on the `val` split if the set has one, else {}.

    Raises:
        VugenError: the data are no scenes, or there is no such reducer or reader.
    """
    out = out.absolute()
    images = ShardedImages(data)
    images.refuse_shapes("but a judge reads squares: prepare them with --size")
    if not all(meta.get("scene") for _, meta in images.in_order(1)):
        raise VugenError(
            f"{data} does not say what its pictures show: a judge learns from what "
            "`vugen prepare --dataset openmoji` writes"
        )
    torch.manual_seed(recipe.seed)
    reader = (load_reader(init) if init else SceneReader()).train().to(device)
    begun = {"init": fingerprint(reader)} if init else {}
    through = None
    if reducer:
        through, begun["reducer"] = reconstructing(reducer, device)
    training = JudgeTraining(reader, through)
    shown = held_out_images(images, images.size, 16)

    @torch.no_grad()
    def preview(path: Path) -> None:
        reading = Reading(*(values.cpu() for values in reader(shown.to(device))))
        save_grid(shown, path, labels=[told(reading, row) for row in range(len(shown))])

    # Never mirrored: a scene may say left or right.
    stream = training_batches(images, recipe, recipe.train_judge.batch_size, flip=False)
    resolved = {
        "recipe": recipe.model_dump(mode="json", include={"seed", "train_judge"}),
        "data": images.card().model_dump(mode="json"),
        "reducer": reducer.name if reducer else "",
        "init": init or "",
        **({"weights": begun} if begun else {}),  # files of those names may be others when a run goes on
    }
    stage = Stage("judge", training, training.loss, preview, resolved, partial=True)
    train(stage, stream, recipe.train_judge, recipe, out.with_suffix(".run"), device, options)
    if is_first():
        save_reader(reader, out, json.dumps(resolved, sort_keys=True))
    held_out = "val" in images.manifest.splits and is_first()
    return reading_accuracy(reader, ShardedImages(data, "val")) if held_out else {}
