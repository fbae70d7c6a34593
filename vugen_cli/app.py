"""The `vugen` command: wires the subcommands and turns errors into one line. Imports nothing heavy."""

import errno
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vugen_cli import processes
from vugen_cli.commands import score, study
from vugen_cli.commands.caption import caption
from vugen_cli.commands.chat import chat
from vugen_cli.commands.compare import compare
from vugen_cli.commands.demo import demo
from vugen_cli.commands.export import export
from vugen_cli.commands.inspect import inspect
from vugen_cli.commands.merge import merge
from vugen_cli.commands.plan import plan
from vugen_cli.commands.prepare import prepare
from vugen_cli.commands.push import push
from vugen_cli.commands.reconstruct import reconstruct
from vugen_cli.commands.sample import sample
from vugen_cli.commands.train_reducer import train_reducer
from vugen_cli.commands.train_sampler import train_sampler
from vugen_cli.commands.train_vae import train_vae
from vugen_cli.commands.train_vlm import train_vlm
from vugen_cli.errors import Stopped, VugenError
from vugen_cli.version import __version__


class InOrder(TyperGroup):
    """Lists commands, and groups of commands among them, in the order in which one needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of `COMMANDS`."""
        return list(COMMANDS)


app = typer.Typer(
    name="vugen",
    cls=InOrder,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None] | typer.Typer] = {
    "prepare": prepare,
    "caption": caption,
    "train-reducer": train_reducer,
    "train-sampler": train_sampler,
    "sample": sample,
    "merge": merge,
    "export": export,
    "push": push,
    "score": score.app,
    "study": study.app,
    "reconstruct": reconstruct,
    "compare": compare,
    "chat": chat,
    "train-vlm": train_vlm,
    "train-vae": train_vae,
    "inspect": inspect,
    "plan": plan,
    "demo": demo,
}
for name, command in COMMANDS.items():
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vugen {__version__}")
        raise typer.Exit


SPREAD = (
    "prepare",
    "caption",
    "train-reducer",
    "train-sampler",
    "train-vlm",
    "train-vae",
    "sample",
    "reconstruct",
    "score",
    "study",
)  # share their work out


@app.callback()
def vugen(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    """Turn a vision-language model into an image generator (VUGEN).

    \b
    The line, from nothing to pictures:
      vugen prepare --dataset openmoji
      vugen train-reducer --data data/openmoji
      vugen train-sampler --reducer reducer.safetensors
      vugen sample "a bear in a forest" -n 8
      vugen score --fid
    """
    if context.invoked_subcommand not in SPREAD and not processes.is_first():
        raise typer.Exit  # the first process of the job does it alone


def main() -> None:
    """Run the command; a failure the user can act on ends in one line on stderr and a non-zero status."""
    debug = "--debug" in sys.argv or bool(os.environ.get("VUGEN_DEBUG"))
    sys.argv[1:] = [a for a in sys.argv[1:] if a != "--debug"]  # accepted before and after the subcommand
    try:
        app()
    except Stopped as stopped:
        _end(str(stopped), 130)
    except VugenError as error:
        if debug:
            raise
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except OSError as error:
        if debug:
            raise
        advice = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        where = f" ({error.filename})" if error.filename else ""
        _end(f"error: {error.strerror or error}{where}{advice}", 1)
    except Exception as error:
        if debug:
            raise
        if processes.is_lost_peer(error):
            _end(f"error: {processes.LOST}", 1)
        line = (str(error).strip() or "no message").splitlines()[0]
        _end(f"error: {type(error).__name__}: {line}; run again with --debug for the traceback", 1)


def _end(line: str, status: int) -> None:
    sys.stdout.flush()
    if processes.has_the_last_word():
        print(line, file=sys.stderr, flush=True)
    if processes.world_size() > 1:
        for child in multiprocessing.active_children():
            child.terminate()  # a loader's workers would outlive an exit that tells nobody
        os._exit(status)  # parting in good order would wait for processes that may wait for this one
    sys.exit(status)


if __name__ == "__main__":
    main()
