"""Pictures of several shapes: cut to the nearest, in batches of one shape, in an order that is exact."""

import hashlib
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from conftest import tiny_overrides, vugen_here
from PIL import Image
from safetensors.torch import load_file

from vugen_cli.checkpoint import load_checkpoint, read_card, save_checkpoint
from vugen_cli.commands.options import at_size_of_data
from vugen_cli.data.images import adm_crop
from vugen_cli.data.loader import (
    Batch,
    ShardedImages,
    TrainingStream,
    batches,
    held_out_images,
    stored_images,
)
from vugen_cli.data.manifest import Manifest, read_manifest
from vugen_cli.data.mixture import MixedImages
from vugen_cli.data.order import BLOCK, Turns
from vugen_cli.data.sample import Sample
from vugen_cli.data.shapes import nearest, parse_shape, parse_shapes, shape_name
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.flow import flow_matching_loss
from vugen_cli.models.embeddings import stretched
from vugen_cli.recipe import Captioning, MixtureSource, Recipe, load_recipe
from vugen_cli.sampling.pipeline import VugenPipeline
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.stages.caption import write_captions
from vugen_cli.stages.latent_cache import write_latents
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.vlm.frozen import load_vlm
from vugen_cli.vlm.latents import check_aspect, check_grid

CPU = torch.device("cpu")

SHAPES = "64x64,48x80,80x48"
SIZES = [(70, 70), (60, 100), (130, 70), (50, 90), (64, 66)]  # of the source, width and height, in turn


class Photos:
    """Pictures of many shapes: a colour each, darker to the left."""

    name, origin, licence, classes = "photos", "nowhere", "CC0", ()

    def __init__(self, count: int = 60, bad: int = 0):
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if self.bad and index % self.bad == 0:
            raise ValueError("no picture")
        width, height = SIZES[index % len(SIZES)]
        colour = np.random.default_rng(index).integers(60, 256, 3)
        pixels = np.broadcast_to(np.linspace(0.2, 1, width)[None, :, None] * colour, (height, width, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        return Sample(key=f"photo {index}", image=image, captions=[f"a picture of number {index}"])


def write(out: Path, count: int = 60, split: str = "train", bad: int = 0, **options: object) -> Manifest:
    settings = {"shard_size": 20, "shapes": SHAPES} | options
    return write_dataset(Photos(count, bad), out, split, **settings)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("photos") / "photos"
    write(out)
    write(out, 10, "val")
    return out


def number(meta: dict[str, object]) -> int:
    return int(str(meta["source_key"]).split()[1])


def take(images: ShardedImages, count: int, workers: int = 0, **options: object) -> list[Batch]:
    return list(islice(batches(TrainingStream(images, 4, seed=1, window=30, **options), workers), count))


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and a.captions == b.captions


def test_each_picture_goes_to_the_shape_nearest_in_log_aspect_ratio() -> None:
    shapes = parse_shapes(SHAPES)
    assert shapes == [(64, 64), (80, 48), (48, 80)]
    edge = (5 / 3) ** 0.5  # half-way, in the logarithm, between the square and 48x80
    for width, height, wanted in [(100, 100, 0), (1000, int(edge * 990), 0), (1000, int(edge * 1010), 1)]:
        assert nearest(shapes, (height, width)) == wanted
    assert nearest(shapes, (10, 500)) == 2
    assert shape_name(parse_shape("48x80")) == "48x80" and parse_shape("64") == (64, 64)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("64x64", "several"),
        ("48x80,80x48", "one square"),
        ("64x64,32x32", "one square"),
        ("64x64,48x80,24x40", "one aspect ratio"),
        ("64x64,256x128", "twice the pixels"),
        ("64x64,4x800", "8 pixels"),
        ("64x64,48*80", "WIDTHxHEIGHT"),
    ],
)
def test_shapes_that_make_no_buckets_are_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(VugenError, match=said) as refused:
        parse_shapes(text)
    assert "\n" not in str(refused.value)


def test_a_rectangle_is_cut_from_the_middle_of_what_covers_it() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    cut = adm_crop(ramp, (50, 80))  # 100 x 200, halved to 50 x 100, then 80 of 100 columns
    assert cut.shape == (50, 80, 3) and cut.flags.c_contiguous
    assert abs(int(cut[0, 0, 0]) - 20) <= 1 and abs(int(cut[0, -1, 0]) - 179) <= 1


