"""From images to z: what a VLM's own projector reads, as a grid, whatever the family.

Images go through the model's own image processor and vision side, and a hook collects what the projector is
given. Nothing is looked up by name: one picture is shown, every module that runs is noted, and the projector
is the last one that gives vectors of the language model's width (`find_tap`). What then differs between
families is only how the tokens lie: some lead with class or register tokens, some have merged neighbours, and
the Qwen line lists patches block by block and window by window. `to_grid` undoes all of it, and `check_grid`
moves parts of a picture to see that it did.
"""

import inspect
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vugen_cli.data.shapes import Shape, as_shape, shape_name
from vugen_cli.errors import VugenError

Inputs = dict[str, Any]  # keyword arguments of a vision side: what its image processor gives, or a call took
# One image, one view, one grid: how each image processor's tiling is switched off, where it has an attribute.
ONE_VIEW: dict[str, Inputs] = {
    "do_image_splitting": {"do_image_splitting": False},
    "crop_to_patches": {"crop_to_patches": False},
    "do_pan_and_scan": {"do_pan_and_scan": False},
    "vision_input_type": {"vision_input_type": "vanilla"},
    "max_slice_nums": {"max_slice_nums": 1},
    "max_crops": {"max_crops": 1},
    "resize_to_max_canvas": {"max_patches": 1},
}
MOST_EXTRA_TOKENS = 16  # class and register tokens before the patches
IN_A_LAYER = re.compile(r"\.\d+\.")  # parts of a numbered layer, as `encoder.layers.3.mlp`, project nothing
# Names of what image processors say of each image's grid of patches, [B, 2] or, with a time, [B, 3].
GRIDS = re.compile(r"grid_(t?hw|hws)$|spatial_shapes$|target_sizes$")


@dataclass
class Tap:
    """Where z is read: one argument of a module's forward, or what it gives.

    Attributes:
        module: hooked while images are encoded.
        key: position or name of the argument; None: the output.
        name: of the module in the model.
        block: side of the blocks of patches that are listed together; 1: patches come row by row.
        inside: the module is a part of the vision tower, which may list blocks by windows.
    """

    module: nn.Module
    key: int | str | None = 0
    name: str = ""
    block: int = 1
    inside: bool = False
    _orders: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def order(self, grid: tuple[int, int, int, int | None], device: torch.device) -> Tensor:
        """`raster_index` of these on a device; kept, since to copy it there makes the host wait."""
        if (grid, device) not in self._orders:
            with torch.inference_mode(False):
                self._orders[grid, device] = raster_index(*grid).to(device)
        return self._orders[grid, device]

    @contextmanager
    def states(self) -> Iterator[list[Tensor]]:
        """Collects what passes, one tensor a call, while the context lasts."""
        seen: list[Tensor] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Inputs, output: Any) -> None:
            passed = output if self.key is None else arguments(args, kwargs).get(self.key)
            seen.extend(tensors(passed)[:1])

        handle = self.module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()


@dataclass
class Call:
    """One run of a module, noted by `record`.

    Attributes:
        module, name: of the model.
        parent: number of the call it was made in; -1 for none.
        given: its tensors by position or name.
        gives: its tensors.
        leaf: it called no other module.
    """

    module: nn.Module
    name: str
    parent: int
    given: dict[int | str, Tensor]
    gives: list[Tensor] = field(default_factory=list)
    leaf: bool = True


def arguments(args: tuple[Any, ...], kwargs: Inputs) -> dict[int | str, Any]:
    """Arguments of a call by position or name."""
    found: dict[int | str, Any] = dict(enumerate(args))
    return found | dict(kwargs.items())


