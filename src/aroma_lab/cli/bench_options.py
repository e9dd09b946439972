"""What the benchmarks of a step have in common on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.errors import bad_value

if TYPE_CHECKING:
    from ..bench.settings import BenchSettings

_SHAPES = "roberta-base, minilm, tiny"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what is measured: model, batch, dtype, device, seed."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        default="roberta-base",
        help=f"shape ({_SHAPES}), or a folder or hub name whose configuration is taken (%(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a batch (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="backbone (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tokens (%(default)s)")


def add_round_options(parser: argparse.ArgumentParser) -> None:
    """Add how often it is measured, and which cases: rounds, threads, only, keep-memory."""
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of every case (%(default)s)")
    parser.add_argument("--warmup-rounds", type=int, default=2, help="steps of every case before (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice)")
    parser.add_argument("--only", metavar="CASE", nargs="+", help="measure these cases and the floor (all)")
    parser.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep freed memory in the process: page faults are left out of the times, and most of the noise (yes)",
    )


def settings_of(arguments: argparse.Namespace, **more: Any) -> BenchSettings:
    """Return the settings that the options of both functions above give, and `more`."""
    from ..bench.settings import BenchSettings

    return BenchSettings(
        model=arguments.model,
        batch_size=arguments.batch_size,
        length=arguments.length,
        rounds=arguments.rounds,
        warmup_rounds=arguments.warmup_rounds,
        dtype=arguments.dtype,
        device=arguments.device,
        threads=arguments.threads,
        seed=arguments.seed,
        only=tuple(arguments.only) if arguments.only else None,
        keep_memory=arguments.keep_memory,
        **more,
    )


def new_files(out: str, *suffixes: str, option: str = "--out") -> list[Path]:
    """Return the files to write, as `option` names them: results, and what goes beside them under other suffixes.

    Raises:
        ConfigError: One of them is there already, or the name does not end in .json.
    """
    results = Path(out)
    if results.suffix != ".json":
        raise bad_value(option, out, "the name of the results must end in .json")
    files = [results, *map(results.with_suffix, suffixes)]
    for file in files:
        if file.exists():
            raise bad_value(option, out, f"{file} exists; give another name, or move it away")
    return files


def print_lines(lines: Sequence[str]) -> None:
    """Print lines as they are."""
    from rich.console import Console

    console = Console(markup=False, soft_wrap=True)
    for line in lines:
        console.print(line, highlight=False)


@contextmanager
def timed_phase(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with the time left on standard error while the phase lasts; a `lab.phases.Phase`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    with Progress(*columns, left, console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=total)
        yield lambda done: progress.advance(bar, done)