def test_a_shard_is_of_one_shape_and_the_manifest_says_which(photos: Path) -> None:
    manifest = read_manifest(photos)
    assert (manifest.format, manifest.size, manifest.shapes) == (3, 64, SHAPES.split(","))
    images = ShardedImages(photos)
    found: Counter[str] = Counter()
    for shard, count in enumerate(images.counts):
        assert images.names[shard].endswith(f"-{shape_name(images.shape(shard))}.tar")
        for index in range(count):
            pixels, meta = images.read(shard, index)
            assert pixels.shape == (*images.shape(shard), 3)
            width, height = SIZES[number(meta) % len(SIZES)]
            assert images.shape(shard) == images.shapes[nearest(images.shapes, (height, width))]
            found[shape_name(images.shape(shard))] += 1
    assert found == {"64x64": 24, "48x80": 24, "80x48": 12}
    assert manifest.card(photos).shapes == SHAPES.split(",")


def test_an_interrupted_run_goes_on_to_the_same_bytes_and_lost_shards_are_written_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {path.name: path.read_bytes() for path in photos.glob("train-*")}
    out = tmp_path / "again"
    real, done = Photos.__getitem__, []

    def dies(self: Photos, index: int) -> Sample:
        done.append(index)
        if len(done) == 33:
            raise KeyboardInterrupt
        return real(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(Photos, "__getitem__", dies)
        with pytest.raises(KeyboardInterrupt):
            write(out)
    assert len(list(out.glob("train-*.tar"))) == 3  # one plan shard, of three shapes
    write(out)
    assert {path.name: path.read_bytes() for path in out.glob("train-*")} == whole
    (out / "train-000001-48x80.tar").unlink()
    write(out)
    assert {path.name: path.read_bytes() for path in out.glob("train-*")} == whole
    with pytest.raises(VugenError, match="--shapes .* there, None now"):
        write(out, shapes=None, size=64)
    with pytest.raises(VugenError, match="--shapes"):
        write(out, 10, "val", shapes="64x64,80x48")


def test_skipped_pictures_are_listed_once(tmp_path: Path) -> None:
    manifest = write(tmp_path / "p", bad=10)
    assert manifest.splits["train"].skipped_count == 6 and manifest.splits["train"].count == 54
    assert len((tmp_path / "p" / "skipped-train.jsonl").read_text().splitlines()) == 6


def test_a_set_of_squares_alone_is_written_as_before(tmp_path: Path) -> None:
    """Keys, names and format as version 2 has them; nothing of shapes."""
    write(tmp_path / "squares", shapes=None, size=64)
    manifest = json.loads((tmp_path / "squares" / "dataset.json").read_text())
    assert manifest["format"] == 2 and "shapes" not in manifest
    train = manifest["splits"]["train"]
    assert [list(shard) for shard in train["shards"]] == [["name", "samples", "bytes", "sha256"]] * 3
    assert [shard["name"] for shard in train["shards"]] == [f"train-00000{i}.tar" for i in range(3)]
    assert "shapes" not in read_manifest(tmp_path / "squares").card("x").model_dump()


def test_the_order_over_squares_alone_is_that_of_before(scenes: Path) -> None:
    """Scenes of the first 100 batches by number, hashed; from the loader before there were shapes."""
    stream = TrainingStream(ShardedImages(scenes), 8, seed=1, window=30)
    numbers = [int(meta["source_key"][-7:]) for batch in islice(stream, 100) for meta in batch.meta]
    assert numbers[:8] == [8, 4, 35, 67, 23, 93, 55, 15]
    assert hashlib.sha256(json.dumps(numbers).encode()).hexdigest().startswith("253afc08bbfcc4f7")


def test_batches_are_of_one_shape_and_an_epoch_of_each_shape_has_each_sample_once(photos: Path) -> None:
    images = ShardedImages(photos)
    seen: dict[tuple[int, ...], list[int]] = {}
    for batch in take(images, 200):
        assert batch.corrupt == 0
        seen.setdefault(tuple(batch.images.shape[2:]), []).extend(map(number, batch.meta))
    assert {shape: len(set(numbers)) for shape, numbers in seen.items()} == {
        (64, 64): 24,
        (80, 48): 24,
        (48, 80): 12,
    }
    for shape, numbers in seen.items():
        size = len(set(numbers))
        for first in range(0, len(numbers) - size, size):
            assert len(set(numbers[first : first + size])) == size, shape


def test_shapes_come_in_proportion_to_their_samples_and_a_rare_one_comes() -> None:
    turns = Turns([24_000, 24_000, 12_000, 3], seed=5)
    given = [turns.at(batch) for batch in range(3 * BLOCK)]
    counts = Counter(order for order, _ in given[BLOCK : 2 * BLOCK])
    # 1024 shared out as 24,000 : 24,000 : 12,000, less the one that the rare shape gets
    assert abs(counts[0] - 409.6) < 2 and abs(counts[1] - 409.6) < 2 and abs(counts[2] - 204.8) < 2
    assert counts[3] == 1 and sum(counts.values()) == BLOCK
    for order in range(4):  # numbered without gaps, in order
        numbers = [number for which, number in given if which == order]
        assert numbers == list(range(len(numbers)))
    assert [o for o, _ in given[:BLOCK]] != [o for o, _ in given[BLOCK : 2 * BLOCK]]
    assert Turns([7], seed=5).at(12_345) == (0, 12_345)  # one shape alone: the batches of always


@pytest.mark.parametrize(("ranks", "accumulate", "workers"), [(2, 1, 0), (2, 2, 0), (1, 1, 2)])
def test_a_batch_holds_the_same_whoever_computes_its_rows_and_wherever_a_run_begins(
    photos: Path, ranks: int, accumulate: int, workers: int
) -> None:
    images = ShardedImages(photos)
    whole = take(images, 12)
    assert len({batch.images.shape for batch in whole}) == 3
    parts = [
        take(images, 8 * accumulate, workers, start=4, part=(rank, ranks), accumulate=accumulate)
        for rank in range(ranks)
    ]
    for step, batch in enumerate(whole[4:]):
        mine = [p for part in parts for p in part[step * accumulate : (step + 1) * accumulate]]
        assert torch.equal(batch.images, torch.cat([p.images for p in mine]))
        assert batch.captions == [caption for p in mine for caption in p.captions]


def test_mirrored_and_decoded_from_jpeg_in_place(photos: Path, tmp_path: Path) -> None:
    plain, mirrored = take(ShardedImages(photos), 6), take(ShardedImages(photos), 6, flip=True)
    turned = 0
    for a, b in zip(plain, mirrored, strict=True):
        for x, y in zip(a.images, b.images, strict=True):
            assert torch.equal(x, y) or torch.equal(x.flip(-1), y)
            turned += int(torch.equal(x.flip(-1), y))
    assert turned
    file = io.BytesIO()
    Image.effect_noise((150, 90), 50).convert("RGB").save(file, "JPEG")
    source = Photos(8)
    source.__class__ = type(
        "Jpegs",
        (Photos,),
        {"__getitem__": lambda self, i: Sample(f"photo {i}", file.getvalue(), ["x"]), "name": "jpegs"},
    )
    write_dataset(source, tmp_path / "j", shapes=SHAPES)
    batch = take(ShardedImages(tmp_path / "j"), 1)[0]
    assert batch.images.shape == (4, 3, 48, 80) and batch.corrupt == 0
    assert np.array_equal(batch.images[0].permute(1, 2, 0), ShardedImages(tmp_path / "j").read(0, 0)[0])


def test_a_damaged_sample_is_replaced_by_one_of_its_shape(photos: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(photos, tmp_path / "copy"))
    tar = copy / "train-000000-80x48.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(b"\x89PNG")
    data[start : start + 64] = bytes(64)
    tar.write_bytes(data)
    corrupt = [batch.images.shape[2:] for batch in take(ShardedImages(copy), 40) if batch.corrupt]
    assert corrupt and set(corrupt) == {(48, 80)}


def test_stored_images_come_in_batches_of_one_shape_and_previews_in_squares(photos: Path) -> None:
    images = ShardedImages(photos)
    found = list(stored_images(images, 60, batch_size=10))
    assert Counter(tuple(b.shape[2:]) for b in found for _ in b) == {(64, 64): 24, (80, 48): 24, (48, 80): 12}
    assert held_out_images(images, 64).shape == (8, 3, 64, 64)


class Edits(Photos):
    """Each photograph is made from itself."""

    name = "photo edits"

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, sources=[sample.image])


