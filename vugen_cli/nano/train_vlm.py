"""The small vision-language model of the embedded default, built from Hugging Face configs.

It is a `LlavaForConditionalGeneration` (a SigLIP vision tower and a Llama decoder) with a BPE tokenizer
trained on the captions, so that the embedded default runs through the very code that a real VLM does.

What it is trained on, and why:

- *image first*: caption the picture, then answer questions about it;
- *text first*: does this caption (given before the image) match? which answers this question (given before)?
  A decoder trained only to caption forgets a word as soon as it has passed it, and the generation expert
  reads the prompt through exactly those states. A caption of a pair is asked about before the image comes,
  and may be its own with the subjects exchanged: a decoder must learn who stands where, not only who;
- the words of the caption predicted from the mean vision feature (SuperClass, arXiv 2411.03313), a dense
  signal that makes a vision tower from scratch learn objects quickly;
- each patch's pixels reconstructed from its own latent, so that z keeps the detail a captioner would drop.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.checkpoint import fingerprint
from vugen_cli.data.loader import Batch, ShardedImages, held_out_images, training_batches
from vugen_cli.engine.distributed import weight_of
from vugen_cli.engine.loop import train
from vugen_cli.engine.stage import RunOptions, Stage
from vugen_cli.errors import VugenError
from vugen_cli.files import refuse_foreign, whole_folder
from vugen_cli.nano.caption_judge import caption_accuracy
from vugen_cli.nano.conversations import DESCRIBE, conversation, training_texts, whole_batch, word_rarity
from vugen_cli.nano.vlm import SPECIAL, build, save_vlm, save_words, train_tokenizer
from vugen_cli.pictures import save_grid
from vugen_cli.processes import is_first
from vugen_cli.recipe import NanoVLM, Recipe
from vugen_cli.vlm.chat import ask
from vugen_cli.vlm.frozen import load_model
from vugen_cli.vlm.latents import Tap


class NanoTraining(nn.Module):
    """The model with the two heads that only training needs.

    Args:
        model: from `build`, or a trained one.
        tokenizer: its tokenizer.
        sizes: the loss weights and the length of the vision-only start.
        rarity: [vocabulary] weight of each token in the word loss; see `word_rarity`. None: the vision
            encoder is trained already and stays bit for bit, and only the language loss is left.
    """

    rarity: Tensor | None

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
        with Tap(self.model.model.multi_modal_projector).states() as seen:
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
        assert self.rarity is not None
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


def train_vlm(
    recipe: Recipe,
    data: str | Path,
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
    images.refuse_shapes("but a VLM of this kind reads squares: prepare them with --size")
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
    has_val = "val" in images.manifest.splits

    def preview(path: Path) -> None:
        pictures = held_out_images(images, images.size, 16)
        save_grid(pictures, path, labels=ask(model, processor, pictures, DESCRIBE))

    # Never mirrored: what is said of a scene may say left or right.
    stream = training_batches(images, recipe, recipe.train_vlm.batch_size, flip=False)
    resolved = begun | {
        "recipe": recipe.model_dump(mode="json", include={"seed", "nano_vlm", "train_vlm"}),
        "data": images.card().model_dump(mode="json"),
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