def tensors(value: Any) -> list[Tensor]:
    """Tensors of floats in a value, a sequence, a mapping or a model's output; the first is the main one."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.ndim > 1 else []
    if isinstance(value, dict):
        value = value.values()
    return (
        [t for part in value for t in tensors(part)]
        if isinstance(value, tuple | list | type({}.values()))
        else []
    )


def vision_inputs(image_processor: Any, images: Tensor, size: int | None = None) -> Inputs:
    """What the vision side is given for a batch of images: one view of each.

    Args:
        image_processor: the model's own; decides size and normalisation.
        images: uint8 [B, 3, H, W].
        size: pixels a side at which the model shall see them instead.
    """
    options: Inputs = {}
    for attribute, switch in ONE_VIEW.items():
        if hasattr(image_processor, attribute):
            options |= switch
    if size is not None:
        images = resized(images, size)
        options |= {
            key: False for key in ("do_resize", "do_center_crop", "do_pad") if hasattr(image_processor, key)
        }
    inputs = dict(
        image_processor(
            images=on_device_of(image_processor, images, images.device), return_tensors="pt", **options
        )
    )
    pixels = inputs[pixels_key(inputs)]
    patches = any(GRIDS.search(key) for key in inputs)  # not whole pictures
    if size is not None and not patches and pixels.ndim in (4, 5) and pixels.shape[-1] != size:
        raise VugenError(
            f"vlm_size={size} does nothing here: the model's image processor makes {pixels.shape[-1]} pixels "
            "of any picture; leave it out"
        )
    if pixels.ndim == 5 and pixels.shape[2] == 3:  # [samples, views, 3, H, W]
        for key, value in inputs.items():  # the first view of each image is the whole image
            if key == pixels_key(inputs) or ("mask" in key and value.shape[:2] == pixels.shape[:2]):
                inputs[key] = value.flatten(0, 1)[:: pixels.shape[:2].numel() // len(images)][:, None]
    return inputs


def on_device_of(image_processor: Any, images: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Images on a device; on the CPU for an image processor written with Pillow, which takes no others."""
    pillow = getattr(image_processor, "backend", None) == "pil"
    return [image.to("cpu" if pillow else device) for image in images]


def resized(images: Tensor, size: int | Shape) -> Tensor:
    """uint8 [B, 3, H, W] -> uint8 [B, 3, size, size], or of (height, width), bicubic."""
    scaled = nn.functional.interpolate(
        images.float(), as_shape(size), mode="bicubic", antialias=True, align_corners=False
    )
    return scaled.round().clamp(0, 255).to(torch.uint8)


def canvas(image_processor: Any, shape: Shape) -> Shape:
    """Height and width that an image processor leaves no empty border around, for pictures of a shape.

    Some pad a picture to whole patches (Kimi) or to a fixed size (pi0) instead of enlarging it. A white
    picture then comes out with a border, whose places of z would show nothing.
    """
    inputs = vision_inputs(image_processor, torch.full((1, 3, *shape), 255, dtype=torch.uint8))
    pixels = inputs[pixels_key(inputs)].float()
    if pixels.ndim not in (2, 4):
        return shape
    over = (0, 2, 3) if pixels.ndim == 4 else 0
    if (pixels.amax(over) - pixels.amin(over)).max() < 1e-3:
        return shape
    for key, value in inputs.items():
        if GRIDS.search(key):
            height, width = map(int, value[0][-2:])
            return height * int(image_processor.patch_size), width * int(image_processor.patch_size)
    return pixels.shape[-2], pixels.shape[-1]


def pixels_key(inputs: Inputs) -> str:
    """Under which name an image processor gives the pixels."""
    for key in ("pixel_values", *inputs):
        if key.startswith("pixel_values") and isinstance(inputs.get(key), Tensor):
            return key
    raise VugenError(
        f"its image processor gives no `pixel_values` but {', '.join(inputs)}, which needs code of its own"
    )


def run_vision(model: Any, inputs: Inputs, any_size: bool) -> Any:
    """Run the vision side on `vision_inputs` and return the model's own image features, or its tower's.

    Args:
        model: an image-text-to-text model.
        inputs: from `vision_inputs`.
        any_size: interpolate position embeddings, for towers that can.

    Raises:
        VugenError: it has none.
    """
    parts = [model.base_model, *model.modules()]
    reads = [part.get_image_features for part in parts if hasattr(part, "get_image_features")][:1]
    for read in chain(reads, _towers(model)):
        parameters = inspect.signature(getattr(read, "forward", read)).parameters
        arguments: Inputs = {key: value for key, value in inputs.items() if key in parameters}
        if any(
            key not in arguments and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
            for key, p in parameters.items()
        ):  # InstructBLIP reads the question beside the image
            continue
        if any_size and _interpolates(model):
            arguments["interpolate_pos_encoding"] = True
        return read(**arguments)
    raise VugenError(
        f"{type(model).__name__} cannot be used: it has no vision encoder that can be run on images alone"
    )


