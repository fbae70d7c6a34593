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
    from urllib.request import Request, urlopen

    from huggingface_hub import constants, try_to_load_from_cache

    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=seconds).close()
    except OSError as error:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        raise VugenError(
            f"{what} {name} is not a local directory and the hub cannot be reached ({first_line(error)}): "
            "download it elsewhere and pass its directory, or check the network"
        ) from error
    return True
