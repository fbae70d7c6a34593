"""Where a run's numbers go beside `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio; each an extra."""

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import whole_file

PROJECT = "vugen"
Config = dict[str, Any]  # what shaped a run, as plain values


@dataclass
class Logger:
    """One open log: a function that adds a step's numbers, and one that ends it."""

    name: str
    add: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


class Loggers:
    """The logs that a recipe names under `log`. One that fails later is dropped; training goes on.

    Args:
        names: of `OPEN`.
        run: the run's folder; its name is the run's.
        first: the step that the run begins at; what a log holds from there on is done again.
        config: what shaped the run, as plain values.

    Raises:
        VugenError: a package is missing, or a log cannot be begun.
    """

    def __init__(self, names: Sequence[str], run: Path, first: int, config: Config):
        self.open: list[Logger] = []
        for name in names:
            try:
                self.open.append(OPEN[name](run, first, config))
            except ImportError as error:
                raise VugenError(
                    f"log: {name} needs a package that is missing ({error}): "
                    f'pip install "vugen-cli[{name}]", or leave it out of the recipe'
                ) from error
            except Exception as error:  # each service has its own kinds: not logged in, no network, bad name
                raise VugenError(f"log: {name} cannot be begun: {first_line(error)}") from error

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add a step's numbers to every log."""
        for logger in list(self.open):
            try:
                logger.add(values, step)
            except Exception as error:
                tqdm.write(f"log: {logger.name} failed and is left out from here on: {first_line(error)}")
                self.open.remove(logger)

    def close(self) -> None:
        """Send what is left and end."""
        for logger in self.open:
            try:
                logger.close()
            except Exception as error:
                tqdm.write(f"log: {logger.name} could not be ended: {first_line(error)}")


def _tensorboard(run: Path, first: int, _config: Config) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def add(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Logger("tensorboard", add, writer.close)


def _wandb(run: Path, first: int, config: Config) -> Logger:
    import wandb

    # A resumed run goes on in the same place: its name there is kept beside its states.
    kept = run / "wandb-id.txt"
    if first == 0 or not kept.exists():
        kept.write_text(secrets.token_hex(8), encoding="utf-8")
    known = kept.read_text(encoding="utf-8")
    begun = wandb.init(project=PROJECT, name=run.stem, id=known, resume="allow", dir=str(run), config=config)
    return Logger("wandb", lambda values, step: begun.log(values, step=step), begun.finish)


def _trackio(run: Path, first: int, config: Config) -> Logger:
    import trackio

    trackio.init(project=PROJECT, name=run.stem, resume="allow" if first else "never", config=config)
    return Logger("trackio", lambda values, step: trackio.log(values, step=step), trackio.finish)


OPEN: dict[str, Callable[[Path, int, Config], Logger]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


class MetricsLog:
    """`metrics.jsonl`: one line a step, and the logs that the recipe names.

    A resumed run drops the lines of steps it will do again.
    """

    def __init__(self, run: Path, first: int, names: Sequence[str], config: Config):
        self.others = Loggers(names, run, first, config)
        path = run / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] < first:
                        kept.append(line)
                except ValueError:
                    continue  # the line being written when the run was killed
        with whole_file(path) as temporary:  # a kill must not cost the history
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def add(self, **values: float) -> None:
        """Append one step."""
        rounded = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in values.items()}
        self.file.write(json.dumps(rounded) + "\n")
        self.others.add(int(rounded.pop("step")), rounded)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.others.close()
