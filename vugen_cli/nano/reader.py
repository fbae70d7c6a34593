"""A small network that reads a scene from its picture: an independent judge of what samplers draw.

It shares no weight and no feature with the VLM that a sampler was trained beside, and it is never shown a
sampler's picture. A picture is read at 64 px as 8 x 8 places. At each place the network says how much of
a subject begins there and which one it is; the sums of those maps are the numbers of the subjects, and their
centres of mass say where the subjects stand.

Two are bundled. The strict one was trained on real scenes only: what no real scene has may confuse it. The
lenient one was trained on reconstructions and on blurred and noisy scenes too: it asks what is shown, not
how cleanly.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.checkpoint import load_tensors, save_tensors
from vugen_cli.errors import VugenError
from vugen_cli.files import bundle
from vugen_cli.nano.vocabulary import COLORS, NUMBERS, SETTING_NAMES, SUBJECT_NAMES, Scene

SIZE = 64  # pixels a side at which pictures are read
WIDTHS = 56, 80  # channels of the grids of 16 x 16 and 8 x 8 places
SIDES = ("to the left of", "to the right of", "above", "below")
JUDGES = ("strict", "lenient")
BATCH = 64


class Reading(NamedTuple):
    """What is read from a batch of B pictures.

    Attributes:
        counts: how many there are of each subject [B, subjects], not rounded.
        centres: where each subject stands [B, subjects, 2], (x, y) from -1 (left, top) to 1.
        colours: logits of the named colours of each subject [B, subjects, colours].
        settings: logits [B, settings].
    """

    counts: Tensor
    centres: Tensor
    colours: Tensor
    settings: Tensor

    def sides(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits of `SIDES`, how the first subject stands to the second [B, 4].

        Args:
            first, second: numbers of subjects [B].
        """
        rows = torch.arange(len(first), device=first.device)
        x, y = (self.centres[rows, first] - self.centres[rows, second]).unbind(1)
        return 8 * torch.stack([-x, x, -y, y], 1)

    def side(self, row: int, first: int, second: int) -> str:
        """Which of `SIDES` it is, in one picture."""
        one = Reading(*(values[row : row + 1] for values in self))
        return SIDES[int(one.sides(torch.tensor([first]), torch.tensor([second])).argmax())]

    def there(self, row: int) -> list[int]:
        """Numbers of the subjects of one picture, the most first."""
        counts = self.counts[row]
        return [i for i in counts.argsort(descending=True).tolist() if counts[i] > 0.5]


