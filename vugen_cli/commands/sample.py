"""`vugen sample`."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vugen_cli.commands.options import (
    MAX_GUIDANCE,
    MAX_STEPS,
    AllowMismatchOption,
    Answer,
    DecoderOption,
    DeviceOption,
    VlmNowOption,
)

if TYPE_CHECKING:
    from vugen_cli.data.shapes import Shape
    from vugen_cli.sampling.sampler import Sampler


PromptsArgument = Annotated[
    list[str] | None, typer.Argument(help="What to draw; each argument is one prompt.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", help="More prompts: a text file, one a line, or a folder of .txt."),
]
ImageOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--image", help="A picture that every prompt is about; without a prompt, vary it. Repeatable."
    ),
]
SamplerOption = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint, exported folder, hf:user/name, or nano, the bundled one. [default: the newest "
        "here, else nano]"
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=0, help="Image i of a prompt depends only on seed, prompt and i.")
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the expert first: a minute that pays for many pictures.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        min=0, max=MAX_GUIDANCE, help="Classifier-free guidance; 1 is none. [default: the checkpoint's]"
    ),
]
ImageGuidanceOption = Annotated[
    float | None,
    typer.Option(
        min=0, max=MAX_GUIDANCE, help="The same by the pictures of a prompt. [default: the checkpoint's]"
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(help="Adapter of `train-sampler --adapter`, as FILE or FILE:WEIGHT. Repeatable."),
]
SizeOption = Annotated[
    str | None,
    typer.Option(help="WIDTHxHEIGHT in pixels, as 48x80. [default: the square that the checkpoint draws]"),
]
StepsOption = Annotated[
    int | None, typer.Option(min=1, max=MAX_STEPS, help="ODE steps. [default: the checkpoint's]")
]
SolverOption = Annotated[
    Literal["euler", "heun", "midpoint"] | None, typer.Option(help="ODE solver. [default: the checkpoint's]")
]
QuantizeOption = Annotated[
    Literal["int8"] | None,
    typer.Option(help="Keep the weights of expert and VLM in 8 bits: less memory, other pictures."),
]


def sample(
    prompts: PromptsArgument = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Images for each prompt.")] = 1,
    prompts_file: PromptsOption = None,
    image: ImageOption = None,
    sampler: SamplerOption = None,
    decoder: DecoderOption = None,
    adapter: AdapterOption = None,
    vlm: VlmNowOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    image_guidance: ImageGuidanceOption = None,
    solver: SolverOption = None,
    seed: SeedOption = 0,
    size: SizeOption = None,
    allow_vlm_mismatch: AllowMismatchOption = False,
    compile_: CompileOption = False,
    quantize: QuantizeOption = None,
    device: DeviceOption = None,
) -> Answer:
    """Draw pictures for prompts.

    Writes one PNG for each image (with its prompt and settings inside), grid.png, and samples.jsonl.

    \b
    Examples:
      vugen sample "a bear in a forest" -n 8
      vugen sample "a cat on a beach" "two apples in the snow" --guidance 4 --seed 7
      vugen sample --prompts prompts.txt --sampler sampler.safetensors --out drawn
      vugen sample "a cat on a beach" --sampler sampler.safetensors --size 48x80
      vugen sample "put it in the snow" --image bear.png --sampler editor.safetensors
    """
    # Imports and loading make 700,000 objects that stay: looking for garbage among them, now and later, is a
    # quarter of the processor time of one picture.
    gc.disable()
    try:
        from vugen_cli.commands.answers import Drawn
        from vugen_cli.data.shapes import parse_shape
        from vugen_cli.engine.device import pick_device
        from vugen_cli.metrics.samples import read_samples
        from vugen_cli.processes import is_first, join
        from vugen_cli.sampling.draw import collect_prompts, draw, pick_sampler
        from vugen_cli.sampling.sampler import open_picture, picture_shape
        from vugen_cli.sampling.trained import load_sampler
        from vugen_cli.vlm.prompts import Prompt, refuse_places

        shape = parse_shape(size) if size else None
        variation, where = bool(image) and not prompts and not prompts_file, join(pick_device(device))
        texts = [""] if variation else collect_prompts(prompts or [], prompts_file)
        if not image:
            refuse_places(texts, "add --image FILE")
        loaded = load_sampler(pick_sampler(sampler), vlm, where, allow_vlm_mismatch, decoder, adapter or ())
    finally:
        gc.freeze()
        gc.enable()
    unknown = list(dict.fromkeys(word for text in texts for word in loaded.vlm.unknown_words(text)))
    if unknown and not image and is_first():  # of an instruction: it was trained to edit, not to caption
        typer.echo(f"words that {loaded.vlm.name} never saw: {', '.join(unknown)}")
    if quantize:
        loaded.quantize()
    if compile_:
        loaded.compile()
    if is_first():
        say_if_new(loaded, shape, bool(image))
    pictures = tuple(open_picture(path, picture_shape(loaded.card, shape)) for path in image or [])
    asked = [Prompt(text, pictures) for text in texts]
    folder = draw(loaded, asked, n, out, seed, steps, guidance, solver, image_guidance, shape)
    count = len(texts) * n
    typer.echo(f"wrote {count} picture{'s' * (count > 1)}, grid.png and samples.jsonl to {folder}/")
    return Drawn(out=str(folder), images=read_samples(folder), unknown_words=unknown) if is_first() else None


def say_if_new(sampler: "Sampler", shape: "Shape | None", pictures: bool) -> None:
    """A line each, where a sampler learned from pictures of other sizes, or from no edits."""
    from vugen_cli.data.shapes import shape_name

    card = sampler.card
    known = card.data.shapes or [shape_name((card.image_size, card.image_size))]
    if shape and shape_name(shape) not in known:
        typer.echo(f"{shape_name(shape)} is none of the sizes that it learned from: {', '.join(known)}")
    if pictures and not sampler.learned_edits and not card.adapters:
        typer.echo(f"{sampler.path} learned from {card.data.dataset}, which holds no edits of pictures")