def _towers(model: Any) -> Iterator[nn.Module]:
    """Modules that take pixels and no text, the outermost first."""
    for module in model.modules():
        parameters = _takes(module.__class__)
        if "pixel_values" in parameters and not any("input_ids" in key for key in parameters):
            yield module


def _interpolates(model: Any) -> bool:
    return any("interpolate_pos_encoding" in _takes(module.__class__) for module in model.modules())


@cache
def _takes(kind: Any) -> frozenset[str]:
    """The arguments of a module's forward pass; to ask each module anew takes longer than to run some."""
    return frozenset(inspect.signature(kind.forward).parameters)


def record(model: Any, inputs: Inputs, any_size: bool) -> list[Call]:
    """Every module that runs when one picture is shown, in the order in which they begin."""
    calls: list[Call] = []
    running: list[int] = []

    def begin(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> None:
        given = {k: t for k, v in arguments(args, kwargs).items() for t in tensors(v)[:1]}
        if running:
            calls[running[-1]].leaf = False
        calls.append(Call(module, name, running[-1] if running else -1, given))
        running.append(len(calls) - 1)

    def end(_module: nn.Module, _args: tuple[Any, ...], _kwargs: Inputs, output: Any) -> None:
        calls[running.pop()].gives = tensors(output)

    handles = []
    for name, module in model.named_modules():
        before = lambda m, a, k, name=name: begin(name, m, a, k)  # noqa: E731
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(end, with_kwargs=True))
    try:
        run_vision(model, inputs, any_size)
    except VugenError:
        raise
    except Exception:
        # What a family does with several views after the projector is not our concern.
        done = [call for call in calls if call.parent < 0 and call.gives]
        if len(done) < 2:
            raise
    finally:
        for handle in handles:
            handle.remove()
    return calls


def find_layers(model: Any, inputs: Inputs, wanted: str | list[int], any_size: bool) -> list[Tap]:
    """Where several layers of the vision tower give their hidden states.

    Args:
        model, inputs, any_size: as for `find_tap`.
        wanted: `last N`, or numbers of layers, negative ones from the end.

    Raises:
        VugenError: the tower has no such layers, or they give no grid of tokens.
    """
    lists: dict[str, list[Call]] = {}
    for call in record(model, inputs, any_size):
        stem, _, number = call.name.rpartition(".")
        if number.isdigit() and call.gives and _is_grid(call.gives[0], inputs, model):
            alike = lists.setdefault(stem, [])
            if not alike or (type(alike[0].module), alike[0].gives[0].shape) == (
                type(call.module),
                call.gives[0].shape,
            ):
                alike.append(call)
    layers = max(lists.values(), key=len, default=[])
    if len(layers) < 2:
        raise VugenError(
            f"latents.layers: the vision tower of {type(model).__name__} has no layers whose hidden states "
            "lie on one grid; set latents=encoder"
        )
    numbers = range(-int(wanted.split()[1]), 0) if isinstance(wanted, str) else wanted
    if not all(-len(layers) <= number < len(layers) for number in numbers):
        raise VugenError(
            f"latents.layers: the vision tower of {type(model).__name__} has {len(layers)} layers, from 0 to "
            f"{len(layers) - 1}: choose among them"
        )
    return [
        Tap(call.module, None, call.name, _block(call.gives[0], inputs, model), inside=True)
        for call in (layers[number] for number in numbers)
    ]


