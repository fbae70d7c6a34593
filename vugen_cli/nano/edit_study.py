"""Edits of OpenMoji scenes: is what was asked for changed, and is all else as it was?

Both are asked of what a judge sees in a picture, and all else of its pixels too. No edit can be judged better
than the real target, and the source left as it is keeps everything: both stand beside every share.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vugen_cli.data.sample import Sample
from vugen_cli.errors import VugenError
from vugen_cli.metrics.bootstrap import resampled_means
from vugen_cli.metrics.prompted_images import score_of
from vugen_cli.metrics.report import Report, Score, versions
from vugen_cli.nano.caption_judge import mentions, mentions_setting
from vugen_cli.nano.conversations import DESCRIBE
from vugen_cli.nano.edits import EDITS, OpenMojiEdits
from vugen_cli.nano.judges import stacked
from vugen_cli.nano.reader import JUDGES, Reading, SceneReader, load_reader, read
from vugen_cli.nano.vocabulary import (
    COLORS,
    NUMBERS,
    OPPOSITES,
    RELATIONS,
    SETTING_NAMES,
    SETTINGS,
    SUBJECT_NAMES,
    SUBJECTS,
    Scene,
)
from vugen_cli.processes import is_first
from vugen_cli.sampling.draw import draw, file_stems
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.sampling.trained import decode_images
from vugen_cli.studies.compare import read_shown, write_comparison
from vugen_cli.studies.reconstruct import DECODE_BATCH
from vugen_cli.vlm.chat import ask
from vugen_cli.vlm.frozen import FrozenVLM
from vugen_cli.vlm.prompts import Prompt

See = Callable[[Tensor], list[Scene]]  # uint8 [N, 3, S, S] -> what each shows, as far as it can be told
Fact = tuple[Any, ...]  # ("setting", name), ("count", name, number), ("relation", name, relation, name), ...
SIDEWAYS = ("to the left of", "to the right of")
SEED = 0  # of the edits, the samples and the reconstructions
SAME = 8  # levels of 255 that a pixel may differ by between source and target and count as unchanged


def facts_of(scene: Scene) -> set[Fact]:
    """All that a scene's description says."""
    found: set[Fact] = {("setting", scene["setting"])}
    for entry in scene["subjects"]:
        found |= {("subject", entry["name"]), ("count", entry["name"], entry["count"])}
        if entry["color"]:
            found.add(("color", entry["name"], entry["color"]))
    if scene["relation"] and len(scene["subjects"]) == 2:
        first, second = (entry["name"] for entry in scene["subjects"])
        found.add(("relation", first, scene["relation"], second))
    return found


def asked_and_rest(kind: str, before: Scene, after: Scene) -> tuple[set[Fact], set[Fact]]:
    """What an edit asks for, and what is true before and after it.

    Args:
        kind: one of `EDITS`.
        before, after: the two scenes.
    """
    words = {"add": ("subject", "relation"), "side": ("relation",), "number": ("count",), "remove": ()}
    new = {fact for fact in facts_of(after) - facts_of(before) if fact[0] in words.get(kind, (kind,))}
    names = {entry["name"] for entry in after["subjects"]}
    gone = {("absent", entry["name"]) for entry in before["subjects"] if entry["name"] not in names}
    return new | gone, facts_of(before) & facts_of(after)


def holds(fact: Fact, seen: Scene) -> bool:
    """Whether a fact is seen; a relation may be told from either side."""
    what, name, *more = fact
    entries = {entry["name"]: entry for entry in seen["subjects"]}
    if what == "setting":
        return bool(seen["setting"] == name)
    if what in ("subject", "absent"):
        return (name in entries) == (what == "subject")
    if what == "relation":
        relation, other = more
        told = {f[1:] for f in facts_of(seen) if f[0] == "relation"}
        told |= {(second, OPPOSITES[each], first) for first, each, second in told}
        # Who stands to the left or to the right stands beside, too.
        wanted = ("next to", *SIDEWAYS) if relation == "next to" else (relation,)
        return any((name, each, other) in told for each in wanted)
    return name in entries and entries[name][what] == more[0]


