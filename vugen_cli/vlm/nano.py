"""The small vision-language model of the embedded default, built from Hugging Face configs.

It is a `LlavaForConditionalGeneration` (a SigLIP vision tower and a Llama decoder) with a BPE tokenizer
trained on the captions, so that the embedded default runs through the very code that a real VLM does.

What it is trained on, and why:

- *image first*: caption the picture, then answer questions about it;
- *text first*: does this caption (given before the image) match? which answers this question (given before)?
  A decoder trained only to caption forgets a word as soon as it has passed it, and the generation expert
  reads the prompt through exactly those states;
- the words of the caption predicted from the mean vision feature (SuperClass, arXiv 2411.03313), a dense
  signal that makes a vision tower from scratch learn objects quickly;
- each patch's pixels reconstructed from its own latent, so that z keeps the detail a captioner would drop.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.data.loader import Batch, ShardedImages, dataset_card, training_batches
from vugen_cli.engine.distributed import weight_of
from vugen_cli.engine.loop import RunOptions, Stage, train
from vugen_cli.errors import VugenError
from vugen_cli.files import refuse_foreign, whole_folder, write_json
from vugen_cli.pictures import save_grid
from vugen_cli.processes import from_all, is_first, rank, world_size
from vugen_cli.recipe import NanoVLM, Recipe
from vugen_cli.vlm.chat import ask
from vugen_cli.vlm.frozen import WORDS, fingerprint, load_model, words_of
from vugen_cli.vlm.latents import projector_states

SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>", "<unk>"]
DESCRIBE = "describe the picture"
MATCH = "does it match?"
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{% else %}<user>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with this model's special tokens, as a transformers tokenizer."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build(sizes: NanoVLM, image_size: int, tokenizer: Any) -> tuple[Any, Any]:
    """A fresh model and its processor.

    Args:
        sizes: widths and depths.
        image_size: pixels a side; must be a multiple of `sizes.patch`.
        tokenizer: from `train_tokenizer`.
    """
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    if image_size % sizes.patch:
        raise VugenError(f"images of {image_size} px are not a multiple of nano_vlm.patch ({sizes.patch})")
    vision = SiglipVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=image_size,
        patch_size=sizes.patch,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(image_size // sizes.patch) ** 2,
        tie_word_embeddings=True,
    )
    processor = LlavaProcessor(
        SiglipImageProcessor(size={"height": image_size, "width": image_size}),
        tokenizer,
        patch_size=sizes.patch,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


class NanoTraining(nn.Module):
    """The model with the two heads that only training needs.

    Args:
        model: from `build`, or a trained one.
        tokenizer: its tokenizer.
        sizes: the loss weights and the length of the vision-only start.
        rarity: [vocabulary] weight of each token in the word loss; see `word_rarity`. None: the vision
            encoder is trained already and stays bit for bit, and only the language loss is left.
    """

    def __init__(self, model: Any, tokenizer: Any, sizes: NanoVLM, rarity: Tensor | None):
        super().__init__()
        self.ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
        self.model, self.tokenizer, self.sizes = model, tokenizer, sizes
        self.register_buffer("rarity", rarity)
        if rarity is None:
            model.model.vision_tower.requires_grad_(False)
            return
        width = sizes.vision_width
        self.words = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, len(tokenizer))
        )
        self.pixels = nn.Linear(width, 3 * sizes.patch**2)

    def loss(self, batch: Batch, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the pixel, word and (after `vision_steps`) language losses; or the last alone."""
        rng = np.random.default_rng(generator.initial_seed())
        images = batch.images.float() / 127.5 - 1
        with projector_states(self.model.model.multi_modal_projector) as seen:
            features = self.model.model.get_image_features(pixel_values=images).pooler_output
        if self.rarity is None:
            language = self._language_loss(torch.stack(list(features)), batch, rng)
            return language, {"language": language}
        z = seen[0]
        patches = functional.pixel_unshuffle(images, self.sizes.patch).flatten(2).transpose(1, 2)
        values = {
            "pixels": functional.mse_loss(self.pixels(z).float(), patches),
            "words": self._word_loss(z, batch.captions),
        }
        total = self.sizes.pixels_weight * values["pixels"] + self.sizes.words_weight * values["words"]
        if step >= self.sizes.vision_steps:
            values["language"] = self._language_loss(torch.stack(list(features)), batch, rng)
            total = total + values["language"]
        return total, values

    def _word_loss(self, z: Tensor, captions: list[str]) -> Tensor:
        """Cross-entropy against the caption's set of tokens, rare ones counting more."""
        target = torch.zeros(len(captions), len(self.tokenizer))
        for row, ids in enumerate(self.tokenizer(captions, add_special_tokens=False)["input_ids"]):
            target[row, ids] = 1.0
        target = target.to(z.device) * self.rarity
        target = target / target.sum(1, keepdim=True).clamp_min(1e-6)
        return functional.cross_entropy(self.words(z.mean(1)).float(), target)

    def _language_loss(self, features: Tensor, batch: Batch, rng: np.random.Generator) -> Tensor:
        """Next-token loss on the assistant's words of one conversation for each image."""
        ids, answers = self._conversations(batch, features.shape[1], rng)
        ids, answers = ids.to(features.device), answers.to(features.device)
        embedded = self.model.get_input_embeddings()(ids)
        image = (ids == self.ids["<image>"])[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(image, features.to(embedded.dtype))
        hidden = self.model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        predicts = answers[:, 1:]
        logits = self.model.lm_head(hidden[:, :-1][predicts])
        loss = functional.cross_entropy(logits.float(), ids[:, 1:][predicts])
        return loss * weight_of(len(logits), loss.device)

    def _conversations(
        self, batch: Batch, image_tokens: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Token ids [B, T] (right-padded) and which of them the model must predict [B, T] (bool)."""
        texts: list[str] = []
        plans: list[list[tuple[str, int, bool]]] = []  # (special token before, index of the text, supervised)
        whole, rows_here = whole_batch(batch)
        for row, caption in enumerate(whole.captions):
            turns = conversation(row, caption, whole, rng)
            if row not in rows_here:
                continue
            plan = []
            for before, text, supervised in turns:
                plan.append((before, len(texts), supervised))
                texts.append(text)
            plans.append(plan)
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows, targets = [], []
        for plan in plans:
            ids, target = [self.ids["<bos>"]], [False]
            for before, index, supervised in plan:
                special = [self.ids[before]] * (image_tokens if before == "<image>" else 1)
                words = encoded[index] + ([self.ids["<eos>"]] if supervised else [])
                ids += special + words
                target += [False] * len(special) + [supervised] * len(words)
            rows.append(torch.tensor(ids))
            targets.append(torch.tensor(target))
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, True, self.ids["<pad>"]), pad(targets, True, False)


def whole_batch(batch: Batch) -> tuple[Batch, range]:
    """The batch of all processes, without its images, and which of its rows are this process's.

    A conversation may borrow another image's caption, and the random choices go from row to row.
    """
    if world_size() == 1:
        return batch, range(len(batch.captions))
    texts = from_all((batch.captions, batch.meta))
    captions, meta = [c for part, _ in texts for c in part], [m for _, part in texts for m in part]
    here = range(rank() * len(batch.captions), (rank() + 1) * len(batch.captions))
    return Batch(batch.images, captions, meta, batch.corrupt), here


def conversation(
    row: int, caption: str, batch: Batch, rng: np.random.Generator
) -> list[tuple[str, str, bool]]:
    """What is said about one image, as (special token, text after it, is it the assistant's) in order.

    Two in five put the image first and ask for the caption; the others put the text first.
    """
    questions = list(batch.meta[row].get("questions", []))
    questions = [questions[i] for i in rng.permutation(len(questions))[:3]]
    draw = rng.random()
    if draw < 0.4:
        turns = [("<user>", "", False), ("<image>", DESCRIBE, False), ("<assistant>", caption, True)]
    elif draw < 0.8 or not questions:
        told, matches = caption, "yes"
        if rng.random() < 0.5:
            told, matches = other_caption(row, batch, rng), "no"
        turns = [("<user>", told, False), ("<image>", MATCH, False), ("<assistant>", matches, True)]
    else:
        question, answer = questions.pop()
        turns = [("<user>", question, False), ("<image>", "", False), ("<assistant>", answer, True)]
    for question, answer in questions[:2]:
        turns += [("<user>", question, False), ("<assistant>", answer, True)]
    return turns


def other_caption(row: int, batch: Batch, rng: np.random.Generator) -> str:
    """A caption of another image that does not fit this one: half the time the most similar in the batch.

    Near misses ("a bear in a forest" for "a bear on a beach") make the decoder carry each word of the prompt.
    """
    own = {frozenset(c.split()) for c in batch.meta[row]["captions"]}
    others = [c for i, c in enumerate(batch.captions) if i != row and frozenset(c.split()) not in own]
    if not others:
        return ""
    if rng.random() < 0.5:
        return others[rng.integers(len(others))]
    words = set(batch.captions[row].split())
    pool = [others[i] for i in rng.permutation(len(others))[:32]]
    return max(pool, key=lambda c: len(words & set(c.split())) / len(words | set(c.split())))


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


@torch.no_grad()
def caption_accuracy(model: Any, processor: Any, images: ShardedImages, count: int = 500) -> dict[str, float]:
    """How often a greedy caption tells what a scene shows, as `metrics.composition` judges it.

    Args:
        model: the VLM.
        processor: its processor.
        images: a split of the OpenMoji set (its `meta` says what a scene shows).
        count: scenes to caption, at most, in each group.

    Returns:
        Fractions such as `seen_subject`, `held_out_setting` and `pair_subject` (both of two), and the number
        of scenes in each group; empty when the data set does not say what its scenes show.
    """
    from vugen_cli.metrics.composition import group_of, judge  # which needs this module

    groups: dict[str, list[tuple[Tensor, dict[str, Any]]]] = {}
    for pixels, meta in images.in_order():
        if scene := meta.get("scene"):
            chosen = groups.setdefault(group_of(scene), [])
            if len(chosen) < count:
                chosen.append((torch.from_numpy(pixels).permute(2, 0, 1), scene))
    scores: dict[str, float] = {}
    for group, chosen in sorted(groups.items()):
        pictures, scenes = zip(*chosen, strict=True)
        answers = ask(model, processor, torch.stack(pictures), DESCRIBE)
        verdicts = [judge(answer, scene) for answer, scene in zip(answers, scenes, strict=True)]
        scores |= {f"{group}_{what}": sum(v[what] for v in verdicts) / len(verdicts) for what in verdicts[0]}
        scores[f"{group}_scenes"] = len(verdicts)
    return scores


def mentions(text: str, words: str) -> bool:
    """Whether a text has these words as words: "a carrot" does not mention a car."""
    return re.search(rf"\b{re.escape(words)}\b", text) is not None


@torch.no_grad()
def save_vlm(model: Any, processor: Any, path: str | Path) -> None:
    """Write a Hugging Face directory in half precision."""
    import copy

    copy.deepcopy(model).half().save_pretrained(path)
    processor.save_pretrained(path)


def save_words(captions: Iterable[str], vlm: Path) -> None:
    """Write the words of the training captions to the VLM's directory, so that it can say which it lacks."""
    write_json(vlm / WORDS, sorted({word for caption in captions for word in words_of(caption)}))


def train_vlm(
    recipe: Recipe,
    data: Path,
    out: Path,
    device: torch.device,
    options: RunOptions = RunOptions(),
    init: str | None = None,
) -> dict[str, float]:
    """Train the nano VLM and save it as a Hugging Face directory.

    The run's states, metrics, curves and caption previews are kept in `<out>.run`.

    Args:
        recipe: its `nano_vlm` and `train_vlm` sections.
        data: a prepared data set with captions; questions in the samples' meta are used if there are any.
        out: the directory to write.
        device: where to train.
        options: of the command line.
        init: a VLM of this kind (or `nano`) whose projector and decoder are trained further; its vision
            encoder stays bit for bit, so that reducers and pixel decoders trained on it still fit. None: a
            new one.

    Returns:
        `caption_accuracy` on the `val` split if the set has one, else {}.

    Raises:
        VugenError: bad data or sizes; something else is at `out`; `init` is not a VLM that this command made.
    """
    out = out.absolute()
    run = out.with_name(out.name + ".run")
    refuse_foreign(out, run)
    images = ShardedImages(data)
    captions, others = training_texts(images)
    torch.manual_seed(recipe.seed)
    if init:
        model, processor = load_model(init, "cpu")
        tokenizer = processor.tokenizer
        if model.config.model_type != "llava" or not set(SPECIAL) <= set(tokenizer.get_vocab()):
            raise VugenError(
                f"--init {init} is not a VLM that `vugen train-vlm` made: only those can be trained further"
            )
        model.requires_grad_(True)
    else:
        tokenizer = train_tokenizer(captions + others, recipe.nano_vlm.vocabulary)
        model, processor = build(recipe.nano_vlm, images.size, tokenizer)
    begun = {"init": fingerprint(model)} if init else {}
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # a quarter faster than SDPA's CPU kernels at these lengths
    rarity = None if init else word_rarity(tokenizer, captions)
    training = NanoTraining(model, tokenizer, recipe.nano_vlm, rarity).to(device)
    has_val = "val" in images.manifest["splits"]

    def preview(path: Path) -> None:
        shown = [torch.from_numpy(pixels) for pixels, _ in images.held_out().in_order(16)]
        pictures = torch.stack(shown).permute(0, 3, 1, 2)
        save_grid(pictures, path, labels=ask(model, processor, pictures, DESCRIBE))

    # Never mirrored: what is said of a scene may say left or right.
    stream = training_batches(images, recipe, recipe.train_vlm.batch_size, flip=False)
    resolved = begun | {
        "recipe": recipe.model_dump(mode="json", include={"seed", "nano_vlm", "train_vlm"}),
        "data": dataset_card(data),
    }
    stage = Stage("vlm", training, training.loss, preview, resolved, partial=True)
    train(stage, stream, recipe.train_vlm, recipe, run, device, options)
    model.set_attn_implementation("sdpa")
    if not is_first():
        return {}
    with whole_folder(out) as temporary:
        save_vlm(model, processor, temporary)
        save_words(captions, temporary)
    return caption_accuracy(model, processor, ShardedImages(data, "val")) if has_val else {}
