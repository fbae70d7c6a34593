"""Scores of images against prompts: CLIPScore, VQAScore, DPG-Bench and GenEval in their published formats."""

import csv
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import TINY, written
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vugen_cli.commands.score import app
from vugen_cli.errors import VugenError
from vugen_cli.metrics import geneval
from vugen_cli.metrics.bootstrap import resampled_means
from vugen_cli.metrics.clip_score import clip_scores, seed_variance
from vugen_cli.metrics.detectors import Found, _instances, load_detector
from vugen_cli.metrics.dpg_bench import Item, Question, count_answers, dpg_bench_scores, read_dpg_bench
from vugen_cli.metrics.encoders import load_clip
from vugen_cli.metrics.geneval import (
    Asked,
    color_namer,
    failure,
    geneval_scores,
    keep_objects,
    read_geneval,
    sides,
)
from vugen_cli.metrics.geneval2 import answers_of, geneval2_scores, read_geneval2
from vugen_cli.metrics.image_sets import open_image_set
from vugen_cli.metrics.prompt_scores import score_prompts
from vugen_cli.metrics.prompted_images import prompted_images as of_set
from vugen_cli.metrics.vqa import SUFFIX, YesNoJudge, vqa_scores
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.nano.vlm import build, save_vlm, train_tokenizer
from vugen_cli.sampling.draw import collect_prompts
from vugen_cli.torchvision_repair import repair_torchvision
from vugen_cli.vlm.chat import question_inputs
from vugen_cli.vlm.frozen import load_vlm


def prompted_images(path, limit=None, **options):
    return of_set(open_image_set(path, limit), **options)


def save_image(path, value=0, size=(32, 32)):
    """A picture of one grey value, so that a judge in a test can tell which it sees."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def write_samples(folder, drawn):
    """A folder as `vugen sample` writes, of (prompt, grey value) pairs."""
    lines = []
    for i, (prompt, value) in enumerate(drawn):
        save_image(folder / f"{i}.png", value)
        lines.append(json.dumps({"file": f"{i}.png", "prompt": prompt, "index": i}))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder


def read(pairs):
    """(name, prompt, top left value) of each image."""
    return pairs.judged(lambda batch: [int(image[0, 0, 0]) for _, _, image in batch], "test", 2)


def pictures(pairs):
    """(prompt, image) of each image."""
    seen = pairs.judged(lambda batch: [image for _, _, image in batch], "test")
    return [(prompt, image) for _, prompt, image in seen]


def by_name(entries):
    return {entry["metric"]: entry for entry in entries}


def scores_of(function, *arguments):
    """The scores of a metric, as they are written."""
    return list(map(written, function(*arguments)))


# Which prompt is whose


def test_judges_see_images_in_full_float32(tmp_path):
    pairs = prompted_images(write_samples(tmp_path / "s", [("a", 0)]))
    assert pairs.judged(lambda _: [torch.backends.cudnn.allow_tf32], "test")[0][2] is False


def test_prompts_of_samples_folders_tars_and_genevals_layout(tmp_path):
    samples = write_samples(tmp_path / "samples", [("a bear", 1), ("a  bear", 2), ("a cat", 3)])
    save_image(samples / "grid.png", 9)
    expected = [("0.png", "a bear", 1), ("1.png", "a bear", 2), ("2.png", "a cat", 3)]
    assert read(prompted_images(samples)) == expected
    assert read(prompted_images(samples, limit=2)) == expected[:2]
    folder, tar = tmp_path / "folder", tmp_path / "a.tar"
    with tarfile.open(tar, "w") as archive:
        for name, prompt, value in expected:
            save_image(folder / name, value)
            text = (folder / name).with_suffix(".txt")
            text.write_text(f"{prompt}\nanother caption\n")
            archive.add(folder / name, f"x/{name}")
            archive.add(text, f"x/{text.name}")
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "bad.txt").write_text("a bad one")
    pairs = prompted_images(folder)
    assert read(pairs) == expected and len(pairs.images.bad) == 1
    assert [(p, v) for _, p, v in read(prompted_images(tar))] == [(p, v) for _, p, v in expected]
    assert pairs.describe().written() == {"count": 3, "source": "a .txt beside each image", "grid": False}
    drawn = tmp_path / "geneval"
    for number in range(2):
        save_image(drawn / f"{number:05d}" / "samples" / "0000.png", number)
        save_image(drawn / f"{number:05d}" / "grid.png", 9)
        (drawn / f"{number:05d}" / "metadata.jsonl").write_text(
            json.dumps({"prompt": f"a photo of {number}"})
        )
    assert [(p, v) for _, p, v in read(prompted_images(drawn))] == [("a photo of 0", 0), ("a photo of 1", 1)]
    assert open_image_set(drawn).kind == "geneval"  # and its grids are no images to any other metric


def test_prepared_shards_have_their_first_caption(scenes):
    from vugen_cli.data.loader import ShardedImages

    pairs = prompted_images(scenes, limit=3)
    captions = [meta["captions"][0] for _, meta in ShardedImages(scenes, "val").in_order(3)]
    assert [prompt for _, prompt, _ in read(pairs)] == captions and len(set(captions)) > 1


def test_grids_are_cut_into_four(tmp_path):
    pixels = np.repeat(np.repeat(np.array([[1, 2], [3, 4]], np.uint8), 8, 0), 8, 1)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "partiprompts0.png")
    pairs = prompted_images(tmp_path, grid=True, named={"partiprompts0": "a dog"})
    assert [(p, v) for _, p, v in read(pairs)] == [("a dog", value) for value in (1, 2, 3, 4)]
    assert pairs.source == "the names of the files"
    save_image(tmp_path / "partiprompts0.png", size=(17, 16))
    with pytest.raises(VugenError, match="no 2x2 grid"):
        read(pairs)


def test_images_without_prompts_are_refused(tmp_path):
    save_image(tmp_path / "a" / "1.png")
    save_image(tmp_path / "a" / "2.png")
    with pytest.raises(VugenError, match=r"2 images of .* have no prompt, the first 1\.png.*samples\.jsonl"):
        prompted_images(tmp_path / "a")
    (tmp_path / "a" / "1.txt").write_text("a bear")
    with pytest.raises(VugenError, match=r"1 images of .* the first 2\.png"):
        prompted_images(tmp_path / "a")
    (tmp_path / "a" / "samples.jsonl").write_text('{"file": "1.png", "prompt": null}\n')
    with pytest.raises(VugenError, match=r"no prompt, the first 1\.png"):
        prompted_images(tmp_path / "a")
    np.savez(tmp_path / "b.npz", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(VugenError, match=r"b\.npz \(npz\) names no prompts"):
        prompted_images(tmp_path / "b.npz")
    (tmp_path / "a" / "samples.jsonl").write_text('{"file": "1.png", "prompt": "a bear"}\n')
    (tmp_path / "a" / "1.png").write_bytes(b"nothing")
    with pytest.raises(VugenError, match="no readable image"):
        read(prompted_images(tmp_path / "a"))


def test_prompts_are_resampled_with_their_images():
    """Ten images of one prompt are no ten draws: the interval is that of four prompts, not of 40 images."""
    values = np.array([0.0, 0.0, 1.0, 1.0])
    spread = resampled_means(10 * values, np.full(4, 10)).std()
    assert spread == pytest.approx(0.25, rel=0.1)  # sqrt(0.25 / 4)


# CLIPScore


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory):
    """A CLIP of random weights with open_clip's own tokenizer, as MODEL:FILE."""
    repair_torchvision()
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-of-prompts.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-of-prompts.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny-of-prompts").state_dict(), folder / "tiny.safetensors")
    return f"tiny-of-prompts:{folder / 'tiny.safetensors'}"