def scene_of(caption: str) -> Scene:
    """What a caption says: subjects in order with number and colour, how they stand, and the setting."""
    found = []
    for name, subject in SUBJECTS.items():
        words = "|".join(re.escape(word) for word in (subject.plural, name) if word)
        before = rf"(?:({'|'.join(NUMBERS.values())}|an?) )?(?:({'|'.join(COLORS)}) )?"
        if match := re.search(rf"\b{before}({words})\b", caption):
            many = 2 if match[3] == subject.plural != name else 1
            count = {word: number for number, word in NUMBERS.items()}.get(match[1] or "", many)
            entry = {"name": name, "count": count, "color": match[2]}
            found.append((match.start(3), match.end(3), entry))
    found.sort(key=lambda each: each[:2])
    relation = None
    if len(found) == 2:
        between = caption[found[0][1] : found[1][0]]
        relation = next((r for r in RELATIONS if mentions(between, r)), None)
    settings = (name for name in SETTINGS if mentions_setting(caption, name))
    return {
        "subjects": [entry for *_, entry in found],
        "relation": relation,
        "setting": next(settings, None),
    }


def by_captions(vlm: FrozenVLM) -> See:
    """What a VLM says of pictures; nothing is suggested to it, but a sampler was trained beside it."""

    def see(images: Tensor) -> list[Scene]:
        return [scene_of(said) for said in ask(vlm.model, vlm.processor, images, DESCRIBE, task="judge")]

    return see


def by_reader(reader: SceneReader) -> See:
    """What an independent judge reads in pictures; it names a colour for every subject."""

    def see(images: Tensor) -> list[Scene]:
        reading = read(reader, images)
        return [_seen(reading, row) for row in range(len(images))]

    return see


def _seen(reading: Reading, row: int) -> Scene:
    counts, there = reading.counts[row], reading.there(row)
    relation = reading.side(row, *there) if len(there) == 2 else None
    return {
        "subjects": [
            {
                "name": SUBJECT_NAMES[i],
                "count": round(float(counts[i])),
                "color": list(COLORS)[int(reading.colours[row, i].argmax())],
            }
            for i in there
        ],
        "relation": relation,
        "setting": SETTING_NAMES[int(reading.settings[row].argmax())],
    }


def all_judges(vlm: FrozenVLM) -> dict[str, See]:
    """The bundled readers, which never saw a sampler's picture, and the VLM's captions."""
    readers = {name: by_reader(load_reader(name).to(vlm.device)) for name in JUDGES}
    return {**readers, "captions": by_captions(vlm)}


def score_edits(
    sampler: Sampler,
    count: int,
    out: Path,
    judges: dict[str, See] | None = None,
    guidance: float | None = None,
    image_guidance: float | None = None,
) -> Report:
    """Draw held-out edits and judge what was changed and what was kept.

    Args:
        sampler: trained on `openmoji-edits`.
        count: edits, of all kinds alike.
        out: folder for the pictures, as `vugen sample` writes them, and a page of them, `edits.html`.
        judges: what sees pictures, by name; default `all_judges`.
        guidance, image_guidance: instead of the sampler's own.

    Returns:
        Shares in percent by judge and kind of edit, then how far pixels outside the change have moved; an
        empty report on all but the first process of a job.

    Raises:
        VugenError: the sampler was trained on something else, or its VLM cannot be asked.
    """
    if "openmoji-edits" not in sampler.card.data.datasets:
        raise VugenError(
            f"{sampler.path} was trained on {sampler.card.data.dataset}, and edits are asked of OpenMoji "
            "scenes, whose contents are known: train one on `vugen prepare --dataset openmoji-edits`"
        )
    edits = OpenMojiEdits(count, "val", sampler.card.image_size, SEED)
    samples = [edits[i] for i in range(count)]
    sources, targets = stacked([s.sources[0] for s in samples]), stacked([s.image for s in samples])
    prompts = [Prompt(s.captions[0], (source,)) for s, source in zip(samples, sources, strict=True)]
    draw(sampler, prompts, 1, out, SEED, guidance=guidance, image_guidance=image_guidance, study=True)
    if not is_first():
        return Report()
    write_comparison({"edits": read_shown(out)}, out / "edits.html")
    drawn = stacked([Image.open(out / f"{stem}-0000.png").convert("RGB") for stem in file_stems(prompts)])
    about = {
        "sampler": str(sampler.path),
        "sampling": sampler.settings(guidance=guidance, image_guidance=image_guidance).model_dump(
            mode="json"
        ),
        "seed_of_samples": SEED,
        "vlm_fingerprint": sampler.vlm.fingerprint,
    }
    scores: list[Score] = []
    for name, see in (judges or all_judges(sampler.vlm)).items():
        shown = {"drawn": see(drawn), "source": see(sources), "real": see(targets)}
        scores += _shares(name, samples, shown, about)
    decoded = torch.cat(
        [
            decode_images(sampler.vlm, sampler.autoencoder, targets[rows], SEED, numbers=rows.tolist())
            for rows in torch.arange(count).split(DECODE_BATCH)
        ]
    )
    scores.append(_pixels_kept(drawn, sources, targets, decoded, about))
    return Report(scores=scores, versions=versions())


