"""Whether the model hub can be reached, found out in seconds."""

from vugen_cli.errors import VugenError, first_line


def reach_hub(name: str, what: str, seconds: float = 5.0) -> bool:
    """Whether the hub answers, for a hub id that is to be loaded.

    Left alone, the hub library retries an unreachable host for minutes.

    Args:
        name: the id, owner/name.
        what: it is, as a message begins: `the VLM`.
        seconds: to wait.

    Raises:
        VugenError: the hub does not answer and the model was not downloaded before.
    """
    from huggingface_hub import try_to_load_from_cache

    problem = hub_problem(seconds)
    if problem and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise VugenError(
            f"{what} {name} is not a local directory and the hub cannot be reached ({problem}): "
            "download it elsewhere and pass its directory, or check the network"
        )
    return not problem


def hub_problem(seconds: float = 5.0) -> str:
    """Why the hub does not answer; empty if it does."""
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=seconds).close()
    except OSError as error:
        return str(getattr(error, "reason", None) or first_line(error))
    return ""
