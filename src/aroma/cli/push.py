"""`aroma push`: a saved adapter as a repository of the Hugging Face hub, after the user's word."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .texts import add_command

if TYPE_CHECKING:
    from ..hub import Upload


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "push",
        "upload an adapter to the Hugging Face hub, after asking",
        "Verify an adapter, show what would be uploaded to the hub, and upload it if you agree.",
        "aroma push runs/mrpc/adapter ann/roberta-mrpc --private --license apache-2.0",
        "aroma push served ann/served --yes",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter that AROMA saved or exported")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME, or a NAME of your own account")
    parser.add_argument("--private", action="store_true", help="only you, or your organisation, will see it")
    parser.add_argument("--license", metavar="NAME", help="licence of the adapter, such as apache-2.0, for its card")
    parser.add_argument("--update", action="store_true", help="add a commit to a repository that exists")
    parser.add_argument("--yes", action="store_true", help="upload without asking")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show, ask, and upload; 1 where the answer is no."""
    from ..files import require_adapter_folder
    from .quiet import quiet

    require_adapter_folder(arguments.adapter)  # before PyTorch is loaded
    quiet()
    from ..hub import account, plan_upload, push

    owner = account()  # before the work: without a token there is nothing to ask
    upload = plan_upload(arguments.adapter, arguments.repo, arguments.license)
    show(upload, owner, private=arguments.private, update=arguments.update)
    if not arguments.yes and not _agreed():
        print("nothing was uploaded")
        return 1
    print(push(upload, private=arguments.private, update=arguments.update))
    return 0


def show(upload: Upload, owner: str, *, private: bool, update: bool) -> None:
    """Print what would be uploaded, where to, and who will see it."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("file", "size", title=f"to {upload.repo}, as {owner}")
    for name in sorted(upload.files):
        table.add_row(name, decimal(upload.size_of(name)))
    console = Console(markup=False, soft_wrap=True)
    console.print(table)
    if upload.left_out:
        console.print(f"Left out: {', '.join(upload.left_out)}")
    if upload.is_own_card:
        console.print("README.md is yours, and goes as it is.")
    if upload.base_path is not None:
        console.print(
            f"adapter_config.json names the base model by a folder of this machine, {upload.base_path}, which others "
            "do not have: set base_model_name_or_path to its name on the hub first, if it has one."
        )
    seen = "private" if private else "public: everybody will see it"
    console.print("The repository may exist." if update else f"The repository will be new, and {seen}.")


def _agreed() -> bool:
    """Ask; True for y or yes.

    Raises:
        ConfigError: Nobody can answer.
    """
    if not sys.stdin.isatty():
        raise ConfigError("--yes: missing, and there is no terminal to ask on; add it to upload without asking")
    return input("Upload? [y/N] ").strip().lower() in ("y", "yes")