def _shares(
    judge: str, samples: Sequence[Sample], shown: dict[str, list[Scene]], about: dict[str, Any]
) -> list[Score]:
    """How often what was asked for is changed and all else kept, in percent, of all edits and by kind."""
    made: dict[str, dict[str, list[bool]]] = {}
    for which, seen in shown.items():
        made[which] = {"changed": [], "kept": []}
        for sample, scene in zip(samples, seen, strict=True):
            asked, rest = asked_and_rest(
                sample.meta["edit"], sample.meta["source_scene"], sample.meta["scene"]
            )
            made[which]["changed"].append(all(holds(fact, scene) for fact in asked))
            made[which]["kept"].append(all(holds(fact, scene) for fact in rest))
    scores = []
    for kind in ("all", *EDITS):
        rows = [i for i, sample in enumerate(samples) if kind in ("all", sample.meta["edit"])]
        for what in ("changed", "kept") if rows else ():
            ours, source, real = (
                100 * np.array([made[which][what][i] for i in rows], dtype=float)
                for which in ("drawn", "source", "real")
            )
            scores.append(
                score_of(
                    f"edits_{judge}_{kind}_{what}",
                    f"{'change made' if what == 'changed' else 'rest kept'}, {kind}, by {judge} "
                    f"(source as it is: {source.mean():.1f}, real target: {real.mean():.1f})",
                    float(ours.mean()),
                    resampled_means(ours),
                    parameters={
                        **about,
                        "judge": judge,
                        "edits": len(rows),
                        "source_as_it_is": float(source.mean()),
                        "real_target": float(real.mean()),
                    },
                    warning=f"the judge is right on {real.mean():.0f}% of real targets: it says little."
                    if real.mean() < 50
                    else None,
                )
            )
    return scores


def _pixels_kept(
    drawn: Tensor, sources: Tensor, targets: Tensor, decoded: Tensor, about: dict[str, Any]
) -> Score:
    """Mean distance to the source, in levels of 255, where source and target are the same.

    Args:
        drawn, sources, targets: uint8 [N, 3, S, S].
        decoded: the targets from their own z̃: what the decoder alone costs.
        about: parameters of the score.
    """
    same = (targets.int() - sources.int()).abs().amax(1, keepdim=True) <= SAME
    rows = same.flatten(1).any(1)
    moved, floor = (
        (((pictures.float() - sources).abs() * same).flatten(1).sum(1) / (3 * same.flatten(1).sum(1)))[rows]
        .double()
        .numpy()
        for pictures in (drawn, decoded)
    )
    return score_of(
        "edits_pixels_outside",
        f"levels of 255 moved outside the change (real target, decoded: {floor.mean():.1f})",
        float(moved.mean()),
        resampled_means(moved),
        parameters={**about, "edits": len(moved), "real_target_decoded": float(floor.mean())},
    )
