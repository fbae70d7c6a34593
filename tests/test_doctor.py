"""`vugen doctor` says what is here, in seconds, and by its exit status whether `vugen sample` works."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import vugen_here

from vugen_cli import doctor, torchvision_repair
from vugen_cli.doctor import Check, diagnose, without_names
from vugen_cli.metrics.inception import WEIGHTS_NAME


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small sampler in it."""
    shutil.copy(trained / "sampler.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(name: str, monkeypatch: pytest.MonkeyPatch) -> Check:
    """One check, made alone."""
    made = doctor.checks(None)
    monkeypatch.setattr(doctor, "checks", lambda _device: {name: made[name]})
    (check,) = diagnose().checks
    return check


def test_where_everything_is_here_it_draws_and_ends_well(place: Path) -> None:
    result = vugen_here("doctor", cwd=place)
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    assert lines[-1] == "`vugen sample` works here"
    assert {line.split()[0] for line in lines[:-1]} <= {"good", "advice", "->"}
    assert any(line.split()[:3] == ["good", "sample", "sampler.safetensors"] for line in lines)
    assert not list(place.glob("samples*")), "nothing is written"


def test_where_sampling_fails_the_status_is_1_and_the_reason_is_there(place: Path) -> None:
    file = place / "sampler.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = vugen_here("doctor", "--json", cwd=place)
    answer = json.loads(result.stdout)
    assert result.returncode == 1 and answer["works"] is False
    (bad,) = [check for check in answer["checks"] if check["state"] == "bad"]
    assert bad["name"] == "sample" and "sampler.safetensors" in bad["found"]


def test_a_report_names_no_user_no_folder_of_theirs_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("LOGNAME", "alice")
    monkeypatch.setenv("VUGEN_CACHE", "/scratch/alice/cache")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TORCH_HOME", "/home/alice/torch")
    checks = doctor.checks(None)
    monkeypatch.setattr(doctor, "checks", lambda _: {n: checks[n] for n in ("cache", "Inception", "LPIPS")})
    report = "\n".join(doctor.as_issue(diagnose(bug_report=True)))
    assert "alice" not in report and "secret" not in report
    assert (
        "/scratch/USER/cache" in report
        and "~/torch/hub" in report
        and f"torch: {torch.__version__}" in report
    )
    assert without_names("proxy http://alice:pass@proxy:80") == "proxy http://proxy:80"


def test_a_hub_that_never_answers_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.05)
    monkeypatch.setattr(doctor, "hub_problem", lambda _seconds: time.sleep(5) or "")
    started = time.perf_counter()
    check = found("hub", monkeypatch)
    assert time.perf_counter() - started < 4
    assert check.state == "advice" and "no answer in" in check.found and check.do


def test_a_torchvision_of_another_build_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_repair, "repair_torchvision", lambda: True)
    check = found("torchvision", monkeypatch)
    assert check.state == "advice" and torch.__version__ in check.found and "one build" in check.do


def test_optional_weights_are_missing_damaged_or_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hub/checkpoints" / WEIGHTS_NAME
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    made = doctor.checks(None)["Inception"]
    ((state, what, do),) = made()
    assert state == "advice" and "no FID" in what and str(file.parent) in do and "https://" in do
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half of it")
    ((state, what, _),) = made()
    assert state == "advice" and "damaged" in what
    monkeypatch.setattr("vugen_cli.metrics.inception.WEIGHTS_SHA256_PREFIX", "")
    assert [state for state, _, _ in made()] == ["good"]


def test_a_check_that_breaks_is_a_line_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Found:
        raise ImportError("libcudart.so.12: cannot open shared object file\nmore")
        yield

    for name, state in (("compiler", "advice"), ("device", "bad")):
        monkeypatch.setattr(doctor, "checks", lambda _device, name=name: {name: broken})
        (check,) = diagnose().checks
        assert check.state == state
        assert check.found == "ImportError: libcudart.so.12: cannot open shared object file"


def test_a_package_that_is_too_old_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = doctor.versions_of
    monkeypatch.setattr(doctor, "versions_of", lambda names: {**versions(names), "diffusers": "0.1"})
    check = found("packages", monkeypatch)
    assert check.found == "diffusers 0.1" and check.do.startswith('pip install -U "diffusers>=')


def test_a_folder_that_cannot_be_written_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    check = found("disk", monkeypatch)
    assert check.state == "bad" and "--out" in check.do


def test_an_extra_is_here_with_all_that_the_extras_of_its_packages_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "versions_of", lambda names: {n: "" if n == "s3fs" else "1" for n in names})
    here, missing = found("extras", monkeypatch).found.split("; not here")
    assert "remote" not in here and missing.endswith(": remote") and "serve" in here
