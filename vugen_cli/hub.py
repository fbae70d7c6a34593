"""The model hub: whether it can be reached, found out in seconds, and repositories down and up."""

import glob
import re
from functools import cache
from pathlib import Path

from vugen_cli.errors import VugenError, first_line

PREFIX = "hf:"
# What a sampler, an adapter or a VLM is made of: no pickles, no code.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CONFIGS = ("*config.json",)  # what says how large a VLM is
INDEX = "model_index.json"  # which every pipeline's folder has
# What `vugen export` writes, folders whole.
EXPORTED = (
    "README.md",
    INDEX,
    "pictures.png",
    "pipeline.py",
    "sampler",
    "sampler.safetensors",
    "vlm",
)
NAME = r"[\w.-]+/[\w.-]+"  # of a repository, owner/name


def reach_hub(name: str, what: str) -> bool:
    """Whether the hub answers, for a hub id that is to be loaded.

    Left alone, the hub library retries an unreachable host for minutes.

    Args:
        name: the id, owner/name.
        what: it is, as a message begins: `the VLM`.

    Raises:
        VugenError: the hub does not answer and the model was not downloaded before, or the id can be none.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    problem = hub_problem()
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise VugenError(f"{what} {name}: {first_line(error)}") from error
    if problem and not cached:
        raise VugenError(
            f"{what} {name} is not a local directory and the hub cannot be reached ({problem}): "
            "download it elsewhere and pass its directory, or check the network"
        )
    return not problem


def hub_problem(seconds: float = 5.0) -> str:
    """Why the hub cannot be asked; empty where it answers."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=seconds).close()
    except HTTPError as error:  # a mirror may have nothing to say at its root, and the library asks elsewhere
        return "" if error.code < 500 else first_line(error)
    except (OSError, HTTPException, ValueError) as error:  # also an address that is none
        return str(getattr(error, "reason", None) or first_line(error))
    return ""


@cache  # a command may ask several times, and must get the same files
def downloaded(given: str, what: str, files: tuple[str, ...] = FILES) -> Path:
    """The local copy of a repository on the hub, as it is there now or, without a network, as it was.

    Args:
        given: `hf:owner/name`, or `hf:owner/name@revision` for a branch, a tag or a commit.
        what: it is, as a message begins: `--sampler`.
        files: patterns of those that are wanted.

    Raises:
        VugenError: it is not there, may not be read, or the hub cannot be reached and it was not downloaded
            before.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = given.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(NAME, name):
        raise VugenError(f"{what} {given}: a repository is written hf:owner/name or hf:owner/name@revision")
    problem = hub_problem()
    try:
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=list(files),
            local_files_only=bool(problem),
            endpoint=constants.ENDPOINT,
        )
    except LocalEntryNotFoundError as error:
        raise VugenError(
            f"{what} {given} was not downloaded before and the hub cannot be reached "
            f"({problem or first_line(error)}): check the network, or pass a local copy"
        ) from error
    except Exception as error:  # also its HTTP client's, which is another in each version of the library
        raise VugenError(f"{what} {given} cannot be had from the hub: {first_line(error)}") from error
    return Path(folder)


def may_be_id(name: str) -> bool:
    """Whether a name can be that of something on the hub, `owner/name`, and is not a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def push(folder: Path, name: str, private: bool = False) -> str:
    """Put the files of `to_push` into a repository on the hub, which is made if it is not there.

    Args:
        folder: from `vugen export`.
        name: of the repository, owner/name.
        private: whether only its owner may see it, if it is made now.

    Returns:
        Its address.

    Raises:
        VugenError: the hub cannot be reached, or says no.
    """
    from huggingface_hub import HfApi, constants

    if problem := hub_problem():
        raise VugenError(f"the hub cannot be reached ({problem}): {folder} is whole, push it later")
    api = HfApi(endpoint=constants.ENDPOINT)
    files = [glob.escape(path) for path, _ in to_push(folder)]  # patterns are asked for
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, commit_message="Upload by vugen push"
        )
    except Exception as error:  # as in `downloaded`
        raise VugenError(
            f"{name} was not pushed: {first_line(error)}; are you logged in (`hf auth login`), with a token "
            "that may write there?"
        ) from error
    return str(address)


def to_push(folder: Path) -> list[tuple[str, int]]:
    """The files of an exported folder that are pushed, each with its bytes: what the export wrote, unhidden.

    Raises:
        VugenError: it is no such folder.
    """
    if not (folder / INDEX).is_file():
        raise VugenError(f"{folder} is not a folder that `vugen export` wrote: it has no {INDEX}")
    inside = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    ours = [path for path in inside if path.parts[0] in EXPORTED]
    shown = [path for path in ours if not any(part.startswith(".") for part in path.parts)]
    return [(path.as_posix(), (folder / path).stat().st_size) for path in shown]
