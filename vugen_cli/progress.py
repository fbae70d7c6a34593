"""Progress of long work: one style of bar for all commands. Imports nothing heavy."""

from collections.abc import Iterable
from typing import Any

from vugen_cli.processes import is_first

quiet = False  # set by `vugen --quiet`


def progress_bar(iterable: Iterable[Any] | None = None, *, desc: str, unit: str, **options: Any) -> Any:
    """A tqdm bar on standard error: where that is a terminal, on the first process of a job, unless `quiet`.

    Args:
        iterable: what is worked through, or None to call `update`.
        desc: what is done, in a word or two.
        unit: what is counted.
        options: more of tqdm's, as `total`; `disable=True` hides it here too.
    """
    from tqdm import tqdm

    hidden = options.pop("disable", False) or quiet or not is_first()
    return tqdm(iterable, desc=desc, unit=unit, dynamic_ncols=True, disable=hidden or None, **options)
