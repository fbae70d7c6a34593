"""What the nano VLM is trained to say: captions, answers, whether text and image match."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vugen_cli.data.loader import Batch, ShardedImages
from vugen_cli.data.sample import Meta
from vugen_cli.nano.scenes import order_question, swapped, swapped_caption
from vugen_cli.processes import all_gather, rank, world_size

DESCRIBE = "describe the picture"


MATCH = "does it match?"


def whole_batch(batch: Batch) -> tuple[Batch, range]:
    """The batch of all processes, without its images, and which of its rows are this process's.

    A conversation may borrow another image's caption, and the random choices go from row to row.
    """
    if world_size() == 1:
        return batch, range(len(batch.captions))
    texts = all_gather((batch.captions, batch.meta))
    captions, meta = [c for part, _ in texts for c in part], [m for _, part in texts for m in part]
    here = range(rank() * len(batch.captions), (rank() + 1) * len(batch.captions))
    return Batch(batch.images, captions, meta, batch.corrupt), here


def conversation(
    row: int, caption: str, batch: Batch, rng: np.random.Generator
) -> list[tuple[str, str, bool]]:
    """What is said about one image, as (special token, text after it, is it the assistant's) in order.

    Two in five put the image first and ask for the caption; the others put the text first. Half of the
    captions that come first are asked about before the image does: those answers can only come from the text.
    """
    questions = list(batch.meta[row].get("questions", []))
    questions = [questions[i] for i in rng.permutation(len(questions))[:3]]
    draw = rng.random()
    if draw < 0.4:
        turns = [("<user>", "", False), ("<image>", DESCRIBE, False), ("<assistant>", caption, True)]
    elif draw < 0.8 or not questions:
        told, matches, of_text = caption, "yes", text_questions(batch.meta[row])
        if rng.random() < 0.5:
            (told, of_text), matches = other_caption(row, batch, rng), "no"
        turns = [("<user>", told, False)]
        if of_text and rng.random() < 0.5:
            question, answer = of_text[rng.integers(len(of_text))]
            turns += [("<user>", question, False), ("<assistant>", answer, True)]
        turns += [("<image>", MATCH, False), ("<assistant>", matches, True)]
    else:
        question, answer = questions.pop()
        turns = [("<user>", question, False), ("<image>", "", False), ("<assistant>", answer, True)]
    for question, answer in questions[:2]:
        turns += [("<user>", question, False), ("<assistant>", answer, True)]
    return turns


def text_questions(meta: Meta) -> list[list[str]]:
    """[question, answer] pairs that a sample's captions answer: of a pair, what stands where beside what."""
    scene = meta.get("scene")
    if scene and len(scene["subjects"]) == 2:
        return [order_question(scene, of_first) for of_first in (False, True)]
    return list(meta.get("questions", []))


def other_caption(row: int, batch: Batch, rng: np.random.Generator) -> tuple[str, list[list[str]]]:
    """A caption that does not fit this image, and questions that it answers.

    Of a pair that is not just side by side, half the time its own caption with the subjects exchanged: the
    same words, so that only their order tells. Else another image's caption, half the time the most similar
    in the batch. Near misses ("a bear in a forest" for "a bear on a beach") make the decoder carry each word
    of the prompt.
    """
    scene = batch.meta[row].get("scene")
    if scene and (caption := swapped_caption(batch.captions[row], scene)) and rng.random() < 0.5:
        return caption, text_questions({"scene": swapped(scene)})
    own = {frozenset(c.split()) for c in batch.meta[row]["captions"]}
    others = [i for i, c in enumerate(batch.captions) if i != row and frozenset(c.split()) not in own]
    if not others:
        return "", []
    if rng.random() < 0.5:
        chosen = others[rng.integers(len(others))]
    else:
        words = set(batch.captions[row].split())
        pool = [others[i] for i in rng.permutation(len(others))[:32]]
        chosen = max(pool, key=lambda i: _likeness(words, set(batch.captions[i].split())))
    return batch.captions[chosen], text_questions(batch.meta[chosen])


def _likeness(words: set[str], others: set[str]) -> float:
    return len(words & others) / len(words | others)


def word_rarity(tokenizer: Any, captions: list[str]) -> Tensor:
    """Inverse document frequency of each token over some captions [vocabulary]."""
    seen = Counter(
        token for ids in tokenizer(captions, add_special_tokens=False)["input_ids"] for token in set(ids)
    )
    rarity = torch.zeros(len(tokenizer))
    for token, count in seen.items():
        rarity[token] = float(np.log(1 + len(captions) / (1 + count)))
    return rarity


def training_texts(images: ShardedImages, count: int = 5000) -> tuple[list[str], list[str]]:
    """Captions, and every other text a training conversation may use, of the first `count` samples."""
    captions, others = [], [DESCRIBE, MATCH, "yes", "no"]
    for _, meta in images.in_order(count):
        captions += meta["captions"]
        others += [text for pair in meta.get("questions", []) for text in pair]
    return captions, others
