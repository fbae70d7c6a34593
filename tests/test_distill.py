"""Other decoders for the reducer of a checkpoint: one-step students, and decoders of their own."""

from pathlib import Path

import pytest
import torch
from test_networks import wake
from test_training import changed, metrics
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.card import VAECard
from vugen_cli.checkpoint import load_checkpoint, read_card
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Recipe
from vugen_cli.sampling.trained import load_autoencoder, load_sampler, save_autoencoder
from vugen_cli.stages.distill import distill
from vugen_cli.stages.train_reducer import train_reducer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny reducer with a decoder whose pictures depend on noise and z̃; four steps of training do not."""
    module, _, card = load_autoencoder(trained / "reducer.safetensors", CPU)
    wake(module.decoder)
    torch.nn.init.normal_(module.decoder.conv_out.weight, std=0.15)
    out = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_autoencoder(module, out, card)
    return out


@pytest.fixture(scope="module")
def student(
    teacher: Path, scenes: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A student of the teacher at four steps."""
    recipe = changed(
        tiny_recipe,
        "decoder.steps=4",
        "train_reducer.steps=60",
        "train_reducer.warmup=1",
        "train_reducer.lr=3e-3",
    )
    out = tmp_path_factory.mktemp("student") / "student.safetensors"
    return distill(recipe, teacher, scenes, out, CPU)


def test_the_student_keeps_the_reducer_and_decodes_in_one_step(
    trained: Path, teacher: Path, student: Path
) -> None:
    before, _ = load_checkpoint(teacher)
    tensors, card = load_checkpoint(student, "reducer")
    assert tensors.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, tensors[name]) == (".reducer." in name or not tensor.is_floating_point())
    assert card.recipe["decoder"]["steps"] == 1 and card.distilled and card.distilled.steps == 4
    assert card.latents == read_card(trained / "reducer.safetensors").latents


def test_one_step_of_the_student_is_nearer_to_many_of_the_teacher_than_one_of_the_teacher(
    teacher: Path, student: Path
) -> None:
    teaching = load_autoencoder(teacher, CPU)[0].decoder
    taught = load_autoencoder(student, CPU)[0].decoder
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(8, 8, 8, 4, generator=generator)
    noise = torch.randn(8, 3, 64, 64, generator=generator)
    goal = teaching.integrate(latents, noise, 4, "euler")

    def distance(decoder) -> float:  # type: ignore[no-untyped-def]
        return (decoder.integrate(latents, noise, 1, "euler") - goal).square().mean().item()

    assert distance(taught) < 0.6 * distance(teaching)
    assert torch.equal(taught.decode(latents, noise), taught.decode(latents, noise, 1))
    losses = [row["loss"] for row in metrics(student.with_suffix(".run"))]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert (student.with_suffix(".run") / "preview-0000060.png").stat().st_size


def test_a_sampler_draws_with_the_student(trained: Path, student: Path) -> None:
    sampler = load_sampler(trained / "sampler.safetensors", decoder=student)
    plain = load_sampler(trained / "sampler.safetensors")
    assert sampler.decoder.recipe.steps == 1
    (_, _, picture), (_, _, before) = next(sampler.sample(["a bear"])), next(plain.sample(["a bear"]))
    assert picture.shape == before.shape and not torch.equal(picture, before)


def test_a_decoder_of_another_reducer_is_refused(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    other = train_reducer(changed(tiny_recipe, "seed=5"), scenes, tmp_path / "other.safetensors", CPU)
    with pytest.raises(VugenError, match=r"other.safetensors decodes the latents of another reducer"):
        load_sampler(trained / "sampler.safetensors", decoder=other)


def test_a_student_of_other_networks_or_of_one_step_is_refused(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    teacher, out = trained / "reducer.safetensors", tmp_path / "s.safetensors"
    with pytest.raises(VugenError, match="decodes in one step: nothing to distill"):
        distill(tiny_recipe, teacher, scenes, out, CPU)
    with pytest.raises(VugenError, match=r"keeps the networks of .*decoder.blocks: 1 -> 2"):
        distill(changed(tiny_recipe, "decoder.blocks=2"), teacher, scenes, out, CPU)
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_its_own_teacher_alone(
    teacher: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    distill(changed(tiny_recipe, "decoder.steps=4", "train_reducer.steps=2"), teacher, scenes, out, CPU)
    out.unlink()
    with pytest.raises(VugenError, match=r"teacher\.calls: 4 -> 3"):
        distill(changed(tiny_recipe, "decoder.steps=3", "train_reducer.steps=3"), teacher, scenes, out, CPU)


def test_a_checkpoint_names_the_vae_that_it_holds_and_no_other(teacher: Path, tmp_path: Path) -> None:
    module, _, card = load_autoencoder(teacher, CPU)
    stale = card.model_copy(update={"vae": VAECard(name="x", fingerprint="0", config={})})
    save_autoencoder(module, tmp_path / "r.safetensors", stale)
    assert read_card(tmp_path / "r.safetensors").vae is None


def test_the_command_takes_recipe_and_data_from_the_teacher(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a sampler too: the bundled one has no reducer file of its own."""
    monkeypatch.chdir(tmp_path)
    sampler = str(trained / "sampler.safetensors")
    result = CliRunner().invoke(
        app,
        [
            "train-reducer",
            "--distill",
            sampler,
            "--set",
            "decoder.steps=2",
            "--steps",
            "2",
            "--out",
            "one.safetensors",
        ],
    )
    assert result.exit_code == 0, result.output
    assert "next: vugen sample" in result.output
    result = CliRunner().invoke(
        app, ["sample", "a bear", "--sampler", sampler, "--decoder", "one.safetensors"]
    )
    assert result.exit_code == 0, result.output
    assert '"decoder": "one.safetensors"' in Path("samples/samples.jsonl").read_text()


def test_another_decoder_is_trained_for_a_reducer_that_is_kept_bit_for_bit(
    trained: Path, scenes: Path, tmp_path: Path
) -> None:
    reducer, longer, other = (tmp_path / n for n in ("reducer.safetensors", "l.safetensors", "o.safetensors"))
    reducer.write_bytes((trained / "reducer.safetensors").read_bytes())
    before, _ = load_checkpoint(reducer)
    rates = ["--set", "train_reducer.lr=1e-9", "--set", "train_reducer.weight_decay=0"]
    for out, more in ((longer, rates), (other, ["--set", "decoder.channels=[8,24]"])):
        command = ["train-reducer", "--reducer", reducer, "--data", scenes, "--out", out, *more]
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0, result.exception
        after, _ = load_checkpoint(out, "reducer")
        for name, tensor in before.items():
            if ".reducer." in name:
                assert torch.equal(tensor, after[name])
            elif out == longer:  # it went on from the decoder that was there
                assert torch.allclose(tensor, after[name], atol=1e-6)
        load_sampler(trained / "sampler.safetensors", decoder=out)
    command = ["train-reducer", "--reducer", reducer, "--data", scenes, "--out", tmp_path / "x.safetensors"]
    result = CliRunner().invoke(app, [*map(str, command), "--set", "reducer.channels=5"])
    assert isinstance(result.exception, VugenError) and "reducer.channels: 4 -> 5" in str(result.exception)
