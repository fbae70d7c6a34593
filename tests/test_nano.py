"""The nano VLM: what it is taught, and that training it leaves a model every command can use."""

from collections import Counter
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from conftest import TINY, tiny_overrides, vugen_here
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.checkpoint import read_card
from vugen_cli.data.loader import Batch, ShardedImages, TrainingStream
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.files import bundle
from vugen_cli.nano.caption_judge import caption_accuracy, mentions
from vugen_cli.nano.conversations import (
    MATCH,
    conversation,
    other_caption,
    text_questions,
    training_texts,
    word_rarity,
)
from vugen_cli.nano.scenes import OpenMojiScenes, swapped_caption
from vugen_cli.nano.train_vlm import NanoTraining
from vugen_cli.nano.vlm import build, save_vlm, train_tokenizer
from vugen_cli.vlm.frozen import load_vlm


@pytest.fixture(scope="module")
def batch(scenes: Path) -> Batch:
    return next(iter(TrainingStream(ShardedImages(scenes), 24, seed=0)))


@pytest.fixture(scope="module")
def training(scenes: Path) -> NanoTraining:
    captions, others = training_texts(ShardedImages(scenes))
    tokenizer = train_tokenizer(captions + others, TINY.vocabulary)
    torch.manual_seed(0)
    model, _ = build(TINY, 64, tokenizer)
    return NanoTraining(model, tokenizer, TINY, word_rarity(tokenizer, captions))


def test_text_comes_first_in_three_conversations_of_five_and_matches_are_balanced(batch: Batch) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(600):
        row = seed % len(batch.captions)
        turns = conversation(row, batch.captions[row], batch, np.random.default_rng(seed))
        image = [special for special, _, _ in turns].index("<image>")
        assert sum(special == "<image>" for special, _, _ in turns) == 1
        assert [supervised for special, _, supervised in turns] == [s == "<assistant>" for s, _, _ in turns]
        kinds["image first" if not turns[0][1] else "text first"] += 1
        if turns[image][1] == MATCH:
            kinds[turns[image + 1][1]] += 1
            kinds["asked before"] += image == 3
            assert (turns[image + 1][1] == "yes") == (turns[0][1] == batch.captions[row])
    assert kinds["image first"] / 600 == pytest.approx(0.4, abs=0.06)
    assert kinds["yes"] / (kinds["yes"] + kinds["no"]) == pytest.approx(0.5, abs=0.1)
    assert kinds["asked before"] / (kinds["yes"] + kinds["no"]) == pytest.approx(0.5, abs=0.1)


def test_a_mismatched_caption_never_fits_the_image(batch: Batch) -> None:
    exchanged = 0
    for row in range(len(batch.captions)):
        own = batch.meta[row]["captions"]
        for seed in range(5):
            told, _ = other_caption(row, batch, np.random.default_rng(seed))
            same_words = sorted(told.split()) in [sorted(caption.split()) for caption in own]
            assert told not in own and (not same_words or batch.meta[row]["scene"]["kind"] == "pair")
            exchanged += same_words
    assert exchanged


@pytest.mark.parametrize(
    ("caption", "other"),
    [
        ("a cat above two dogs in a forest", "two dogs above a cat in a forest"),
        ("in a forest there are two dogs below a cat", "in a forest there is a cat below two dogs"),
    ],
)
def test_a_swapped_caption_says_the_opposite_in_the_same_words(caption: str, other: str) -> None:
    subjects = [{"name": "cat", "count": 1, "color": None}, {"name": "dog", "count": 2, "color": None}]
    scene = {"kind": "pair", "subjects": subjects, "relation": "above", "setting": "forest"}
    assert swapped_caption(caption, scene) == other
    asked = [["what is above the dogs?", "a cat"], ["what is below the cat?", "two dogs"]]
    assert text_questions({"scene": scene}) == asked
    assert swapped_caption(caption, {**scene, "relation": "next to"}) is None


def test_only_the_assistants_words_and_their_end_are_learned(training: NanoTraining, batch: Batch) -> None:
    ids, answers = training._conversations(batch, 64, np.random.default_rng(0))
    assert ids.shape == answers.shape
    assert ((ids == training.ids["<image>"]).sum(1) == 64).all()
    never = [training.ids[name] for name in ("<pad>", "<bos>", "<image>", "<user>", "<assistant>")]
    assert not set(ids[answers].tolist()) & set(never)
    ends = (ids == training.ids["<eos>"]) & answers
    assert (ends.sum(1) == (ids == training.ids["<assistant>"]).sum(1)).all()


def test_training_text_is_what_the_chat_template_writes(training: NanoTraining, scenes: Path) -> None:
    """The prefix of a prompt must be the very tokens that text-first training begins with."""
    _, processor = build(TINY, 64, training.tokenizer)
    message = [{"role": "user", "content": [{"type": "text", "text": "a bear in a forest"}]}]
    text = processor.apply_chat_template(message, tokenize=False)
    ids = training.tokenizer(text, add_special_tokens=False)["input_ids"]
    words = training.tokenizer("a bear in a forest", add_special_tokens=False)["input_ids"]
    assert ids == [training.ids["<bos>"], training.ids["<user>"], *words]


