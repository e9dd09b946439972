"""`aroma bench`: what a training step costs, method by method."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import bad_value
from . import bench_run
from .extras import require_extra
from .texts import examples

if TYPE_CHECKING:
    from ..lab.bench.result import BenchResult

_SHAPES = "roberta-base, minilm, tiny"


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure what a training step costs in time and memory, method by method",
        description=(
            "Measure what a training step costs: every method takes one step after the other, in turns, in one\n"
            "process. Ratios to the floor (the frozen backbone, forward and backward), bytes kept for backward, peak\n"
            "memory, optimizer state, trainable parameters, and the cost of AROMA's controller; as a table, JSON and\n"
            "a picture. Weights and tokens are random: nothing is downloaded for a named shape."
        ),
        epilog=examples(
            "aroma bench",
            "aroma bench --model minilm --batch-size 16 --length 64 --out minilm.json",
            "aroma bench --only lora-r8 aroma-0 aroma-8 --rounds 21 --threads 1",
            "aroma bench --device cuda --dtype bfloat16 --batch-size 32",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser)
    _add_measuring_options(parser)
    # PyTorch's own way of waiting: what is measured is what a script of the user's costs.
    parser.set_defaults(run=run, waits_passively=False)
    subcommands = parser.add_subparsers(title="further benchmarks", metavar="COMMAND")
    bench_run.add_parser(subcommands)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
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


def _add_measuring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of every case (%(default)s)")
    parser.add_argument("--warmup-rounds", type=int, default=2, help="steps of every case before (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice)")
    parser.add_argument("--only", metavar="CASE", nargs="+", help="measure these cases and the floor (all)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="measure each case with torch.compile too (on CUDA: yes; on a CPU: no)",
    )
    parser.add_argument(
        "--peak",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory; on a CPU in a process of its own for every case (yes)",
    )
    parser.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep freed memory in the process: page faults are left out of the times, and most of the noise (yes)",
    )
    parser.add_argument(
        "--out", metavar="FILE", default="bench.json", help="new .json file; the picture goes beside it (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure; print the tables; write the results and the picture."""
    require_extra("plot")
    out, picture = _new_files(arguments.out)
    from .quiet import quiet

    quiet()
    from ..files import write_json
    from ..lab.bench.measure import measure
    from ..lab.bench.picture import bench_picture
    from ..lab.bench.settings import BenchSettings

    settings = BenchSettings(
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
        compiled=arguments.device == "cuda" if arguments.compile is None else arguments.compile,
        peak=arguments.peak,
        keep_memory=arguments.keep_memory,
    )
    result = measure(settings, phase=_timed_phase)
    write_json(out, result.as_dict())
    bench_picture(result, picture)
    _print(result)
    _print_lines([f"Left: {out}, {picture}."])


def _new_files(out: str) -> tuple[Path, Path]:
    """Return the files to write, results and picture.

    Raises:
        ConfigError: One of them is there already, or the name does not end in .json.
    """
    results = Path(out)
    if results.suffix != ".json":
        raise bad_value("--out", out, "the name of the results must end in .json; the picture's ends in .png")
    picture = results.with_suffix(".png")
    for file in (results, picture):
        if file.exists():
            raise bad_value("--out", out, f"{file} exists; give another name, or move it away")
    return results, picture


def _print(result: BenchResult) -> None:
    from rich.console import Console

    from ..lab.bench.table import comparison_table, growth_lines, machine_lines, roofline_lines, size_table, time_table

    console = Console()
    console.print(time_table(result))
    console.print(size_table(result))
    if result.comparisons:
        console.print(comparison_table(result.comparisons))
    _print_lines([*growth_lines(result), *roofline_lines(result), *machine_lines(result)])


def _print_lines(lines: list[str]) -> None:
    from rich.console import Console

    console = Console(markup=False, soft_wrap=True)
    for line in lines:
        console.print(line, highlight=False)


@contextmanager
def _timed_phase(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with the time left on standard error while the phase lasts; a `lab.phases.Phase`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    with Progress(*columns, left, console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=total)
        yield lambda done: progress.advance(bar, done)