@pytest.fixture(scope="module")
def clip(clip_name):
    return load_clip(clip_name)


def test_clip_score_is_hessels_and_the_cosine_is_plain(tmp_path, clip):
    import open_clip

    drawn = [("a bear", 10), ("a bear", 200), ("a bear", 90), ("a cat on a beach", 60), ("two apples", 250)]
    pairs = prompted_images(write_samples(tmp_path, drawn))
    scores = by_name(scores_of(clip_scores, pairs, clip))
    tokenizer = open_clip.get_tokenizer("tiny-of-prompts")
    expected = {"A photo depicts ": [], "": []}
    with torch.inference_mode():
        for (prompt, _), (_, image) in zip(drawn, pictures(pairs), strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            seen = clip.network.encode_image(clip.preprocess(picture)[None])
            for prefix, cosines in expected.items():
                told = clip.network.encode_text(tokenizer([prefix + prompt]))
                cosines.append(torch.cosine_similarity(seen, told).item())
    hessel = 2.5 * np.maximum(expected["A photo depicts "], 0)
    assert scores["clip_score"]["value"] == pytest.approx(hessel.mean(), rel=1e-5)
    assert scores["clip_cosine"]["value"] == pytest.approx(100 * np.mean(expected[""]), rel=1e-5)
    assert scores["clip_score_variance"]["value"] == pytest.approx(hessel.var(ddof=1), rel=1e-4)
    assert scores["clip_score_seed_variance"]["value"] == pytest.approx(hessel[:3].var(ddof=1), rel=1e-4)
    low, high = scores["clip_cosine"]["interval"]
    assert low < scores["clip_cosine"]["value"] < high
    how = scores["clip_score"]["parameters"]
    assert how["images"] == 5 and how["prompts"] == 3 and how["weights_fingerprint"] == clip.fingerprint
    assert scores["clip_score"]["warning"] is None
    json.dumps(scores)


def test_openais_weights_run_with_their_own_activation(monkeypatch):
    import open_clip

    asked = []

    def create(architecture, **options):
        asked.append(architecture)
        raise OSError("no network here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for name in ("ViT-L-14:openai", "ViT-B-32:laion2b_s34b_b79k", "ViT-L-14:file.safetensors"):
        with pytest.raises(VugenError, match="could not be loaded: no network here"):
            load_clip(name)
    assert asked == ["ViT-L-14-quickgelu", "ViT-B-32", "ViT-L-14"]


def test_what_clip_cannot_read_is_said(tmp_path, clip):
    pairs = prompted_images(write_samples(tmp_path, [("a bear in a forest " * 5, 10), ("a cat", 60)]))
    scores = by_name(scores_of(clip_scores, pairs, clip))
    assert "1 of 2 prompts are longer" in scores["clip_score"]["warning"]
    assert scores["clip_score_seed_variance"]["value"] is None
    assert "no prompt has two images" in scores["clip_score_seed_variance"]["warning"]


def test_the_variance_over_seeds_is_within_prompts():
    scores = np.array([0.0, 2.0, 10.0, 10.0, 10.0, 5.0])
    assert seed_variance(["a", "a", "b", "b", "b", "c"], scores) == (pytest.approx(1.0), 2)
    assert seed_variance(["a", "b"], scores[:2]) == (None, 0)


# Questions


@pytest.fixture(scope="module")
def asked_path(tmp_path_factory):
    """The suite's random VLM with a tokenizer that knows the words yes and no."""
    texts = [caption for i in range(40) for caption in OpenMojiScenes(40)[i].captions] + ["yes", "no"] * 50
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("asked") / "tiny"
    save_vlm(*build(TINY, 64, train_tokenizer(texts, TINY.vocabulary)), path)
    return path


def test_the_judges_answer_is_the_ratio_of_the_first_tokens(tmp_path, asked_path):
    judge, vlm = YesNoJudge(str(asked_path)), load_vlm(str(asked_path))
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    question = "is there a bear?"
    with torch.no_grad():
        inputs = question_inputs(vlm.model, vlm.processor, image[None], question + SUFFIX)
        p = vlm.model(**inputs).logits[0, -1].double().softmax(0)
    tokenizer = vlm.processor.tokenizer
    for word, found in (("yes", judge.yes), ("no", judge.no)):
        assert tokenizer(word, add_special_tokens=False)["input_ids"][0] in found
    expected = p[judge.yes].sum() / (p[judge.yes].sum() + p[judge.no].sum())
    assert judge(image, question) == pytest.approx(expected.item(), rel=1e-6)
    pairs = prompted_images(write_samples(tmp_path, [("a bear", 10), ("a bear", 200), ("a cat", 60)]))
    (entry,) = scores_of(vqa_scores, pairs, judge)
    each = [judge(im, f'Does this figure show "{p}"?') for p, im in pictures(pairs)]
    assert entry["value"] == pytest.approx(np.mean(each), rel=1e-12)
    assert entry["parameters"]["question"] == 'Does this figure show "{prompt}"? Please answer yes or no.'
    assert entry["parameters"]["vlm_fingerprint"] == vlm.fingerprint


def test_a_judge_that_cannot_tell_yes_from_no_is_refused(vlm_path):
    """The tokenizer of this one spells both, with a space before."""
    with pytest.raises(VugenError, match="same first token"):
        YesNoJudge(str(vlm_path))


def test_a_right_answers_probability_is_that_of_its_spellings(asked_path):
    """send_message_with_image of GenEval 2's evaluation.py: softmax, then the sum over first tokens."""
    judge, vlm = YesNoJudge(str(asked_path)), load_vlm(str(asked_path))
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    question = "Are the bears red? Answer in one word."
    with torch.no_grad():
        inputs = question_inputs(vlm.model, vlm.processor, image[None], question)
        p = vlm.model(**inputs).logits[0, -1].double().softmax(0)
    spellings = answers_of("Are the bears red?", "Yes")
    firsts = [vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in spellings]
    known = {first for first in firsts if vlm.processor.tokenizer.decode([first]).strip()}
    assert judge.probability(image, question, spellings) == pytest.approx(p[sorted(known)].sum().item())
    assert 0 < judge.probability(image, question, spellings) < 1


# GenEval 2

ATOMS = {  # in the layout of geneval2_data.jsonl: an "a" is asked about and is no atom of the count
    "two red bears": (3, [("How many bears are in the image?", "two", "count"),
                          ("Are the bears red?", "Yes", "attribute"),
                          ("Are there any bears in the image?", "Yes", "object")]),
    "a bear on six chairs": (4, [("How many bears are in the image?", "one", "count"),
                                 ("Are there any bears in the image?", "Yes", "object"),
                                 ("Is the bear on the chairs?", "Yes", "position"),
                                 ("How many chairs are in the image?", "six", "count"),
                                 ("Are there any chairs in the image?", "Yes", "object")]),
    "a cat chasing a dog": (3, [("Are there any cats in the image?", "Yes", "object"),
                                ("Is the cat chasing the dog?", "Yes", "verb")]),
}  # fmt: skip


def write_geneval2(path, **changes):
    lines = [
        {"prompt": prompt, "atom_count": count, "vqa_list": [[q, a] for q, a, _ in asked],
         "skills": [skill for *_, skill in asked]}
        for prompt, (count, asked) in ATOMS.items()
    ]  # fmt: skip
    lines[1] |= changes
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_right_answers_are_spelled_as_published():
    """answer_list in soft_tifa of evaluation.py, written out."""
    assert sorted(answers_of("How many bears are in the image?", "six")) == sorted(
        ["six", "Six", " six", " Six", "6", " 6"]
    )
    assert answers_of("Is it red?", "Yes") == ["Yes", "yes", " yes", " Yes"]


def test_soft_tifa_counts_as_the_published_scripts(tmp_path):
    """evaluation.py's totals of soft_tifa_am and soft_tifa_gm, soft_tifa_analysis.py's skills and atoms."""
    items = read_geneval2(write_geneval2(tmp_path / "data.jsonl"))
    pairs = prompted_images(
        write_samples(tmp_path / "drawn", [(prompt, 40 + i) for i, prompt in enumerate(ATOMS)])
    )
    pairs.refuse_others(items, tmp_path, "FILE")

    def probability(image, question, answers):
        assert question.endswith("? Answer in one word.") and len(answers) in (4, 6)
        return (int(image[0, 0, 0]) * len(question) % 97 + 1) / 100

    judge = SimpleNamespace(name="x", warning=None, describe=lambda: {"vlm": "x"}, probability=probability)
    scores = by_name(scores_of(geneval2_scores, pairs, items, judge))
    lists, skills, atoms = [], [], []
    for i, (count, asked) in enumerate(ATOMS.values()):
        lists.append([((40 + i) * len(q + " Answer in one word.") % 97 + 1) / 100 for q, *_ in asked])
        skills.append([skill for *_, skill in asked])
        atoms.append(count)
    expected = {
        "gm": 100 * sum(scipy.stats.gmean(s) for s in lists) / 3,
        "am": 100 * sum(sum(s) / len(s) for s in lists) / 3,
        "3_atoms": 100 * (scipy.stats.gmean(lists[0]) + scipy.stats.gmean(lists[2])) / 2,
        "4_atoms": 100 * scipy.stats.gmean(lists[1]),
    }
    for skill in ("object", "attribute", "count", "position", "verb"):
        each = [
            p for s, k in zip(lists, skills, strict=True) for p, of in zip(s, k, strict=True) if of == skill
        ]
        expected[skill] = 100 * sum(each) / len(each)
    assert {name: entry["value"] for name, entry in scores.items()} == pytest.approx(
        {f"geneval2_{name}": value for name, value in expected.items()}, rel=1e-12
    )
    assert scores["geneval2_gm"]["by_item"]["two red bears"] == pytest.approx(
        100 * scipy.stats.gmean(lists[0])
    )
    assert "Published scores are by Qwen3-VL-8B-Instruct, not by x" in scores["geneval2_am"]["warning"]
    low, high = scores["geneval2_am"]["interval"]
    assert low < scores["geneval2_am"]["value"] < high


def test_geneval2_is_asked_of_the_vlm(tmp_path, asked_path):
    drawn = write_samples(tmp_path / "drawn", [("two red bears", 1)])
    data, vlm = write_geneval2(tmp_path / "data.jsonl"), str(asked_path)
    report = written(score_prompts(open_image_set(drawn), geneval2=data, vlm=vlm))
    assert [entry["metric"].removeprefix("geneval2_") for entry in report["scores"]] == [
        "gm", "am", "object", "attribute", "count", "3_atoms",
    ]  # fmt: skip
    assert 0 < report["scores"][0]["value"] <= report["scores"][1]["value"] < 100  # by Jensen's inequality


def test_an_atom_that_cannot_be_is_a_prompt_that_fails(tmp_path):
    items = read_geneval2(write_geneval2(tmp_path / "data.jsonl"))
    pairs = prompted_images(write_samples(tmp_path / "drawn", [("two red bears", 1), ("two red bears", 9)]))
    judge = SimpleNamespace(
        name="x", warning=None, describe=lambda: {},
        probability=lambda image, question, answers: float(int(image[0, 0, 0]) > 1 or "red" not in question),
    )  # fmt: skip
    scores = by_name(scores_of(geneval2_scores, pairs, items, judge))
    assert scores["geneval2_gm"]["value"] == 50 and scores["geneval2_object"]["value"] == 100
    assert scores["geneval2_am"]["value"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert "Only 1 of 3 prompts" in scores["geneval2_gm"]["warning"]


def test_geneval2_in_another_layout_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    for changes, problem in (
        ({"skills": ["count"]}, "5 questions but 1 skills"),
        ({"skills": ["count", "object", "colour", "count", "object"]}, "the skill colour is none of object"),
        ({"vqa_list": []}, "vqa_list: List should have at least 1 item"),
        ({"prompt": None}, "prompt: Input should be a valid string"),
    ):
        with pytest.raises(VugenError, match=f"object 2 is not as geneval2_data.jsonl's: {problem}"):
            read_geneval2(write_geneval2(path, **changes))
    with pytest.raises(VugenError, match=r"is no file: give geneval2_data\.jsonl"):
        read_geneval2(tmp_path)
    items = read_geneval2(write_geneval2(path))
    with pytest.raises(VugenError, match=r"the prompt of 0\.png, 'a bear', is none of"):
        prompted_images(write_samples(tmp_path / "drawn", [("a bear", 1)])).refuse_others(items, path, "FILE")


# DPG-Bench

HEADER = (
    "item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed",
    "tuple", "question_natural_language",
)  # fmt: skip


def write_dpg(folder, header=HEADER):
    """Two prompts in the published format: four questions, of which two depend on others, and two."""
    rows = [
        ("0", "A red truck, on sand.", 1, "0", "entity - whole (truck)", "Is there a truck?"),
        ("0", "A red truck, on sand.", 2, "1", "attribute - color (truck, red)", "Is it red?"),
        ("0", "A red truck, on sand.", 3, "1, 2", "relation - spatial (truck, sand)", "Is it on sand?"),
        ("0", "A red truck, on sand.", 4, "0", "global - (photo)", "Is it a photo?"),
        ("coco7", 'Two "big" dogs', 1, "0", "entity - whole (dogs)", "Are there dogs?"),
        ("coco7", 'Two "big" dogs', 2, "1", "other - count (dogs, ==2)", "Are there two dogs?"),
    ]
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "0.txt").write_text("A red truck,  on sand.")  # no newline at the end, as published
    (folder / "prompts" / "coco7.txt").write_text('Two "big" dogs\n')
    with (folder / "dpg_bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for name, text, number, parents, entry, question in rows:
            broad, _, detailed = entry.partition(" - ")
            writer.writerow([name, text, "", number, parents, broad, detailed, entry, question])
    return folder


class Answers:
    """A judge with given answers: (top left value, question) pairs are yes."""

    name, warning = "someone", None

    def __init__(self, yes):
        self.yes = yes

    def __call__(self, image, question):
        return 0.9 if (int(image[0, 0, 0]), question) in self.yes else 0.1

    def describe(self):
        return {"vlm": self.name}


def test_dpg_bench_is_read_as_published_and_drawn_from_its_prompts(tmp_path):
    items = read_dpg_bench(write_dpg(tmp_path))
    assert [item.id for item in items] == ["0", "coco7"]
    assert items[0].questions[3] == Question("Is it on sand?", (1, 2), "relation")
    assert items[0].questions[1].parents == () and items[0].questions[4].category == "global"
    drawn = collect_prompts([], tmp_path / "prompts")
    assert drawn == ["A red truck, on sand.", 'Two "big" dogs']
    assert all(prompt in item.prompts for prompt, item in zip(drawn, items, strict=True))


@pytest.mark.parametrize(
    ("no", "expected"),
    [
        ((), 4 / 4),
        ((1,), 1 / 4),
        ((2,), 2 / 4),
        ((3,), 3 / 4),
        ((4,), 3 / 4),
        ((1, 4), 0.0),
        ((2, 3, 4), 1 / 4),
    ],
)
def test_a_question_whose_parent_fails_does_not_count(tmp_path, no, expected):
    item = read_dpg_bench(write_dpg(tmp_path))[0]
    assert count_answers(item, {number: number not in no for number in item.questions}) == expected


def test_a_failure_is_handed_down_and_an_unknown_parent_asks_nothing():
    chain = {n: Question("?", (n - 1,) if n > 1 else (), "entity") for n in (1, 2, 3)}
    assert count_answers(Item("x", ["x"], chain), {1: False, 2: True, 3: True}) == 0
    stray = {1: Question("?", (9,), "entity"), 2: Question("?", (), "entity")}
    assert count_answers(Item("x", ["x"], stray), {1: True, 2: False}) == 0.5


def test_dpg_bench_of_known_answers(tmp_path):
    bench = write_dpg(tmp_path / "bench")
    items = read_dpg_bench(bench)
    truck, dogs = "A red truck, on sand.", 'Two "big" dogs'
    pairs = prompted_images(write_samples(tmp_path / "drawn", [(truck, 10), (truck, 20), (dogs, 30)]))
    judge = Answers(
        {(10, "Is there a truck?"), (10, "Is it red?"), (10, "Is it on sand?"), (10, "Is it a photo?")}
        | {(20, "Is it red?"), (20, "Is it a photo?"), (20, "Is it on sand?"), (30, "Are there dogs?")}
    )
    scores = scores_of(dpg_bench_scores, pairs, items, bench, judge)
    # The first image scores 4/4, the second 1/4 (no truck: its colour and place do not count), the third 1/2.
    assert scores[0]["metric"] == "dpg_bench"
    assert scores[0]["value"] == pytest.approx(100 * ((1 + 0.25) / 2 + 0.5) / 2)
    assert scores[0]["by_item"] == {"0": 62.5, "coco7": 50.0}
    assert scores[0]["parameters"]["questions_asked"] == 10
    # Categories are of the plain answers.
    values = {entry["metric"]: entry["value"] for entry in scores[1:]}
    assert values == {
        "dpg_bench_attribute": 100, "dpg_bench_entity": pytest.approx(200 / 3), "dpg_bench_global": 100,
        "dpg_bench_other": 0, "dpg_bench_relation": 100,
    }  # fmt: skip
    assert "mPLUG" in scores[0]["warning"] and "Only" not in scores[0]["warning"]
    half = prompted_images(tmp_path / "drawn", limit=2)
    scores = scores_of(dpg_bench_scores, half, items, bench, judge)
    assert scores[0]["value"] == 62.5 and "interval" not in scores[0]
    assert "Only 1 of 2 prompts have images" in scores[0]["warning"]


def test_dpg_bench_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(VugenError, match=r"has no dpg_bench\.csv: give the folder"):
        read_dpg_bench(tmp_path)
    write_dpg(tmp_path / "a", header=("id", *HEADER[1:]))
    with pytest.raises(VugenError, match="has no column item_id"):
        read_dpg_bench(tmp_path / "a")
    table = write_dpg(tmp_path / "b") / "dpg_bench.csv"
    whole = table.read_text()
    for old, new, message in (
        (",3,", ",three,", "line 4: proposition_id 'three'"),
        ('0,"A red', '../0,"A red', "line 2 has no usable item_id"),
        ("Is it red?", " ", "line 3 has no usable item_id or no question"),
        (whole[whole.index("\n") :], "\n", "holds no questions"),
        ("Two", "\udcff", "cannot be read"),
    ):
        table.write_bytes(whole.replace(old, new).encode("utf-8", "surrogateescape"))
        with pytest.raises(VugenError, match=message):
            read_dpg_bench(tmp_path / "b")
    table.write_text(whole)
    drawn = write_samples(tmp_path / "drawn", [("a bear", 1)])
    with pytest.raises(VugenError, match=r"the prompt of 0\.png, 'a bear', is none of .*--prompts .*prompts"):
        score_prompts(open_image_set(drawn), dpg_bench=tmp_path / "b")


# GenEval


def found(label, box=(0, 0, 10, 10), score=0.95):
    return Found(label, score, box)


ASKED = {
    "single_object": {"include": [{"class": "dog", "count": 1}]},
    "two_object": {"include": [{"class": "dog", "count": 1}, {"class": "computer mouse", "count": 1}]},
    "counting": {
        "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
    },
    "colors": {"include": [{"class": "dog", "count": 1, "color": "red"}]},
    "position": {
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    },
    "color_attr": {
        "include": [
            {"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"},
        ],
    },
}  # fmt: skip
RIGHT, LEFT = (60, 0, 70, 10), (0, 0, 10, 10)
CASES = [  # task, what is detected, colours by class, why it fails
    ("single_object", [found("dog")], {}, None),
    ("single_object", [found("cat")], {}, "expected dog>=1, found 0"),
    ("single_object", [found("dog", score=0.3)], {}, "expected dog>=1, found 0"),
    ("two_object", [found("dog"), found("mouse", score=0.31)], {}, None),
    ("two_object", [found("dog")], {}, "expected computer mouse>=1, found 0"),
    ("counting", [found("dog"), found("dog", RIGHT)], {}, None),
    ("counting", [found("dog"), found("dog", RIGHT), found("dog", score=0.89)], {}, None),
    ("counting", [found("dog"), found("dog", RIGHT, 0.9)], {}, "expected dog>=2, found 1"),
    ("counting", [found("dog")] * 3, {}, "expected dog<3, found 3"),
    ("colors", [found("dog")], {"dog": ["red"]}, None),
    ("colors", [found("dog")], {"dog": ["pink"]}, "expected red dog>=1, found pink"),
    ("colors", [], {}, "expected dog>=1, found 0"),
    ("position", [found("dog", RIGHT), found("cat", LEFT)], {}, None),
    ("position", [found("dog", LEFT), found("cat", RIGHT)], {}, "cat left of target, found right of target"),
    ("position", [found("dog", LEFT), found("cat", LEFT)], {}, "found no side of target"),
    ("position", [found("cat", LEFT)], {}, "no target for cat to be left of"),
    # Only the surest of a class is looked at.
    ("position", [found("dog", RIGHT), found("cat", LEFT), found("cat", (90, 0, 99, 9), 0.5)], {}, None),
    (
        "position",
        [found("dog", RIGHT), found("cat", LEFT, 0.5), found("cat", (90, 0, 99, 9))],
        {},
        "right of",
    ),
    ("color_attr", [found("dog"), found("cat")], {"dog": ["red"], "cat": ["blue"]}, None),
    (
        "color_attr",
        [found("dog"), found("cat")],
        {"dog": ["blue"], "cat": ["red"]},
        "expected red dog.*blue cat",
    ),
    ("color_attr", [found("dog")], {"dog": ["red"]}, "expected cat>=1, found 0"),
]


@pytest.mark.parametrize(("task", "detected", "colors", "reason"), CASES)
def test_genevals_six_tasks(task, detected, colors, reason):
    said = failure(
        Asked(tag=task, prompt="x", **ASKED[task]), keep_objects(detected, task), lambda _, name: colors[name]
    )
    if reason is None:
        assert said is None
    else:
        assert said is not None and __import__("re").search(reason, said), said


def test_sides_are_told_from_boxes_of_any_size():
    middle = found("a", (40, 40, 60, 60))
    for box, expected in (
        ((0, 40, 20, 60), {"left of"}),
        ((80, 40, 100, 60), {"right of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),
        ((44, 40, 64, 60), set()),  # 4 px are no more than a tenth of 20 + 20
        ((45, 40, 65, 60), set()),  # 1 px beyond is a fifth of the offset of 5
        ((50, 40, 70, 60), {"right of"}),  # 6 of 10
        ((40, 40, 60, 60), set()),
    ):
        assert sides(found("b", box), middle) == expected, box


def test_at_most_sixteen_of_a_class_are_kept_the_surest_first():
    many = [found("sofa", score=0.5 + i / 100) for i in range(20)] + [
        found("remote"),
        found("cat", score=0.2),
    ]
    kept = keep_objects(many, "two_object")
    assert set(kept) == {"couch", "tv remote"}
    assert [each.score for each in kept["couch"]] == [0.5 + i / 100 for i in range(19, 3, -1)]


def write_geneval(path, asked=ASKED):
    path.write_text(
        "".join(
            json.dumps({"tag": t, **what, "prompt": f"a photo of {t}"}) + "\n" for t, what in asked.items()
        )
    )
    return path


def test_geneval_is_the_mean_over_its_tasks(tmp_path, clip, monkeypatch):
    asked = read_geneval(write_geneval(tmp_path / "m.jsonl"))
    drawn = [(f"a photo of {t}", 10 * i) for i, t in enumerate(ASKED)] + [("a photo of counting", 70)]
    pairs = prompted_images(write_samples(tmp_path / "drawn", drawn))
    seen = {  # by grey value; the second picture of counting fails, and so does position
        0: [found("dog")], 10: [found("dog"), found("mouse")], 20: [found("dog")] * 2, 30: [found("dog")],
        40: [found("dog")], 50: [found("dog"), found("cat")], 70: [found("dog")],
    }  # fmt: skip
    detector = SimpleNamespace(
        name="d", kind="yolos", labels={"dog", "cat", "mouse"}, fingerprint="f",
        find=lambda image: seen[int(image[0, 0, 0])],
    )  # fmt: skip
    monkeypatch.setattr(
        geneval, "color_namer", lambda _: lambda _, found, name: {"dog": ["red"], "cat": ["blue"]}[name]
    )
    overall, *tasks = scores_of(geneval_scores, pairs, asked, detector, clip)
    assert {entry["metric"].removeprefix("geneval_"): entry["value"] for entry in tasks} == {
        "single_object": 1, "two_object": 1, "counting": 0.5, "colors": 1, "position": 0, "color_attr": 1,
    }  # fmt: skip
    assert overall["metric"] == "geneval" and overall["value"] == pytest.approx(4.5 / 6)
    assert [(each["image"], each["tag"]) for each in overall["failures"]] == [
        ("4.png", "position"), ("6.png", "counting"),
    ]  # fmt: skip
    assert "Mask2Former" in overall["warning"] and overall["parameters"]["images"] == 7
    some = prompted_images(tmp_path / "drawn", limit=5)
    overall, *tasks = scores_of(geneval_scores, some, asked, detector, clip)
    assert overall["value"] is None and "no images of color_attr" in overall["warning"] and len(tasks) == 5
    json.dumps([overall, *tasks])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"tag": "colour"}, "tag 'colour' is none of single_object"),
        ({"prompt": ""}, "prompt: String should match"),
        ({"include": []}, "include: List should have at least 1 item"),
        ({"include": [{"count": 1}]}, "include.0.class: Field required"),
        ({"include": [{"class": "dog"}]}, "include.0.count: Field required"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "'mauve' is none of its colors"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "position"),
    ],
)
def test_geneval_in_another_layout_is_refused(tmp_path, line, problem):
    good = {"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **line}))
    with pytest.raises(VugenError, match=f"object 2 is not as GenEval's .*{problem}"):
        read_geneval(path)


def test_geneval_that_cannot_be_used_is_refused(tmp_path, clip_name, yolos):
    with pytest.raises(VugenError, match=r"is no file: give prompts/evaluation_metadata\.jsonl"):
        read_geneval(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(VugenError, match="is empty"):
        read_geneval(tmp_path / "empty.jsonl")
    path = write_geneval(tmp_path / "m.jsonl")
    drawn = write_samples(tmp_path / "drawn", [("a photo of two_object", 1)])
    given = {"geneval": path, "clip": clip_name, "detector": yolos}
    for change, message in (
        ({"clip": None}, "--geneval needs a CLIP"),
        ({"detector": None}, "--geneval needs a detector"),
        ({"detector": tmp_path}, r"has no config\.json"),
    ):
        with pytest.raises(VugenError, match=message):
            score_prompts(open_image_set(drawn), **{**given, **change})
    with pytest.raises(VugenError, match="knows no computer mouse"):
        score_prompts(open_image_set(drawn), **given)
    write_samples(drawn, [("a bear", 1)])
    with pytest.raises(VugenError, match=r"the prompt of 0\.png, 'a bear', is none of"):
        score_prompts(open_image_set(drawn), **given)


def test_colours_are_clips_zero_shot_choice_over_the_crop(clip):
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=generator)
    mask = np.zeros((40, 50), bool)
    mask[5:25, 10:40] = True
    objects = [Found("dog", 0.9, (10.4, 5.2, 39.6, 25.0)), Found("dog", 0.8, (10, 5, 40, 25), mask)]
    named = color_namer(clip)(image, objects, "dog")
    pixels = image.permute(1, 2, 0).numpy()
    assert (pixels[5:25, 10:40] != 0x99).any()
    outside = np.where(mask[..., None], pixels, np.uint8(0x99))
    rows = []
    for color in geneval.COLORS:
        texts = [
            f"a photo of a {color} dog",
            f"a photo of a {color}-colored dog",
            f"a photo of a {color} object",
        ]
        each = torch.nn.functional.normalize(clip.encode_texts(texts)[0], dim=1).mean(0)
        rows.append(each / each.norm())
    for name, crop in zip(named, (pixels[5:25, 10:40], outside[5:25, 10:40]), strict=True):
        seen = clip.encode_pictures([Image.fromarray(np.ascontiguousarray(crop))])[0]
        assert name == geneval.COLORS[int((torch.stack(rows) @ seen).argmax())]
    crop = geneval._crop(Image.fromarray(pixels), Found("dog", 1, (0, 0, 50, 40), mask))
    assert np.array_equal(np.asarray(crop), outside)


# Detectors


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    """A YOLOS of random weights that knows dogs and cats."""
    repair_torchvision()
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        num_detection_tokens=5, id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1},
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("yolos")
    YolosForObjectDetection(config).save_pretrained(directory)
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(directory)
    return directory


def test_a_detector_of_boxes(yolos):
    detector = load_detector(yolos)
    image = torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8)
    objects = detector.find(image)
    assert len(objects) == 5 and detector.labels == {"dog", "cat"} and detector.kind == "yolos"
    for each in objects:
        left, top, right, bottom = each.box
        assert each.label in detector.labels and 0 < each.score < 1 and each.mask is None
        assert 0 <= (left + right) / 2 <= 50 and 0 <= (top + bottom) / 2 <= 30
    assert detector.find(image) == objects


