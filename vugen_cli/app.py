"""The `vugen` command: wires the subcommands and turns errors into one line. Imports nothing heavy."""

import contextlib
import errno
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vugen_cli import processes, progress
from vugen_cli.commands import score, study
from vugen_cli.commands.caption import caption
from vugen_cli.commands.chat import chat
from vugen_cli.commands.compare import compare
from vugen_cli.commands.config import config
from vugen_cli.commands.demo import demo
from vugen_cli.commands.doctor import doctor
from vugen_cli.commands.export import export
from vugen_cli.commands.inspect import inspect
from vugen_cli.commands.merge import merge
from vugen_cli.commands.plan import plan
from vugen_cli.commands.prepare import prepare
from vugen_cli.commands.push import push
from vugen_cli.commands.reconstruct import reconstruct
from vugen_cli.commands.runs import runs
from vugen_cli.commands.sample import sample
from vugen_cli.commands.serve import serve
from vugen_cli.commands.train_judge import train_judge
from vugen_cli.commands.train_reducer import train_reducer
from vugen_cli.commands.train_sampler import train_sampler
from vugen_cli.commands.train_vae import train_vae
from vugen_cli.commands.train_vlm import train_vlm
from vugen_cli.errors import Stopped, VugenError
from vugen_cli.version import __version__

EVERYWHERE = ("--debug", "--json", "--quiet")  # options of `vugen` that may also stand after the command


class Vugen(TyperGroup):
    """The group of all commands, in the order in which one needs them; prints what they answer as JSON."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of `COMMANDS`."""
        return list(COMMANDS)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words of the command line, with `EVERYWHERE` brought before the command."""
        end = args.index("--") if "--" in args else len(args)
        ours = [word for word in args[:end] if word in EVERYWHERE]
        others = [word for word in args[:end] if word not in EVERYWHERE]
        return super().parse_args(ctx, [*ours, *others, *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        """Run the command. With --json its answer is all that goes to standard output; the rest to error."""
        wanted = ctx.params["json"]
        with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
            answer = super().invoke(ctx)
        if wanted and answer is not None and processes.is_first():
            from pydantic import TypeAdapter

            print(TypeAdapter(type(answer)).dump_json(answer, exclude_unset=True).decode(), flush=True)
        if status := getattr(answer, "status", 0):
            raise typer.Exit(status)
        return answer


app = typer.Typer(
    name="vugen",
    cls=Vugen,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., object] | typer.Typer] = {
    "prepare": prepare,
    "caption": caption,
    "train-reducer": train_reducer,
    "train-sampler": train_sampler,
    "sample": sample,
    "merge": merge,
    "export": export,
    "push": push,
    "serve": serve,
    "score": score.app,
    "study": study.app,
    "reconstruct": reconstruct,
    "compare": compare,
    "chat": chat,
    "train-vlm": train_vlm,
    "train-judge": train_judge,
    "train-vae": train_vae,
    "inspect": inspect,
    "config": config,
    "runs": runs,
    "plan": plan,
    "demo": demo,
    "doctor": doctor,
}
ALSO = "Also --json, --quiet and --debug: see vugen --help."
for name, command in COMMANDS.items():
    if isinstance(command, typer.Typer):
        for under in command.registered_commands:
            under.epilog = ALSO
        app.add_typer(command, name=name)
    else:
        app.command(name, epilog=ALSO)(command)


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
    "train-judge",
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
    json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on standard output, all else on standard error."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Turn a vision-language model into an image generator (VUGEN).

    \b
    The line, from nothing to pictures:
      vugen prepare --dataset openmoji
      vugen train-reducer --data data/openmoji
      vugen train-sampler --reducer reducer.safetensors
      vugen sample "a bear in a forest" -n 8
      vugen score --fid

    --debug, --json and --quiet may also stand after the command.
    """
    progress.quiet = quiet
    if context.invoked_subcommand not in SPREAD:
        if not processes.is_first():
            raise typer.Exit  # the first process of the job does it alone
        if address := os.environ.pop("MASTER_ADDR", None):  # and waits for no other
            context.call_on_close(partial(os.environ.__setitem__, "MASTER_ADDR", address))


def main() -> None:
    """Run the command; a failure the user can act on ends in one line on stderr and a non-zero status."""
    debug = "--debug" in sys.argv or bool(os.environ.get("VUGEN_DEBUG"))
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal of another alphabet should not cost a result
        encoding = "utf-8" if "--json" in sys.argv else None  # as JSON is
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        app()
    except SystemExit as end:
        if end.code in (2, 130) and processes.is_first():  # of 2, Typer has said more
            if end.code == 130:
                print("interrupted", file=sys.stderr)
            _print_error("interrupted" if end.code == 130 else "the command line is not understood")
        raise
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


def _print_error(message: str) -> None:
    """What stands on standard output in place of an answer, where that was to be JSON."""
    if "--json" in sys.argv:
        from json import dumps

        with contextlib.suppress(OSError):  # which may be the failure
            print(dumps({"error": message}, ensure_ascii=False), flush=True)


def _end(line: str, status: int) -> None:
    sys.stdout.flush()
    if processes.has_the_last_word():
        print(line, file=sys.stderr, flush=True)
        _print_error(line.removeprefix("error: "))
    if processes.world_size() > 1:
        for child in multiprocessing.active_children():
            child.terminate()  # a loader's workers would outlive an exit that tells nobody
        os._exit(status)  # parting in good order would wait for processes that may wait for this one
    sys.exit(status)


if __name__ == "__main__":
    main()