def find_tap(model: Any, inputs: Inputs, latents: str, any_size: bool) -> Tap:
    """Where z is read: what the module between the vision tower and the language model is given or gives.

    Args:
        model: an image-text-to-text model.
        inputs: of one picture, from `vision_inputs`.
        latents: `encoder` (before the projector) or `projector` (after it).
        any_size: as in `run_vision`.

    Raises:
        VugenError: nothing between the pixels and the language model holds a grid of tokens.
    """
    calls = record(model, inputs, any_size)
    width = model.get_input_embeddings().weight.shape[1]
    # What reads the pixels, and what holds that, is the vision tower and no projector.
    tower = [next(i for i, call in enumerate(calls) if call.leaf and call.given)]
    tower += _inside(calls, tower[0])

    def tap(number: int, key: int | str | None, tensor: Tensor) -> Tap:
        call = calls[number]
        return Tap(call.module, key, call.name, _block(tensor, inputs, model), call.parent in tower)

    projects = [
        i not in tower and _gives(call, width) and not IN_A_LAYER.search(call.name)
        for i, call in enumerate(calls)
    ]
    found = [i for i, does in enumerate(projects) if does and not any(projects[j] for j in _inside(calls, i))]
    if found:
        last = found[-1]
        before = [i for i in range(last) if calls[i].parent == calls[last].parent and i not in tower]
        if calls[last].parent in tower and _reads(calls[last], width):
            # As wide as the language model before it: what made it so?
            widened = [i for i in found if i in before and calls[i].given and not _reads(calls[i], width)]
            last = widened[-1] if widened else last
        if latents == "projector":
            return tap(last, None, calls[last].gives[0])
        if calls[last].parent not in tower:  # a projector in several modules: the first of them
            while makers := [i for i in before if i < last and _feeds(calls[i], calls[last])]:
                last = makers[-1]
        for number in [
            last,
            *(i for i in reversed(before) if i < last),
        ]:  # queries are no grid: what read it?
            for key, tensor in calls[number].given.items():
                if _is_grid(tensor, inputs, model):
                    return tap(number, key, tensor)
    if latents == "encoder":  # a model may project elsewhere (Llama 4): z is what its tower gives
        for number in sorted(tower):
            if calls[number].gives and _is_grid(calls[number].gives[0], inputs, model):
                return tap(number, None, calls[number].gives[0])
    raise VugenError(
        f"{type(model).__name__} cannot be used: nothing between its pixels and its language model holds a "
        "grid of image tokens"
    )


def _inside(calls: list[Call], number: int) -> Iterator[int]:
    """The calls that a call was made in, nearest first."""
    while (number := calls[number].parent) >= 0:
        yield number


def _reads(call: Call, width: int) -> bool:
    first = next(iter(call.given.values()), None)
    return first is not None and first.shape[-1] == width


def _feeds(maker: Call, reader: Call) -> bool:
    """Whether what one module gives is, as it is or reshaped, what another reads."""
    given = next(iter(reader.given.values()), None)
    made = {tensor.untyped_storage()._cdata for tensor in maker.gives}
    return given is not None and given.untyped_storage()._cdata in made


def _gives(call: Call, width: int) -> bool:
    channels = 1 if isinstance(call.module, nn.Conv2d) else -1
    return bool(call.gives) and call.gives[0].shape[channels] == width


def _block(tokens: Tensor, inputs: Inputs, model: Any) -> int:
    """Side of the blocks in which the tokens of one picture are listed, 1 if they come row by row.

    Either the model lists them so itself, as [blocks, places, d], or the image processor listed the patches
    so: the picture shown is darker to the left, so the patches tell.
    """
    block = merge_size(getattr(model.config, "vision_config", None))
    if tokens.ndim == 3 and len(tokens) > 1 and tokens.shape[1] == block**2:
        return block
    pixels = inputs[pixels_key(inputs)]
    height, width = patch_grid(inputs, model)
    if not 0 < height * width == len(pixels):
        return 1
    columns = pixels.float().flatten(1).mean(1).view(height, width)
    return block if (columns - columns[:1]).abs().max() > 0.1 * columns.std() else 1


def _is_grid(tensor: Tensor, inputs: Inputs, model: Any) -> bool:
    try:
        return min(to_grid(tensor, inputs, 1, model, Tap(model)).shape[1:3]) > 1
    except VugenError:
        return False


def read_latents(model: Any, taps: list[Tap], inputs: Inputs, batch: int, any_size: bool) -> list[Tensor]:
    """Run the vision side and return the tokens at each tap, in the model's own layout.

    Args:
        model: an image-text-to-text model.
        taps: from `find_tap` or `find_layers`.
        inputs: from `vision_inputs`.
        batch: of how many pictures.
        any_size: interpolate position embeddings, for towers that can.
    """
    with ExitStack() as stack:
        seen = [stack.enter_context(tap.states()) for tap in taps]
        try:
            run_vision(model, inputs, any_size)
        except Exception:
            # What a family does with several views after the projector is not our concern.
            if not all(seen):
                raise
    return [
        # Some project one image after the other.
        torch.cat([channels_last(state).flatten(0, -2) for state in states])
        if len(states) == batch > 1
        else states[0]
        for states in seen
    ]