def test_a_segmenter(tmp_path):
    repair_torchvision()
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16, num_queries=4,
        id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    detector = load_detector(tmp_path)
    objects = detector.find(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8))
    assert detector.kind == "mask2former" and objects
    for each in objects:
        left, top, right, bottom = map(int, each.box)
        assert each.mask.shape == (40, 50) and each.mask[top:bottom, left:right].sum() == each.mask.sum()
        assert 0 < each.score <= 1


def test_instances_are_found_where_the_unpadded_masks_are():
    classes = torch.full((1, 2, 3), -20.0)
    classes[0, 0, 1] = classes[0, 1, 2] = 20  # the first query is a cat, the second is nothing
    masks = torch.full((1, 2, 16, 16), -8.0)
    masks[0, :, 4:8, 2:6] = 8.0
    inputs = {"pixel_values": torch.zeros(1, 3, 64, 64), "pixel_mask": torch.zeros(1, 64, 64)}
    inputs["pixel_mask"][:, :32, :48] = 1  # the picture fills half the height and three quarters of the width
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    objects = _instances(outputs, inputs, (320, 480), {0: "dog", 1: "cat"})
    (cat,) = (each for each in objects if each.score > 0.5)
    assert cat.label == "cat" and cat.score > 0.9
    # Rows 4 to 8 of 16 are pixels 16 to 32 of the padded 64, and ten times that of the picture.
    np.testing.assert_allclose(cat.box, (80, 160, 240, 320), atol=8)
    assert cat.mask.shape == (320, 480) and cat.mask[200, 160] and not cat.mask[200, 300]


