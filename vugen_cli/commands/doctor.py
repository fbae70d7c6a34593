"""`vugen doctor`."""

from typing import Annotated

import typer

from vugen_cli.commands.options import Answer, DeviceOption


def doctor(
    bug_report: Annotated[
        bool,
        typer.Option("--bug-report", help="Print a block for an issue, without names of users and folders."),
    ] = False,
    device: DeviceOption = None,
) -> Answer:
    """Look whether everything is here: each line is good, or says what to do.

    Versions, device, precision, attention kernels, torchvision, compiler, memory, disk, cache, the hub,
    optional weights and packages; at last it draws a small picture. The exit status is 0 if `vugen sample`
    works here, else 1.

    \b
    Examples:
      vugen doctor
      vugen doctor --bug-report
    """
    from vugen_cli.doctor import as_issue, as_lines, diagnose

    diagnosis = diagnose(device, bug_report)
    typer.echo("\n".join(as_issue(diagnosis) if bug_report else as_lines(diagnosis)))
    return diagnosis