@pytest.fixture(scope="module")
def shaped_edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edits") / "edits"
    write_dataset(Edits(20), out, "train", shapes=SHAPES)
    return out


def test_edits_have_the_shape_of_their_target_and_mix_with_pictures_of_shapes(
    photos: Path, shaped_edits: Path
) -> None:
    edits = ShardedImages(shaped_edits)
    assert edits.most_sources == 1 and edits.manifest.splits["train"].skipped_count == 0
    images = MixedImages([MixtureSource(path=str(path)) for path in (photos, shaped_edits)])
    for images_of, least in ((edits, 1), (images, 0)):
        found = take(images_of, 12, sources=True, flip=True)
        assert len({batch.images.shape for batch in found}) > 1
        for batch in found:
            assert batch.sources is not None and batch.corrupt == 0
            for image, sources in zip(batch.images, batch.sources, strict=True):
                assert least <= len(sources) <= 1 and all(torch.equal(image, source) for source in sources)
        assert any(sources for batch in found for sources in batch.sources or [])


@pytest.fixture(scope="module")
def mixed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[MixtureSource]:
    """Three of four from the photographs of three shapes, the rest from squares and from one more shape."""
    out = tmp_path_factory.mktemp("other") / "other"
    write(out, 20, shapes="64x64,40x96,80x48")
    return [MixtureSource(path=str(photos), weight=3), MixtureSource(path=str(out), weight=1)]


