"""What `vugen export` writes: a folder that this package and diffusers load, with a model card."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import refuse_foreign, whole_file
from vugen_cli.hub import NAME
from vugen_cli.metrics.report import Report
from vugen_cli.pictures import save_grid
from vugen_cli.sampling.pipeline import VugenPipeline
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.vlm.prompts import refuse_places

PICTURES = "pictures.png"
EACH = 4  # pictures of a prompt
METHOD = "by the VUGEN method"  # which every model card names: it tells those of earlier exports


def export(
    sampler: Sampler, out: Path, prompts: Sequence[str], scores: Sequence[Path], licence: str = "other"
) -> None:
    """Write a sampler, its VLM and a model card, `README.md`, into a folder.

    Args:
        sampler: to share.
        out: the folder; what it holds already stays, but for an earlier export.
        prompts: of which the model card shows pictures.
        scores: JSON files of `vugen score`, for the model card.
        licence: of the weights, as hubs write it.

    Raises:
        VugenError: a file holds no scores, a prompt cannot be drawn, or the folder has a README.md of its own
            or cannot be written.
    """
    readme = out / "README.md"
    if readme.exists() and METHOD not in readme.read_text(encoding="utf-8", errors="replace"):
        raise VugenError(f"{readme} is of something else: choose another --out, or move it away")
    if not all(prompt.strip() for prompt in prompts):
        raise VugenError("--prompt is empty: say what to draw")
    refuse_places(prompts, "leave it out")
    if prompts:
        refuse_foreign(out / PICTURES, out / "pipeline.py")
    reports = [_report(path) for path in scores]
    images = sampler.sample(prompts, EACH)  # which says at once if a prompt cannot be drawn
    earlier = (out / "pipeline.py").exists()  # `save_pretrained` refuses one of something else
    VugenPipeline(sampler).save_pretrained(out)
    if earlier:
        (out / PICTURES).unlink(missing_ok=True)
    if prompts:
        drawn = {(p, i): image for p, i, image in images}
        pictures = torch.stack([drawn[key] for key in sorted(drawn)])
        save_grid(pictures, out / PICTURES, EACH, [prompts[p] for p, _ in sorted(drawn)])
    with whole_file(readme) as temporary:
        temporary.write_text(
            model_card(sampler, out.resolve().name, prompts, reports, licence), encoding="utf-8"
        )


def model_card(
    sampler: Sampler, name: str, prompts: Sequence[str], reports: Sequence[Report], licence: str
) -> str:
    """The text of README.md: a head for hubs, how to draw, and what is known of the sampler."""
    from huggingface_hub import ModelCardData

    card, defaults = sampler.card, sampler.defaults
    known = re.fullmatch(NAME, card.vlm.name) and not Path(card.vlm.name).exists()
    head = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence,
        base_model=card.vlm.name if known else None,
        tags=["text-to-image", "vugen"],
    )
    size = sum(p.numel() for p in sampler.expert.parameters()) / 1e6
    facts = {
        "pictures": f"{card.image_size} x {card.image_size} pixels",
        "VLM": f"`{Path(card.vlm.name).name}`, unchanged, in `vlm/` ({card.vlm.fingerprint[:12]})",
        "expert": f"{size:.1f} million weights, {card.step} steps in its last training",
        "adapters added": ", ".join(f"`{Path(a).name}`" for a in card.adapters or []),
        "settings": f"{defaults.steps} steps of {defaults.solver}, guidance {defaults.guidance:g} from time "
        f"{defaults.guidance_interval[0]:g} to {defaults.guidance_interval[1]:g}",
        "data": f"{card.data.dataset}, {card.data.counts.get('train', 0)} pictures in its last training",
        "licence of the data": card.data.licence or "not known",
        "licence of the weights": licence if licence != "other" else "not said: ask who shared them",
        "made by": f"vugen {card.version}",
    }
    parts = [
        f"---\n{head.to_yaml()}\n---\n",
        f"# {name}\n",
        f"Draws pictures for prompts, in the embeddings of a vision-language model, {METHOD}.\n",
        f"![{'; '.join(prompts)}]({PICTURES})\n" if prompts else "",
        USE,
        "## What it is\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in facts.items() if v),
        _scores(reports),
    ]
    return "\n".join(part for part in parts if part)


USE = """## Draw

```python
# pip install vugen-cli
from vugen_cli import VugenPipeline

pipe = VugenPipeline.from_pretrained("PATH OR hf:USER/NAME")
pipe("what to draw", seed=0).images[0].save("drawn.png")
```

Or `vugen sample "what to draw" --sampler PATH`. Weights are safetensors; no code of this folder is run. To
diffusers' own `DiffusionPipeline.from_pretrained(PATH, trust_remote_code=True)` its `pipeline.py` names the
installed package.
"""


def _scores(reports: Sequence[Report]) -> str:
    rows = []
    for report in reports:
        count = report.images.count if report.images else None
        for score in report.scores:
            value = "not taken" if score.value is None else f"{score.value:.4g}"
            if score.interval:
                value += f" ({score.interval[0]:.4g} to {score.interval[1]:.4g})"
            rows.append(f"| {score.name} | {value} | {count or ''} | {report.features} |\n")
    head = "## Scores\n\n| score | value (95%) | pictures | features |\n|---|---|---|---|\n"
    return head + "".join(rows) if rows else ""


def _report(path: Path) -> Report:
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise VugenError(f"--scores {path} is no JSON of `vugen score`: {first_line(error)}") from error
