"""Publish a trained model on the Hugging Face Hub.

detrelay publish runs/stageinteractor-cross_stage/best USER/MODEL
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from detrelay.apps.console import Debug, read_arguments, run


@dataclass(frozen=True)
class Arguments:
    """Publish a saved model: checked, in one commit, tagged, and tested from the Hub."""

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """Folder of a saved model, such as best/ of a run."""
    repo_id: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="REPO_ID")]]
    """Name on the Hub, USER/MODEL; MODEL alone goes to your own account."""
    private: tyro.conf.FlagCreatePairsOff[bool] = False
    """Make it visible to the owners only."""
    tag: str | None = None
    """Name of this version; the next free one of v1, v2, ... if not given."""
    license: str | None = None
    """Licence of the weights, as the Hub names it, for a card that is written here; if not named,
    apache-2.0, or unknown for converted weights."""
    head: str | None = None
    """The model's head as module:ConfigClass, for a custom head."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the folder and print its files and its card, without contacting the Hub."""
    debug: Debug = False


def publish(arguments: Arguments) -> int:
    """Check, push, and print the address; returns the exit code."""
    from transformers.utils import logging as transformers_logging

    from detrelay.apps.build import head_entry
    from detrelay.core.hub.publish import publish as push

    transformers_logging.disable_progress_bar()
    if arguments.head is not None:
        head_entry(arguments.head)
    if arguments.dry_run:
        rehearse(arguments)
        return 0
    published = push(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        tag=arguments.tag,
        license=arguments.license,
    )
    who = "private" if published.private else "public"
    print(f"published: {published.url} ({who}), tag {published.tag}, commit {published.commit}")
    return 0


def rehearse(arguments: Arguments) -> None:
    """Print what would be uploaded."""
    from detrelay.core.hub.folder import complete_folder
    from detrelay.core.hub.publish import check_names

    check_names(arguments.repo_id, arguments.tag, arguments.license)

    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "model"
        checked = complete_folder(arguments.folder, copy, arguments.repo_id, arguments.license)
        for name in checked.files:
            print(f"{(copy / name).stat().st_size:12,} {name}")
        print("\n" + (copy / "README.md").read_text(encoding="utf-8"))


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: publish(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