def test_sets_of_several_shapes_mix_by_weight_and_an_epoch_has_each_sample_once(
    photos: Path, mixed: list[MixtureSource]
) -> None:
    images = MixedImages(mixed)
    assert list(map(shape_name, images.shapes)) == [*SHAPES.split(","), "40x96"]
    assert images.card().shapes == [*SHAPES.split(","), "40x96"]
    parts = [ShardedImages(source.path) for source in mixed]
    stream = TrainingStream(images, 4, seed=1, window=30)
    drawn: Counter[tuple[int, str]] = Counter()
    seen: dict[int, Counter[tuple[int, int, int]]] = {0: Counter(), 1: Counter()}
    for batch in range(BLOCK):
        order, number = stream.turns.at(batch)
        for row in range(4):
            epoch, shard, index = stream.orders[order].at(0, 4 * number + row)
            part = int(shard >= len(parts[0].counts))
            own = shard - part * len(parts[0].counts)
            assert parts[part].shape(own) == images.shape(shard) == images.shapes[stream.kinds[order]]
            drawn[part, shape_name(images.shape(shard))] += 1
            seen[part][epoch, own, index] += 1
    assert all(set(times.values()) == {1} for times in seen.values())
    for part, (images_of, share) in enumerate(zip(parts, (0.75, 0.25), strict=True)):
        for kind, shape in enumerate(images_of.shapes):
            wanted = 4 * BLOCK * share * images_of.counts[images_of.kinds == kind].sum() / len(images_of)
            assert abs(drawn[part, shape_name(shape)] - wanted) < 24, (part, shape)


def test_a_mixture_of_shapes_is_the_same_when_resumed_and_in_parts(
    mixed: list[MixtureSource],
) -> None:
    images = MixedImages(mixed)
    whole = take(images, 12)
    assert len({batch.images.shape for batch in whole}) > 2
    halves = [take(images, 12, part=(rank, 2)) for rank in range(2)]
    for a, b in zip(whole[4:], take(images, 8, start=4), strict=True):
        assert same(a, b)
    for a, left, right in zip(whole, *halves, strict=True):
        assert torch.equal(a.images, torch.cat([left.images, right.images]))


def test_captions_by_a_vlm_keep_the_shapes(photos: Path, vlm_path: Path, tmp_path: Path) -> None:
    asked = Captioning(instructions=["describe the picture"], tokens=2)
    write_captions(photos, tmp_path / "c", str(vlm_path), asked, CPU)
    before, after = ShardedImages(photos), ShardedImages(tmp_path / "c")
    assert after.shapes == before.shapes and [*after.kinds] == [*before.kinds]
    assert after.stored(1, 0)[0] == before.stored(1, 0)[0] and take(after, 1)[0].corrupt == 0


def test_what_is_for_squares_alone_refuses_in_one_line(photos: Path) -> None:
    with pytest.raises(VugenError, match="cannot be resized to 32"):
        TrainingStream(ShardedImages(photos), 4, seed=0, size=32)


# --- training and drawing, by a VLM whose tower reads any shape


