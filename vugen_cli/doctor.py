"""`vugen doctor`: what is here to draw with, each thing good or with what to do about it.

Every check imports what it needs itself and may fail in any way: that is then what it found.
"""

import contextlib
import getpass
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import is_bundled, user_cache
from vugen_cli.hub import hub_problem
from vugen_cli.metrics.report import Record
from vugen_cli.version import __version__

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["good", "advice", "bad"]
HUB_SECONDS = 4.0
NEEDED = ("device", "disk", "sample")  # checks without which nothing is drawn
ROOM = 2e9  # bytes of memory and of disk below which drawing or its pictures may not fit
SHOWN = ("torch", "torchvision", "transformers", "diffusers", "safetensors", "huggingface-hub", "numpy")
SETTINGS = (  # that change what happens; of others not even the names are shown
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_HOME",
    "VUGEN_CACHE",
)


class Check(Record):
    """One thing that was looked at."""

    name: str = Field(description="what it is")
    state: State = Field(description="`good`, `advice` (drawing works without) or `bad` (it does not)")
    found: str = Field(description="what is there")
    do: str = Field("", description="what to do, where it is not good")


class Diagnosis(Record):
    """What `vugen doctor` found."""

    works: bool = Field(description="whether `vugen sample` works here; the exit status is 1 if not")
    checks: list[Check] = Field(description="in the order in which they were made")
    system: dict[str, str] = Field({}, description="with `--bug-report`: platform, packages and settings")

    @property
    def status(self) -> int:
        """The exit status."""
        return 0 if self.works else 1


def diagnose(device: str | None = None, bug_report: bool = False) -> Diagnosis:
    """Look at everything, in a few seconds, and draw a small picture to see that it works.

    Args:
        device: as `--device`; default what `vugen sample` would take.
        bug_report: add what a stranger needs to know, and leave out who and where the user is.
    """
    found: list[Check] = []
    for name, look in checks(device).items():
        try:
            found += [Check(name=name, state=state, found=what, do=do) for state, what, do in look()]
        except Exception as error:  # a broken library fails in its own way: that is what this is for
            kind = "" if isinstance(error, VugenError) else f"{type(error).__name__}: "
            state: State = "bad" if name in NEEDED else "advice"
            found.append(Check(name=name, state=state, found=kind + first_line(error)))
    works = all(check.state != "bad" for check in found)
    if not bug_report:
        return Diagnosis(works=works, checks=found)
    for check in found:
        check.found, check.do = without_names(check.found), without_names(check.do)
    system = {name: without_names(value) for name, value in about_system().items()}
    return Diagnosis(works=works, checks=found, system=system)


Found = Iterator[tuple[State, str, str]]


def checks(device: str | None) -> dict[str, Callable[[], Found]]:
    """The checks by name, each yielding lines of state, what is there and what to do; the last one draws."""
    return {
        "vugen": lambda: iter([("good", __version__, "")]),
        "python": lambda: iter([("good", platform.python_version(), "")]),
        "packages": _packages,
        "torchvision": _torchvision,
        "device": lambda: _device(device),
        "precision": lambda: _precision(device),
        "attention": lambda: _attention(device),
        "compiler": lambda: _compiler(device),
        "memory": _memory,
        "disk": _disk,
        "cache": _cache,
        "hub": _hub,
        "Inception": _inception,
        "LPIPS": _lpips,
        "extras": _extras,
        "sample": lambda: _sample(device),
    }


def _packages() -> Found:
    """What the package says it needs, against what is installed."""
    needed = [each for each in requirements() if "extra ==" not in str(each.marker)]
    if not needed:
        yield "advice", "vugen-cli runs from a folder that is not installed", "pip install -e ."
        return
    installed = versions_of([each.name for each in needed])
    wrong = [each for each in needed if not each.specifier.contains(installed[each.name], prereleases=True)]
    for each in wrong:
        yield "advice", f"{each.name} {installed[each.name] or 'is missing'}", f'pip install -U "{each}"'
    if not wrong:
        shown = versions_of(list(SHOWN))
        yield "good", ", ".join(f"{name} {version}" for name, version in shown.items() if version), ""


def _torchvision() -> Found:
    """Whether its compiled part fits torch; see `torchvision_repair`."""
    from vugen_cli.torchvision_repair import repair_torchvision

    repaired = repair_torchvision()
    import torch
    import torchvision

    pair = f"{torchvision.__version__} beside torch {torch.__version__}"
    if repaired:
        yield (
            "advice",
            f"{pair}: of another build, so without compiled operators; only detectors need them",
            "install both of one build: both for the CPU, or both for one version of CUDA",
        )
    else:
        yield "good", pair, ""