def test_other_models_are_no_detectors(tmp_path, vlm_path, yolos):
    with pytest.raises(VugenError, match="holds a llava model: give an object detector"):
        load_detector(vlm_path)
    for file in yolos.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(yolos / "model.safetensors")
    first = sorted(weights)[0]
    save_file(
        {name: each for name, each in weights.items() if name != first},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(VugenError, match="lacks weights"):
        load_detector(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(VugenError, match="could not be loaded"):
        load_detector(tmp_path)


# All of it together


def test_the_command_reports_all_scores_in_one_table(tmp_path, monkeypatch, clip_name, yolos, asked_path):
    monkeypatch.chdir(tmp_path)
    bench = write_dpg(tmp_path / "bench")
    folder = tmp_path / "drawn"
    for item in ("0", "coco7"):
        save_image(folder / f"{item}.png", 50, size=(64, 64))
    arguments = [
        "prompts",
        "--clip-score",
        "--clip",
        clip_name,
        "--vqa-score",
        "--dpg-bench",
        bench,
        "--grid",
    ]
    result = CliRunner().invoke(app, list(map(str, [*arguments, "--vlm", asked_path, "--images", folder])))
    assert result.exit_code == 0, (result.output, result.exception)
    assert "DPG-Bench, judged by tiny" in result.output and "CLIPScore (tiny-of-prompts)" in result.output
    report = json.loads((tmp_path / "prompt-scores.json").read_text())
    scores = by_name(report["scores"])
    assert {"clip_score", "clip_cosine", "vqa_score", "dpg_bench", "dpg_bench_entity"} <= set(scores)
    assert scores["vqa_score"]["parameters"]["images"] == 8 and report["images"]["count"] == 2
    assert report["prompts"] == {"count": 2, "source": "the names of the files", "grid": True}
    assert (
        scores["dpg_bench"]["parameters"]["vlm"] == str(asked_path) and report["versions"]["open-clip-torch"]
    )

    path = write_geneval(tmp_path / "m.jsonl", {"colors": ASKED["colors"], "position": ASKED["position"]})
    write_samples(tmp_path / "samples", [("a photo of colors", 9), ("a photo of position", 90)])
    result = CliRunner().invoke(
        app, ["prompts", "--geneval", str(path), "--detector", str(yolos), "--clip", clip_name]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    scores = by_name(json.loads((tmp_path / "prompt-scores.json").read_text())["scores"])
    assert set(scores) == {"geneval", "geneval_colors", "geneval_position"}
    assert scores["geneval"]["parameters"]["detector_type"] == "yolos" and scores["geneval"]["value"] is None


def test_samples_are_scored_as_a_set_and_against_their_prompts(tmp_path, asked_path):
    samples = write_samples(tmp_path / "samples", [("a bear", 9), ("a cat", 90), ("a dog", 30)])
    out = tmp_path / "scores.json"

    def report(*arguments):
        result = CliRunner().invoke(app, list(map(str, [*arguments, "--images", samples, "--out", out])))
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(out.read_text())

    of_set = report("--fid", "--features", f"vlm:{asked_path}", "--reference", samples, "--no-cache")
    assert [entry["metric"] for entry in of_set["scores"]] == ["frechet_vlm"]
    assert of_set["reference"]["count"] == 3
    of_prompts = report("prompts", "--vqa-score", "--vlm", asked_path)
    assert [entry["metric"] for entry in of_prompts["scores"]] == ["vqa_score"]
    assert of_prompts["prompts"]["source"] == "samples.jsonl"
    result = CliRunner().invoke(app, ["prompts", "--clip-score", "--images", str(samples)])
    assert isinstance(result.exception, VugenError) and "--clip-score needs a CLIP" in str(result.exception)


def test_a_folder_of_prompts_without_any_is_refused(tmp_path):
    with pytest.raises(VugenError, match=r"holds no \.txt"):
        collect_prompts([], tmp_path)