def channels_last(tokens: Tensor) -> Tensor:
    """Feature maps [N, d, h, w] as [N, h, w, d]; everything else as it is."""
    if tokens.ndim == 4 and tokens.shape[2] == tokens.shape[3] != tokens.shape[1]:
        return tokens.permute(0, 2, 3, 1)
    return tokens


def patch_grid(inputs: Inputs, model: Any) -> tuple[int, int]:
    """(rows, columns) of the patches of the first picture; (0, 0) if nothing says it."""
    for key, value in inputs.items():
        if GRIDS.search(key):
            height, width = map(int, value[0][-2:])
            return height, width
        if key.endswith("position_ids"):  # (column, row) of each patch, -1 where padded
            width, height = (value[0].amax(0) + 1).tolist()
            return height, width
    pixels = inputs[pixels_key(inputs)]
    if pixels.ndim == 3:  # [B, patches, pixels of one]
        return math.isqrt(pixels.shape[1]), math.isqrt(pixels.shape[1])
    if pixels.ndim == 5 and pixels.shape[2] != 3:
        return 0, 0
    height, width = pixels.shape[-2:]
    if "image_sizes" in inputs and pixels.ndim < 5:  # otherwise that of the original, not of what is seen
        height, width = inputs["image_sizes"][0].tolist()
    patch = _patch_size(model, getattr(model.config, "vision_config", None))
    return (height // patch, width // patch) if patch else (0, 0)


def to_grid(tokens: Tensor, inputs: Inputs, batch: int, model: Any, tap: Tap) -> Tensor:
    """Tokens at the projector -> [B, h, w, d], rows from the top, without class and register tokens.

    Args:
        tokens: [B, N, d], [B, d, h, w], or [B * N, d] or [1, B * N, d] from models that join the images of a
            batch.
        inputs: what the vision side was given.
        batch: B.
        model: for the patch size.
        tap: where they were read.

    Raises:
        VugenError: the number of tokens fits no grid.
    """
    tokens = channels_last(tokens)
    vision = getattr(model.config, "vision_config", None)
    height, width = patch_grid(inputs, model)
    count = tokens.numel() // tokens.shape[-1]
    if count % batch:
        count = 0
    tokens = tokens.reshape(batch, -1, tokens.shape[-1]) if count else tokens
    count //= batch
    for key, value in inputs.items():
        if key.endswith("position_ids") and value.shape[1] == count:  # padded to the most patches
            tokens, count = tokens[:, (value[0] >= 0).all(-1)], height * width
    if not height * width:  # rows of a square, which may end in a token of their own (Inkling)
        height = width = math.isqrt(count)
        if count == height * (width + 1):
            tokens, count = tokens.unflatten(1, (height, -1))[:, :, :-1].flatten(1, 2), height * width
    if (
        count >= 2 * height * width > 0 and count % (height * width) == 0
    ):  # several views: the first is the whole
        tokens, count = tokens[:, : height * width], height * width
    extra = count - height * width
    merged = 1
    if 0 <= extra <= MOST_EXTRA_TOKENS:
        tokens = tokens[:, extra:]
    else:
        merged = math.isqrt(height * width // count) if count else 0
        if merged == 0 or (height // merged) * (width // merged) != count:
            raise VugenError(
                f"{type(model).__name__} cannot be used: its projector sees {count} tokens, which "
                f"are no grid of {height}x{width} patches"
            )
    block, window = tap.block // merged, None
    if tap.inside and vision is not None and hasattr(vision, "fullatt_block_indexes"):  # Qwen2.5-VL
        window = vision.window_size // tap.block // vision.patch_size
    if block > 1 or window:
        tokens = tokens[:, tap.order((height // merged, width // merged, block, window), tokens.device)]
    return tokens.unflatten(1, (height // merged, width // merged))


def check_grid(vlm: Any, size: int | Shape) -> None:
    """See that each part of a picture moves its own part of z, and no other picture of a batch.

    Sixteen grey pictures, each with noise in the middle of another part, are encoded beside a plain one; a
    place counts for the part that moves it more than the others do. Encoders mix places, but where fewer than
    three parts in four are found again, z is not on the grid that it seems to be.

    Args:
        vlm: a `FrozenVLM`.
        size: pixels a side of the pictures to come, or (height, width).

    Raises:
        VugenError: z is scrambled, shifted by padding, or differs with the batch.
    """
    shape = as_shape(size)
    plain = torch.full((1, 3, *shape), 127, dtype=torch.uint8)
    height, width = vlm.encode(plain).shape[1:3]
    parts = min(4, height, width)
    high, wide = (side // parts for side in shape)  # of a part; a quarter on each side of it stays plain
    pictures = plain.repeat(parts**2 + 1, 1, 1, 1)
    inner = 3, high - 2 * (high // 4), wide - 2 * (wide // 4)
    noise = torch.randint(0, 256, inner, generator=torch.Generator().manual_seed(0))
    for number in range(parts**2):
        row, column = divmod(number, parts)
        top, left = row * high + high // 4, column * wide + wide // 4
        pictures[number + 1, :, top : top + noise.shape[1], left : left + noise.shape[2]] = noise
    z = vlm.encode(pictures)
    moved = (z[1:] - z[:1]).norm(dim=-1)
    moved = moved / moved.mean(0).clamp_min(1e-12)  # some tokens move whatever changes
    places = moved.flatten(1).argmax(1)
    rows = ((places // width + 0.5) / height * parts).long()
    columns = ((places % width + 0.5) / width * parts).long()
    hits = int((rows * parts + columns == torch.arange(parts**2, device=z.device)).sum())
    if hits < 0.75 * parts**2:
        raise VugenError(
            f"{vlm.name} cannot be used: of {parts**2} parts of a picture only {hits} move their own part of "
            "z, so a decoder could learn no layout: it lists image tokens in an order unknown to vugen"
        )
    alone = vlm.encode(pictures[1:2])
    if (alone - z[1:2]).norm() > 0.05 * z[1:2].norm():
        raise VugenError(f"{vlm.name} cannot be used: its z of a picture depends on the rest of its batch")


def check_aspect(vlm: Any, shape: Shape, z: Tensor) -> None:
    """See that a VLM does not squash or cut pictures that are no squares.

    Args:
        vlm: a `FrozenVLM`.
        shape: height and width of a picture.
        z: of it, [1, h, w, d].

    Raises:
        VugenError: it sees the picture as a square, or lying where it stands.
    """
    (height, width), (rows, columns) = shape, z.shape[1:3]
    if height != width and (height > width, height < width) != (rows > columns, rows < columns):
        size = vlm.recipe.vlm_size
        raise VugenError(
            f"{vlm.name} sees pictures of {shape_name(shape)} as {columns} x {rows} places"
            f"{f' (vlm_size={size})' if size else ''}: it is for squares; take a VLM whose vision tower "
            "reads any shape, such as Qwen2.5-VL"
        )


def merge_size(vision: Any) -> int:
    """Side of the blocks of patches that a vision config says are listed together; 1 for none."""
    for name in ("spatial_merge_size", "merge_kernel_size", "merge_size"):
        if size := getattr(vision, name, None):
            return int(size if isinstance(size, int) else size[0])
    return 1


def raster_index(height: int, width: int, block: int, window: int | None) -> Tensor:
    """Which token comes next, row by row, when tokens are listed by blocks of block x block, [h * w].

    Args:
        height, width: of the grid of tokens.
        block: side of a block, whose tokens are listed together, row by row.
        window: blocks a side of a window, whose blocks are listed together; None if there are no windows.
    """
    places = torch.arange(height * width).view(height // block, block, width // block, block)
    blocks = places.transpose(1, 2).flatten(2).flatten(0, 1)
    if window is not None:
        rows, columns = torch.arange(height // block) // window, torch.arange(width // block) // window
        number = rows[:, None] * (columns.max() + 1) + columns
        blocks = blocks[torch.argsort(number.flatten(), stable=True)]
    return torch.argsort(blocks.flatten())


def _patch_size(model: Any, vision: Any) -> int:
    """Pixels a side of a patch, 0 if nothing says it."""
    size = getattr(vision, "patch_size", None)
    if size is None:
        convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        size = convolution.stride if convolution else 0
    return int(size if isinstance(size, int) else size[0])