def _device(device: str | None) -> Found:
    import torch

    from vugen_cli.engine.device import cpu_flags, pick_device

    where = pick_device(device)
    if where.type == "cuda":
        about = torch.cuda.get_device_properties(where)
        capability = f"compute capability {about.major}.{about.minor}, CUDA {torch.version.cuda}"
        yield "good", f"{about.name}, {about.total_memory / 1e9:.0f} GB, {capability}", ""
        return
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu_flags()]
    cpu = f"{os.cpu_count()} CPU cores ({', '.join(flags) or platform.machine()})"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield "good", f"{cpu}; CUDA_VISIBLE_DEVICES hides all GPUs", ""
    elif device is None and Path("/dev/nvidia0").exists():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        yield (
            "advice",
            f"{cpu}; there is an NVIDIA GPU, which this torch, built for {built}, cannot use",
            "install a torch for the CUDA version that nvidia-smi names",
        )
    else:
        yield "good", cpu if where.type == "cpu" else f"{where.type}, {cpu}", ""


def _precision(device: str | None) -> Found:
    from vugen_cli.engine.device import pick_device
    from vugen_cli.engine.precision import wants_bfloat16

    where = pick_device(device)
    names = {True: "bfloat16", False: "float32"}
    training, drawing = (names[wants_bfloat16("auto", where, training)] for training in (True, False))
    yield "good", f"`auto` trains in {training} and draws in {drawing}", ""


def _attention(device: str | None) -> Found:
    """Which of torch's kernels run here: of the flash kernel without a mask, of the others with one."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from vugen_cli.engine.device import pick_device

    where = pick_device(device)
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "plain": SDPBackend.MATH,
    }
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    q = torch.zeros(1, 2, 16, 64, device=where, dtype=dtype)
    mask = torch.ones(1, 1, 16, 16, device=where, dtype=torch.bool)
    running = []
    for name, kernel in kernels.items():
        with contextlib.suppress(RuntimeError), sdpa_kernel(kernel), _silent():
            scaled_dot_product_attention(q, q, q, None if name == "flash" else mask)
            running.append(name)
    if running in ([], ["plain"]):
        yield "advice", "the plain kernel alone", "drawing is slow and large: take a newer torch or GPU"
    else:
        yield "good", ", ".join(running), ""


def _compiler(device: str | None) -> Found:
    from vugen_cli.engine.device import pick_device

    named = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
    compiler = next((name for name in named if shutil.which(name)), None)
    on_gpu = pick_device(device).type == "cuda"
    if on_gpu and importlib.util.find_spec("triton") is None:
        yield "advice", "no triton: nothing is compiled, training is slower", "pip install triton"
    elif compiler is None:
        yield "advice", "no C++ compiler: nothing is compiled, training is slower", "install g++ (or clang++)"
    else:
        yield "good", f"{Path(compiler).name}{', triton' if on_gpu else ''}", ""


def _memory() -> Found:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = total
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    yield _room(f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", free, "close other programs")


def _disk() -> Found:
    here = Path.cwd()
    if not os.access(here, os.W_OK):
        yield "bad", f"{here} cannot be written", "go to another folder, or give --out"
        return
    free = shutil.disk_usage(here).free
    yield _room(f"{free / 1e9:.1f} GB free here", free, "free some, or give --out on another disk")


def _cache() -> Found:
    folder = user_cache()
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if os.access(standing, os.W_OK):
        yield "good", str(folder), ""
    else:
        yield "advice", f"{folder} cannot be written: features are extracted anew", "set VUGEN_CACHE"


def _hub() -> Found:
    """Within seconds: looking up a name obeys no time limit, so it is done in a thread that may be left."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        yield "good", "HF_HUB_OFFLINE is set: not asked", ""
    elif problem := within(HUB_SECONDS, lambda: hub_problem(HUB_SECONDS)):
        yield (
            "advice",
            f"not reached ({problem}); models in folders and those downloaded before work",
            "for a model of the hub: download it elsewhere and give its folder",
        )
    else:
        yield "good", "answers", ""


def _inception() -> Found:
    import torch

    from vugen_cli.metrics.inception import WEIGHTS_NAME, WEIGHTS_SHA256_PREFIX, WEIGHTS_URL

    file = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    yield _weights({file: (WEIGHTS_URL, WEIGHTS_SHA256_PREFIX)}, "FID, KID, IS and sFID")


