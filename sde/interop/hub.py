"""`python -m sde.interop.hub`: exported folders to the Hugging Face hub, and from there.

    python -m sde.interop.hub push folder=my-model repo=user/name
    python -m sde.interop.hub pull repo=user/name                      # to the folder user/name, or folder=...

A folder is one that `python -m sde.interop.export` wrote. What is pulled is its three files and nothing else, none of
which can run code. Needs the package huggingface_hub (`pip install "sde[hub]"`), and to push a token: `hf auth login`,
or HF_TOKEN in the environment.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from sde.cli import run_command
from sde.errors import UserError
from sde.interop.folders import CONFIG, WEIGHTS, read_folder

FILES = [WEIGHTS, CONFIG, "README.md"]
T = TypeVar("T")

# Variables of the environment that keep huggingface_hub from the network, and what they say to do so.
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")


def push(folder: Path, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Upload an exported folder and return its address; the repository is made if need be.

    Args:
        folder: an exported folder.
        repo: "user/name".
        private: make a new repository private.
        revision: branch; None for the main one.

    Raises:
        UserError: the folder is not whole, or the hub cannot be reached or refuses.
    """
    _check_repo(repo)
    read_folder(folder)

    def upload(hub: ModuleType) -> str:
        api = hub.HfApi()
        api.create_repo(repo_id=repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), revision=revision, allow_patterns=FILES)
        return f"https://huggingface.co/{repo}"

    return _ask(upload, repo)


def pull(repo: str, folder: Path, revision: str | None = None) -> Path:
    """Download an exported folder and return it.

    Args:
        repo: "user/name".
        folder: where to.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        UserError: the hub cannot be reached or refuses, or what it has is not an exported folder.
    """
    _check_repo(repo)

    def download(hub: ModuleType) -> Path:
        hub.snapshot_download(repo_id=repo, revision=revision, local_dir=str(folder), allow_patterns=FILES)
        return folder

    read_folder(_ask(download, repo))
    return folder


def _check_repo(repo: str) -> None:
    if len(repo.split("/")) != 2 or not all(repo.split("/")):
        raise UserError(f"repo={repo} is not the name of a repository: write it as user/name")


def _ask(action: Callable[[ModuleType], T], repo: str) -> T:
    """`action(huggingface_hub)`, with whatever goes wrong there in one sentence."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError('the hub needs the package huggingface_hub: pip install "sde[hub]"') from error
    try:
        return action(hub)
    except errors.LocalTokenNotFoundError as error:
        raise UserError("there is no token for the hub: run hf auth login, or set HF_TOKEN") from error
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(error, repo)) from error
    except errors.HFValidationError as error:
        raise UserError(f"repo={repo} is not the name of a repository ({_first_line(error)}): correct it") from error
    except Exception as error:  # the clients under huggingface_hub have changed, and each has errors of its own
        names = {cls.__name__ for cls in type(error).__mro__}
        if not names & {"ConnectionError", "TransportError", "RequestException", "TimeoutError", "EntryNotFoundError"}:
            raise
        for name in _OFFLINE:
            if os.environ.get(name, "").upper() in _TRUE:
                raise UserError(f"{name} is set, so that the hub is not asked for {repo}: unset it") from error
        raise UserError(f"the hub cannot be reached ({_first_line(error)}): check the network, or try later") from error


def _refusal(error: Exception, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the hub knows no {repo} that it may show or change without a token: run hf auth login, or set HF_TOKEN"
    if status == 403:
        return f"the hub does not let this token change {repo}: give one with the right to write, or another repo="
    if status == 404:
        return f"the hub has no {repo} or not this revision: check repo= and revision="
    return f"the hub refused ({_first_line(error)}): try later"


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(line, 200, placeholder=" ...")


def push_folder(config: dict[str, Any]) -> None:
    """Push `folder` to `repo`."""
    if config["folder"] is None:
        raise UserError("folder= is missing: give one that python -m sde.interop.export wrote")
    folder = Path(str(config["folder"])).expanduser()
    print(push(folder, str(config["repo"]), config["private"], config["revision"]))


def pull_folder(config: dict[str, Any]) -> None:
    """Pull `repo` to `folder`."""
    folder = Path(str(config["repo"] if config["folder"] is None else config["folder"])).expanduser()
    pull(str(config["repo"]), folder, config["revision"])
    print(f"draw samples with: python -m sde.sample run={folder}")


COMMANDS = {"push": push_folder, "pull": pull_folder}


def main() -> None:
    """Entry point of the command line, whose first word is the command."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in COMMANDS:
        print(f"error: {word!r} is not one of {', '.join(COMMANDS)}: write it first", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    run_command("hub", COMMANDS[word])


if __name__ == "__main__":
    main()
