"""Writes docs/vlms.md from docs/vlms.json, which `python tests/matrix.py` makes.

Usage: python docs/write_vlms.py
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
WORKS, DIT, REFUSED = "works", "works with `expert.kind: dit` only", "refused"
HEAD = """# Which VLMs work

<!-- written by docs/write_vlms.py: change that, or run `python tests/matrix.py`, and not this page -->

`--vlm` takes `nano` (bundled), a Hugging Face directory or a hub id of an image-text-to-text model. There
is no list of supported models in the code: one path serves all.

- **z** is what the model's own projector reads (`latents: projector`: what it gives). vugen shows the model
  one picture, notes every module that runs, and takes the last one that gives vectors of the language
  model's width. The model's image processor decides size and normalisation; tiling is off: one image, one
  view, one grid. Class and register tokens are dropped; where patches are listed by blocks and windows (the
  Qwen line), they are put back in rows. A picture that the processor would pad is enlarged to fill its
  canvas. `vlm_size: 448` shows the model images of another size, where its position embeddings allow.
- **z from several layers** of the vision tower: `latents: {{layers: last 4}}` adds up the last four (arXiv
  2605.18324), `latents: {{layers: [0, 11, -1], how: stack}}` lays these side by side. It is refused where
  the tower has no layers whose hidden states lie on one grid, as in convolutional towers.
- **The prompt** goes through the model's chat template and `instruction: "Draw {{prompt}}."`, if you give
  one. A model without a template reads the bare prompt after its start token. The empty prompt is the
  unconditional branch.
- **Pictures in the prompt** ([edits](editing.md)) go through the model's own processor, tiling included, and
  the whole model reads them as when it is asked about them; rotary positions after a picture are those that
  the model itself counts. A model that would read a prompt otherwise beside others (it reads padding, or
  counts the pictures of the whole batch) reads such prompts one by one.
- **The generation expert** is a copy of the decoder (`expert.init: vlm` starts from its weights, `fresh` does
  not), which reads the prompt's keys and values in every layer. Image tokens take the rotary positions after
  the prompt; with M-RoPE, rows and columns. Where layers keep none of their own (linear attention,
  convolutions, shared keys), or for another size, `expert.kind: dit` is a transformer of our own that reads
  hidden states: set `expert.width`, `depth`, `heads` and `mlp`, or leave them and have the decoder's width
  and depth.
- **Precision**: `vlm_dtype: bfloat16` halves the memory of the frozen model. Its fingerprint stays the
  same.

`train-reducer` shows the model seventeen pictures before it trains, to see that each part of a picture
moves its own part of z. A model that does not pass is refused in one line in the first seconds.

No code of a model's repository is ever run. A repository that brings its own code (InternVL without `-hf`,
MiniCPM-V up to 4, Kimi-VL, Molmo 1) is refused; take its conversion to transformers, whose name often ends
in `-hf`.

## Every type that transformers {version} knows

{total} types are mapped as image-text-to-text. **{works} work, {dit} more work with `expert.kind: dit`
only, {refused} are refused; {pictures} of those that work read pictures in a prompt.** Each is built tiny,
with random weights, from its own default config, saved, and loaded as a user would load it. Then: each of 16
parts of a picture moves its own part of z; prompts in a padded batch give the keys, values and velocities
that each gives alone (1e-5 in float32); so do prompts with a picture, which goes through the type's own
processor, and with another picture they give others; gradients reach the expert; the VLM's weights are the
same bytes before and after. `z` is of a 64 px picture (some types need larger ones) in the tiny model and
shows how tokens merge; the parameters are those of the type's default config at full size, in billions, and
of the expert that copies its decoder.

| type | | pictures in the prompt | z is read at | z | VLM | expert |
|---|---|---|---|---|---|---|
"""
SIZES = """
## Ten well-known sizes

Counted without weights from the published configs; z of one picture at the size of the model's image
processor (for the Qwen line, whose size is free, of a 256 px picture). The checkpoint is a sampler's expert
in float32.

| model | z | VLM, parameters | expert, parameters | checkpoint |
|---|---|---|---|---|
"""
TAIL = """
## What is refused, and why

| type | reason given |
|---|---|
"""
LAST = """
## What works with `expert.kind: dit` only

| type | why no copy of its decoder can follow |
|---|---|
"""
TEXT_ALONE = """
## What reads no pictures in a prompt, and why

It draws from texts all the same; `vugen` says this in one line where a prompt has a picture.

| type | reason given |
|---|---|
"""
UNDERSTANDS = """
## Does it still understand?

```bash
vugen sample "a bear in a forest"
vugen study understanding
vugen chat samples/grid.png "what is in the picture?"
```

The second asks the VLM about pictures alone and again beside the loaded sampler, and compares every logit
bit for bit and every weight by hash. A checkpoint holds the expert, the reducer and the decoder only;
another VLM than the one it was trained on is refused by fingerprint (`--allow-vlm-mismatch` if you know
that it fits).
"""


def page(found: dict[str, Any]) -> str:
    """The page's text from what the matrix found."""
    types = found["types"]
    counts = Counter(entry["result"] for entry in types.values())
    text = HEAD.format(
        version=found["transformers"],
        total=len(types),
        works=counts[WORKS],
        dit=counts[DIT],
        refused=counts[REFUSED],
        pictures=sum(entry.get("pictures") == WORKS for entry in types.values()),
    )
    for name, entry in types.items():
        if entry["result"] == REFUSED:
            continue
        rows, columns = entry["grid"]
        text += (
            f"| {name} | {'works' if entry['result'] == WORKS else '`dit`'} "
            f"| {'works' if entry['pictures'] == WORKS else 'no'} | `{entry['tap']}` "
            f"| {rows}x{columns}x{entry['width']} | {billions(entry, 'parameters')} "
            f"| {billions(entry, 'expert') if entry['result'] == WORKS else ''} |\n"
        )
    text += SIZES
    for name, entry in found["sizes"].items():
        rows, columns, width = entry["z"]
        text += (
            f"| {name} | {rows}x{columns}x{width} | {entry['parameters']:,} | {entry['expert']:,} "
            f"| {entry['gigabytes']} GB |\n"
        )
    for title, result in ((TAIL, REFUSED), (LAST, DIT)):
        text += title
        for name, entry in types.items():
            if entry["result"] == result:
                text += f"| {name} | {entry['reason']} |\n"
    text += TEXT_ALONE
    for name, entry in types.items():
        if entry.get("pictures", WORKS) != WORKS:
            text += f"| {name} | {entry['pictures']} |\n"
    return text + UNDERSTANDS


def billions(entry: dict[str, Any], key: str) -> str:
    """A count of parameters in billions, if there is one."""
    return f"{entry[key] / 1e9:.2f}" if key in entry else ""


if __name__ == "__main__":
    (DOCS / "vlms.md").write_text(page(json.loads((DOCS / "vlms.json").read_text())))