def _lpips() -> Found:
    import torch

    from vugen_cli.metrics.lpips import FILES

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    yield _weights({folder / name: (url, "") for name, url in FILES.items()}, "LPIPS")


def _extras() -> Found:
    """Optional packages, from what the package says of itself."""
    if not requirements():
        return
    about = importlib.metadata.metadata("vugen-cli")
    here, missing = list[str](), list[str]()
    for extra in about.get_all("Provides-Extra") or []:
        asked = _of_extra("vugen-cli", extra)
        below = [each for one in asked for theirs in one.extras for each in _of_extra(one.name, theirs)]
        names = [each.name for each in asked + below]  # of fsspec[s3] what its s3 needs too
        if extra not in ("dev", "docs"):
            (here if all(versions_of(names).values()) else missing).append(extra)
    lacking = f'; not here, and each is `pip install "vugen-cli[NAME]"`: {", ".join(missing)}'
    yield "good", f"{', '.join(here) or 'none'}{lacking if missing else ''}", ""


def _sample(device: str | None) -> Found:
    """Draws with the sampler that `vugen sample` would take, in one step."""
    from vugen_cli.engine.device import pick_device
    from vugen_cli.sampling.draw import pick_sampler
    from vugen_cli.sampling.trained import load_sampler

    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        path = pick_sampler(None)
        sampler = load_sampler(path, device=pick_device(device))
        _, _, image = next(iter(sampler.sample(["a bear"], 1, steps=1)))
    name = "the bundled sampler" if is_bundled(path) else str(path)
    seconds = time.perf_counter() - started
    yield "good", f"{name} drew {image.shape[-1]} px in {seconds:.1f} s, loading included", ""


def _weights(files: dict[Path, tuple[str, str]], what: str) -> tuple[State, str, str]:
    """Whether optional files are there, whole; each with its address and how its SHA-256 begins, if known."""
    for file, (url, sha256) in files.items():
        if not file.is_file():
            return "advice", f"{file.name} is not here: no {what}", f"put {url} into {file.parent}"
        if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(sha256):
            return "advice", f"{file} is damaged or another file", f"put {url} there"
    return "good", ", ".join(file.name for file in files), ""


def _room(found: str, free: float, do: str) -> tuple[State, str, str]:
    return ("good", found, "") if free > ROOM else ("advice", found, do)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def within(seconds: float, ask: Callable[[], str]) -> str:
    """What `ask` returns, or that there was no answer in time; it may then run on."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"no answer in {seconds:.0f} s"


def requirements(package: str = "vugen-cli") -> list["Requirement"]:
    """What a package says it needs, with its extras; nothing where it is not installed."""
    from packaging.requirements import Requirement

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return [Requirement(line) for line in importlib.metadata.requires(package) or []]
    return []


def _of_extra(package: str, extra: str) -> list["Requirement"]:
    """What an extra of a package asks for."""
    return [each for each in requirements(package) if each.marker and each.marker.evaluate({"extra": extra})]


def versions_of(names: list[str]) -> dict[str, str]:
    """The installed versions of packages; empty for those that are missing."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def about_system() -> dict[str, str]:
    """Platform, packages and settings, for a bug report."""
    packages = versions_of([each.name for each in requirements()])
    installed = {name: version for name, version in packages.items() if version}
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return {"platform": platform.platform(), **installed, **settings}


def without_names(text: str) -> str:
    """A text without the user's home, the user's name as a part of a path, and what logs in to an address."""
    text = text.replace(str(Path.home()), "~") if str(Path.home()) != "/" else text
    text = re.sub(r"//[^/@\s]+@", "//", text)
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        text = re.sub(rf"(?<=/){re.escape(getpass.getuser())}(?=/|\b)", "USER", text)
    return text


def as_lines(diagnosis: Diagnosis) -> list[str]:
    """For people: a line a check, what to do under it, and the verdict."""
    lines = []
    for check in diagnosis.checks:
        lines.append(f"{check.state:6}  {check.name:11}  {check.found}")
        if check.do:
            lines.append(f"{'':21}-> {check.do}")
    verdict = "`vugen sample` works here" if diagnosis.works else "`vugen sample` does not work here"
    return [*lines, verdict]


def as_issue(diagnosis: Diagnosis) -> list[str]:
    """For an issue: a block of Markdown."""
    system = [f"{name}: {value}" for name, value in diagnosis.system.items()]
    head = ["<details><summary>vugen doctor</summary>", "", "```text"]
    return [*head, *as_lines(diagnosis), "", *system, "```", "", "</details>"]