@pytest.fixture(scope="module")
def any_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build("qwen3_vl", tmp_path_factory.mktemp("vlm") / "qwen3_vl")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_pixtral"])
def test_z_of_a_rectangle_lies_on_its_grid(family: str, tmp_path: Path) -> None:
    """Windows and blocks of patches, and rows of patches."""
    vlm = load_vlm(str(families.build(family, tmp_path / family)))
    for shape in [(80, 48), (48, 80)]:
        z = vlm.encode(torch.full((1, 3, *shape), 127, dtype=torch.uint8))
        assert (z.shape[1] > z.shape[2]) == (shape[0] > shape[1])
        check_aspect(vlm, shape, z)
        check_grid(vlm, shape)


def recipe_of(vlm: Path, *more: str) -> Recipe:
    dit = ("expert.kind=dit", "expert.width=32", "expert.depth=2", "expert.heads=2")
    return load_recipe(None, [*tiny_overrides(vlm), *dit, *more])


@pytest.fixture(scope="module")
def drawn_of(photos: Path, any_shape: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, of eight steps each on pictures of three shapes."""
    out = tmp_path_factory.mktemp("shaped")
    recipe = recipe_of(any_shape, "train_reducer.steps=8", "train_sampler.steps=8", "reducer.merge=2")
    reducer = train_reducer(recipe, photos, out / "reducer.safetensors", CPU)
    train_sampler(recipe, reducer, photos, out / "sampler.safetensors", CPU)
    return out


def losses(out: Path) -> list[float]:
    lines = (out.with_suffix(".run") / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_a_sampler_draws_each_shape_and_the_square_as_ever(drawn_of: Path) -> None:
    sampler = load_sampler(drawn_of / "sampler.safetensors")
    torch.manual_seed(0)
    torch.nn.init.normal_(sampler.expert.proj_out.weight, std=0.3)
    assert sampler.card.latents.grid == (4, 4) and sampler.card.data.shapes == SHAPES.split(",")

    def draw(prompt: str, size: tuple[int, int] | None) -> torch.Tensor:
        return next(sampler.sample([prompt], size=size))[2]

    for shape, grid in [((80, 48), (5, 3)), ((48, 80), (3, 5)), ((96, 80), (6, 5))]:
        assert sampler.grid(shape) == (shape, grid)
        picture = draw("a bear", shape)
        assert picture.shape == (3, *shape) and not torch.equal(picture, draw("a cat", shape))
    assert torch.equal(draw("a bear", None), draw("a bear", (64, 64)))
    with pytest.raises(VugenError, match="multiples of 8"):
        draw("a bear", (80, 50))
    pictures = VugenPipeline(sampler)("a bear", seed=0, height=80, width=48).images
    assert np.array_equal(np.asarray(pictures[0]), draw("a bear", (80, 48)).permute(1, 2, 0))


def test_the_command_draws_a_shape_and_says_if_it_is_new(drawn_of: Path, tmp_path: Path) -> None:
    given = ("sample", "a bear", "--sampler", drawn_of / "sampler.safetensors", "--size")
    done = vugen_here(*given, "48x80", cwd=tmp_path)
    assert done.returncode == 0 and "none of the sizes" not in done.stdout, done.stderr
    row = json.loads((tmp_path / "samples" / "samples.jsonl").read_text())
    assert Image.open(tmp_path / "samples" / row["file"]).size == (48, 80) and row["size"] == "48x80"
    assert "none of the sizes" in vugen_here(*given, "64x80", cwd=tmp_path).stdout
    assert "WIDTHxHEIGHT" in vugen_here(*given, "large", cwd=tmp_path).stderr


@pytest.fixture(scope="module")
def large(drawn_of: Path, any_shape: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of 96 px, and a decoder for them of the reducer that learned from 64 px."""
    out = tmp_path_factory.mktemp("large")
    write(out / "photos", 8, shapes=None, size=96)
    recipe = recipe_of(any_shape, "train_reducer.steps=1", "reducer.merge=2", "flow.shift=2")
    train_reducer(recipe, out / "photos", out / "r.safetensors", CPU, drawn_of / "reducer.safetensors")
    return out


def test_a_sampler_goes_on_at_a_larger_size_and_draws_it_from_then_on(
    drawn_of: Path, large: Path, tmp_path: Path
) -> None:
    init, small = drawn_of / "sampler.safetensors", ("train_sampler.lr=1e-9", "train_sampler.weight_decay=0")
    words = ["train-sampler", "--init", init, "--reducer", large / "r.safetensors", "--steps", "1"]
    done = vugen_here(*words, *(w for key in small for w in ("--set", key)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sampler, before = load_sampler(tmp_path / "sampler.safetensors"), load_sampler(init)
    assert (sampler.card.image_size, sampler.card.data.size, sampler.card.latents.grid) == (96, 96, (6, 6))
    for name, tensor in before.expert.state_dict().items():
        assert torch.allclose(sampler.expert.state_dict()[name], tensor, atol=1e-6), name
    assert next(sampler.sample(["a bear"]))[2].shape == (3, 96, 96)
    assert sampler.shift == pytest.approx(1.5 * before.shift)  # the square root of 36 places for 16


def test_a_decoder_trained_further_draws_the_size_of_the_new_data(drawn_of: Path) -> None:
    card = read_card(drawn_of / "reducer.safetensors")
    card.recipe["decoder"]["image_size"] = card.data.size  # as recipes say it for `vugen plan`
    assert at_size_of_data(card).recipe["decoder"]["image_size"] is None
    asked = card.model_copy(update={"image_size": 128})  # other than its data's: it was meant
    assert at_size_of_data(asked).recipe["decoder"]["image_size"] == card.data.size
    outer = {**card.recipe, "decoder": {**card.recipe["decoder"], "trained": "outer"}}
    for of in (card, asked):
        again = at_size_of_data(of.model_copy(update={"recipe": outer}))
        assert again.recipe["decoder"]["trained"] == "all"


def test_the_positions_that_a_copy_learned_are_stretched_over_a_larger_grid(
    drawn_of: Path, large: Path, any_shape: Path, scenes: Path, tmp_path: Path
) -> None:
    brief = ("reducer.merge=2", "train_sampler.steps=1")
    copied = load_recipe(None, [*tiny_overrides(any_shape), *brief])
    init = train_sampler(copied, drawn_of / "reducer.safetensors", scenes, tmp_path / "a.safetensors", CPU)
    copied = load_recipe(None, [*tiny_overrides(any_shape), *brief, "train_sampler.lr=1e-9"])
    given = copied, large / "r.safetensors", large / "photos", tmp_path / "b.safetensors", CPU
    before, after = load_sampler(init), load_sampler(train_sampler(*given, init=init))
    wanted = stretched(before.expert.pos_embed, (4, 4), (6, 6))
    assert torch.allclose(after.expert.pos_embed, wanted, atol=1e-6)
    assert next(after.sample(["a bear"]))[2].shape == (3, 96, 96)


def test_learned_positions_are_interpolated_and_kept_on_their_own_grid() -> None:
    ramp = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij"), -1).flatten(0, 1)
    assert torch.equal(stretched(ramp, (6, 8), (6, 8)), ramp)
    rows, columns = stretched(ramp, (6, 8), (12, 16)).unflatten(0, (12, 16)).unbind(-1)
    middle = slice(4, -4)  # away from the edges; what lies at 1 of 6 covers 2 and 3 of 12
    assert torch.allclose(rows[middle, middle], (torch.arange(12.0) / 2 - 0.25)[middle, None].expand(-1, 8))
    assert torch.allclose(columns[middle, middle], (torch.arange(16.0) / 2 - 0.25)[middle].expand(4, -1))


def test_another_size_is_refused_in_one_line_where_it_would_not_be_drawn(
    drawn_of: Path, large: Path, any_shape: Path, tmp_path: Path
) -> None:
    sampler, recipe, out = drawn_of / "sampler.safetensors", recipe_of(any_shape), tmp_path / "s.safetensors"
    forgot = r"latents of 6 x 6 places, and .* is for 4 x 4: .*train-reducer --reducer .*sampler\.safetensors"
    with pytest.raises(VugenError, match=forgot):
        train_sampler(recipe, sampler, large / "photos", out, CPU, init=sampler)
    with pytest.raises(VugenError, match="latents of 6 x 6 places, and"):
        write_latents(sampler, large / "photos", tmp_path / "z", CPU)
    with pytest.raises(VugenError, match=r"r\.safetensors is for pictures of 96 px.*--init .*--reducer"):
        load_sampler(sampler, decoder=large / "r.safetensors")
    tensors, card = load_checkpoint(large / "r.safetensors")
    tensors["autoencoder.reducer.mean"] += 1
    save_checkpoint(tmp_path / "other.safetensors", tensors, card)
    with pytest.raises(
        VugenError, match=r"sampler\.safetensors draws .* than .*other\.safetensors has: make"
    ):
        train_sampler(recipe, tmp_path / "other.safetensors", large / "photos", out, CPU, init=sampler)


def test_a_sampler_of_shaped_edits_reads_and_draws_a_shape(
    drawn_of: Path, shaped_edits: Path, any_shape: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(any_shape, "expert.reference=true", "train_sampler.steps=4", "reducer.merge=2")
    train_sampler(recipe, drawn_of / "reducer.safetensors", shaped_edits, tmp_path / "e.safetensors", CPU)
    Image.new("RGB", (100, 160), "red").save(tmp_path / "red.png")
    words = ["sample", "it", "--image", "red.png", "--sampler", "e.safetensors", "--size"]
    done = vugen_here(*words, "48x80", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "samples" / "samples.jsonl").read_text())
    found = [Image.open(tmp_path / "samples" / name).size for name in (row["file"], *row["sources"])]
    assert found == [(48, 80), (48, 80)]
    assert "learned from none of 96x80: leave" in vugen_here(*words, "96x80", cwd=tmp_path).stderr


def test_a_cache_of_several_shapes_has_the_losses_of_live_encoding(
    drawn_of: Path, photos: Path, any_shape: Path, tmp_path: Path
) -> None:
    manifest = write_latents(drawn_of / "reducer.safetensors", photos, tmp_path / "z", CPU)
    assert manifest.latents and manifest.latents.grids == {"64x64": (4, 4), "48x80": (5, 3), "80x48": (3, 5)}
    assert manifest == read_manifest(tmp_path / "z") and manifest.shapes == SHAPES.split(",")
    recipe = recipe_of(any_shape, "train_sampler.steps=8", "reducer.merge=2")
    train_sampler(recipe, drawn_of / "reducer.safetensors", tmp_path / "z", tmp_path / "s.safetensors", CPU)
    live = losses(drawn_of / "sampler.safetensors")
    assert len(live) == 8 and losses(tmp_path / "s.safetensors") == pytest.approx(live, rel=2e-3)


def test_a_run_that_died_goes_on_to_the_same_weights(
    drawn_of: Path, photos: Path, any_shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(
        any_shape, "train_sampler.steps=8", "reducer.merge=2", "train_sampler.checkpoint_every=3"
    )
    reducer, out, calls = drawn_of / "reducer.safetensors", tmp_path / "s.safetensors", []

    def dies(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 6:
            raise RuntimeError("the power is out")
        return flow_matching_loss(*given)

    with monkeypatch.context() as patched:
        patched.setattr("vugen_cli.stages.train_sampler.flow_matching_loss", dies)
        with pytest.raises(RuntimeError, match="the power"):
            train_sampler(recipe, reducer, photos, out, CPU)
        assert not out.exists()
        train_sampler(recipe, reducer, photos, out, CPU)
    assert len(calls) == 6 + 5  # from step 3 on
    again, whole = load_file(out), load_file(drawn_of / "sampler.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_what_reads_or_draws_squares_alone_refuses_in_one_line(
    photos: Path, vlm_path: Path, any_shape: Path, drawn_of: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    with pytest.raises(VugenError, match="48x80 as .* it is for squares; take a VLM") as refused:
        train_reducer(recipe_of(vlm_path), photos, out, CPU)
    assert "\n" not in str(refused.value)
    with pytest.raises(VugenError, match="decoder needs sides that are multiples of 32"):
        train_reducer(recipe_of(any_shape, "decoder.patch=16"), photos, out, CPU)
    with pytest.raises(VugenError, match=r"decoder\.image_size=32 cannot resize"):
        train_reducer(recipe_of(any_shape, "decoder.image_size=32"), photos, out, CPU)
    copied = load_recipe(None, [*tiny_overrides(any_shape), "reducer.merge=2"])
    with pytest.raises(VugenError, match=r"set expert\.kind=dit"):
        train_sampler(copied, drawn_of / "reducer.safetensors", photos, out, CPU)
    with pytest.raises(VugenError, match=r"draws 64x64 alone.*expert\.kind=dit"):
        next(load_sampler(trained / "sampler.safetensors").sample(["a bear"], size=(80, 48)))