class Block(nn.Module):
    """A residual block of two convolutions [B, c, h, w]."""

    def __init__(self, width: int):
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(second.weight)
        self.layers = nn.Sequential(nn.GroupNorm(8, width), first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, c, h, w]."""
        return x + self.layers(x)


class SceneReader(nn.Module):
    """Pictures to a `Reading`; 0.4 million weights."""

    def __init__(self) -> None:
        super().__init__()
        fine, coarse = WIDTHS
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, fine, 3, stride=2, padding=1),  # [B, fine, 16, 16]
            Block(fine),
            Block(fine),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1),  # [B, coarse, 8, 8]
            Block(coarse),
            Block(coarse),
            nn.GroupNorm(8, coarse),
            nn.ReLU(),
        )
        self.amount = nn.Conv2d(coarse, 1, 1)
        self.subject = nn.Conv2d(coarse, len(SUBJECT_NAMES), 1)
        self.colour = nn.Conv2d(coarse, len(COLORS), 1)
        self.setting = nn.Linear(coarse, len(SETTING_NAMES))
        assert self.amount.bias is not None
        nn.init.constant_(self.amount.bias, -4.0)  # one or two subjects on 64 places

    def forward(self, images: Tensor) -> Reading:
        """uint8 [B, 3, H, W] -> Reading."""
        x = images.float()
        if x.shape[-2:] != (SIZE, SIZE):
            x = functional.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        features = self.trunk(x / 127.5 - 1)
        amount = functional.softplus(self.amount(features).float())  # [B, 1, 8, 8]
        maps = (amount * self.subject(features).float().softmax(1)).flatten(2)  # [B, subjects, 64]
        counts = maps.sum(2)
        shares = maps / counts[..., None].clamp_min(1e-6)
        side = torch.linspace(-1, 1, features.shape[-1], device=x.device)
        places = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).flatten(0, 1)  # [64, (x, y)]
        colours = shares @ self.colour(features).float().flatten(2).transpose(1, 2)
        return Reading(counts, shares @ places, colours, self.setting(features.mean((2, 3))).float())


def save_reader(reader: SceneReader, path: Path, about: str) -> None:
    """Write a reader's weights in half precision.

    Args:
        reader: trained.
        path: of the safetensors file.
        about: JSON for the file's header: what it was trained on.
    """
    save_tensors(
        path, {name: weight.half() for name, weight in reader.state_dict().items()}, {"judge": about}
    )


def load_reader(path: str | Path) -> SceneReader:
    """A trained reader.

    Args:
        path: written by `vugen train-judge`, or `strict` or `lenient` for a bundled one.

    Raises:
        VugenError: there is no such file, or it holds something else.
    """
    file = bundle(f"judge-{path}.safetensors") if path in JUDGES else Path(path)
    if not file.is_file():
        raise VugenError(f"no judge at {file}: make one with `vugen train-judge`")
    reader = SceneReader()
    try:
        reader.load_state_dict({name: weight.float() for name, weight in load_tensors(file).items()})
    except (VugenError, RuntimeError) as error:
        raise VugenError(f"{file} is no judge of this version: make one with `vugen train-judge`") from error
    return reader.eval()


def verdicts(reader: SceneReader, images: Tensor, scenes: Sequence[Scene]) -> list[dict[str, bool]]:
    """What pictures get right of the scenes they should show, as far as each scene asks.

    `subject`: the k subjects that are most there are the k asked for. `setting`. `count`, of scenes of two
    or three of a kind: the subject's rounded number. `side`, of scenes that name one, where both subjects are
    right: left, right, above or below. `colour`, where one is named and the subjects are right.

    Args:
        reader: of the pictures, on any device.
        images: uint8 [N, 3, H, W].
        scenes: N.
    """
    reading = read(reader, images)
    return [_verdict(reading, row, scene) for row, scene in enumerate(scenes)]


@torch.no_grad()
def read(reader: SceneReader, images: Tensor) -> Reading:
    """What is read from pictures, uint8 [N, 3, H, W], in batches; on the CPU."""
    device = next(reader.parameters()).device
    parts = [reader(part.to(device)) for part in images.split(BATCH)]
    return Reading(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


def _verdict(reading: Reading, row: int, scene: Scene) -> dict[str, bool]:
    asked = [SUBJECT_NAMES.index(subject["name"]) for subject in scene["subjects"]]
    found = reading.counts[row].topk(len(asked)).indices.tolist()
    right = {
        "subject": set(found) == set(asked),
        "setting": SETTING_NAMES[int(reading.settings[row].argmax())] == scene["setting"],
    }
    if scene["kind"] == "count":
        right["count"] = round(float(reading.counts[row, asked[0]])) == scene["subjects"][0]["count"]
    if not right["subject"]:
        return right
    if scene["relation"] in SIDES:
        right["side"] = reading.side(row, *asked) == scene["relation"]
    named = [(i, s["color"]) for i, s in zip(asked, scene["subjects"], strict=True) if s["color"]]
    if named:
        colours = list(COLORS)
        right["colour"] = all(colours[int(reading.colours[row, i].argmax())] == name for i, name in named)
    return right


def told(reading: Reading, row: int) -> str:
    """One row of a reading in a few words, as `2 cat, car, forest`."""
    counts = reading.counts[row]
    words = [f"{min(max(NUMBERS), round(float(counts[i])))} {SUBJECT_NAMES[i]}" for i in reading.there(row)]
    return ", ".join([*words, SETTING_NAMES[int(reading.settings[row].argmax())]])