def test_every_loss_reaches_what_it_should(training: NanoTraining, batch: Batch) -> None:
    generator = torch.Generator().manual_seed(0)
    loss, values = training.loss(batch, generator, step=0)
    assert set(values) == {"pixels", "words", "language"} and torch.isfinite(loss)
    loss.backward()
    unused = [name for name, p in training.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("post_layernorm" in name or "position_ids" in name for name in unused), unused
    _, early = training.loss(batch, generator, step=-1)
    assert set(early) == {"pixels", "words"}


def test_rare_words_weigh_more(training: NanoTraining) -> None:
    rarity = word_rarity(
        training.tokenizer, ["a bear in a forest", "a bear on a beach", "a bear in a desert"]
    )
    common, rare = (training.tokenizer(w, add_special_tokens=False)["input_ids"][-1] for w in ("a", "beach"))
    assert rarity[rare] > rarity[common] > 0


def test_a_carrot_is_not_a_car() -> None:
    assert mentions("a red car on a beach", "car") and not mentions("a carrot on a beach", "car")


def test_image_sizes_that_do_not_fit_the_patches_are_refused(training: NanoTraining) -> None:
    with pytest.raises(VugenError, match="not a multiple of nano_vlm.patch"):
        build(TINY, 60, training.tokenizer)


@pytest.mark.parametrize("command", ["train-vlm", "train-judge"])
def test_a_mixture_is_refused_where_one_set_is_trained_on(command: str, tmp_path: Path) -> None:
    run = vugen_here(command, "--set", "data.mixture=[{path: a}]", "--out", "x.safetensors", cwd=tmp_path)
    assert run.returncode == 1 and "trains on one set: name it with --data" in run.stderr


def test_train_vlm_writes_a_model_that_loads(scenes: Path, vlm_path: Path, tmp_path: Path) -> None:
    sizes = [f"nano_vlm.{k}={v}" for k, v in TINY.model_dump().items()]
    options = [p for o in [*tiny_overrides(vlm_path), *sizes] for p in ("--set", o)]
    result = vugen_here(
        "train-vlm", "--data", scenes, "--out", "made", "--steps", "3", *options, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "held_out_subject" in result.stdout
    z = load_vlm(str(tmp_path / "made")).encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert z.shape == (1, 8, 8, TINY.vision_width)
    assert (tmp_path / "made.run/curves.png").exists()


def test_a_vlm_trained_further_keeps_what_reducers_were_trained_on(
    scenes: Path, vlm_path: Path, tmp_path: Path
) -> None:
    captions, others = training_texts(ShardedImages(scenes))
    tokenizer = train_tokenizer(captions + others, TINY.vocabulary)
    for name, seed in (("made", 0), ("stranger", 1)):
        torch.manual_seed(seed)
        save_vlm(*build(TINY, 64, tokenizer), tmp_path / name)
    run = CliRunner().invoke
    tiny = [p for o in tiny_overrides(vlm_path)[1:] for p in ("--set", o)]
    made, further, stranger = (str(tmp_path / name) for name in ("made", "further", "stranger"))
    reducer, data = str(tmp_path / "r.safetensors"), ["--data", str(scenes), "--steps", "2"]
    assert run(app, ["train-reducer", "--vlm", made, *data, "--out", reducer, *tiny]).exit_code == 0
    result = run(app, ["train-vlm", "--init", made, *data, "--out", further, *tiny])
    assert result.exit_code == 0, result.exception
    before, after = load_vlm(made), load_vlm(further)
    assert after.vision == before.vision and after.fingerprint != before.fingerprint
    picture = torch.arange(3 * 64 * 64).reshape(1, 3, 64, 64).to(torch.uint8)
    assert torch.equal(before.encode(picture), after.encode(picture))
    sampler = ["train-sampler", "--reducer", reducer, *data, "--out", str(tmp_path / "s.safetensors"), *tiny]
    result = run(app, [*sampler, "--vlm", further])
    assert result.exit_code == 0, result.exception
    assert "was trained on the VLM" in str(run(app, [*sampler, "--vlm", stranger]).exception)
    foreign = str(families.build("smolvlm", tmp_path / "foreign"))
    result = run(app, ["train-vlm", "--init", foreign, *data, "--out", str(tmp_path / "f"), *tiny])
    assert "is not a VLM that `vugen train-vlm` made" in str(result.exception)


def test_the_bundled_vlm_reads_held_out_scenes(tmp_path: Path) -> None:
    """`vugen study composition` measures it in full; this one guards the bundle."""
    if not bundle("vlm").is_dir():
        pytest.skip("no bundle in this checkout")
    write_dataset(OpenMojiScenes(120, "val", 64), tmp_path / "val", "val", 64)
    vlm = load_vlm("nano")
    scores = caption_accuracy(vlm.model, vlm.processor, ShardedImages(tmp_path / "val", "val"))
    for group in ("seen", "held_out"):
        assert scores[f"{group}_scenes"] > 20
        assert scores[f"{group}_setting"] >= 0.9 and scores[f"{group}_subject"] >= 0.85
    assert scores["pair_scenes"] > 20 and scores["pair_subject"] >= 0.5  # both of two; 0.7 of 500


def test_the_bundled_sampler_is_compared_with_the_set_that_prepare_writes() -> None:
    if not bundle("sampler.safetensors").is_file():
        pytest.skip("no bundle in this checkout")
    assert read_card(bundle("sampler.safetensors")).data.path == "data/openmoji"


def test_prompts_differ_in_every_layer_of_the_bundled_vlm() -> None:
    """A decoder that forgets its prompt after the first layers cannot condition the expert."""
    vlm = load_vlm("nano")
    a, b = vlm.prefix(["a bear in a forest"]), vlm.prefix(["a bear in a desert"])
    for mine, theirs in zip(a.values, b.values, strict=True):
        changed = (mine - theirs).norm(dim=(1, 3)) / mine.norm(dim=(1, 3))
        assert changed.max() > 0.02
