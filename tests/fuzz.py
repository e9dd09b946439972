"""What commands make of damaged adapters: every outcome is classified, and none may be silently wrong.

    python tests/fuzz.py --count 10000 --out docs/trust.md

writes the numbers by operation and by kind of damage into the page, between its marks.
"""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import io
import json
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from aroma import aroma_layers, cli
from aroma.checkpoint import verify_adapter
from aroma.errors import AromaError
from aroma.tuner import live_adapter
from aroma_lab.language.model import LanguageTask
from aroma_lab.specs import LanguageSpec, ModelSpec
from aroma_lab.tasks.task import Task, save_task
from corruptions import HANGING, KINDS, Corruption, corruption
from models import ARCHITECTURES, adapted, batch, grow, set_ranks

CLEAR, EQUAL, TOLD = "clear error", "equal", "told"
UNVOUCHED = "unvouched"
VAGUE, TRACEBACK, WRONG, HANG = "vague", "unrelated traceback", "silently wrong", "hang"
OUTCOMES = (CLEAR, EQUAL, TOLD, UNVOUCHED, VAGUE, TRACEBACK, WRONG, HANG)
FAILURES = (VAGUE, TRACEBACK, WRONG, HANG)

SECONDS = 20.0
"""An operation takes a tenth of a second; more than this is a hang, on a busy machine, too."""

MEMORY = 2 * 2**30
"""Bytes that an operation may ask for beyond what the process has."""


@dataclass(frozen=True)
class Finding:
    """One operation on one damaged folder.

    Args:
        operation: A name of `Adapter.operations`.
        harm: The damage.
        done: The damage in words.
        outcome: One of `OUTCOMES`.
        says: The message, or the traceback's last line.
    """

    operation: str
    adapter: str
    harm: Corruption
    done: str
    outcome: str
    says: str

    def __str__(self) -> str:
        return f"{self.outcome}: {self.operation} of {self.adapter}, {self.harm.name} ({self.done}): {self.says[:300]}"


# Whole adapters ------------------------------------------------------------------------------------------------------


TARGETS = ["query", "value", "attention.output.dense", "pooler.dense"]


def _paper(folder: Path, seed: int) -> None:
    """In the midst of training, with a head, tensors of the state, and matrices of rank 0."""
    fields = {"lora_alpha": 3, "inner_criterion": "update_change", "component_seed": seed, "target_modules": TARGETS}
    model = adapted("bert", _base("bert"), **fields)
    set_ranks(model, [1, 3, 0], seed=seed)
    grow(model, batch("bert", seed), 5, total_steps=20)
    next(iter(aroma_layers(model).values())).finished("default").pop(1)
    model.save_pretrained(folder)


def _start(folder: Path, seed: int) -> None:
    """Saved before any step: all ranks are 0."""
    adapted("bert", _base("bert"), component_seed=seed, target_modules=TARGETS).save_pretrained(folder)


def _language(folder: Path, seed: int) -> None:
    """A language model's, which can be written as GGUF."""
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    model = adapted("llama", _base("llama"), component_seed=seed, target_modules=targets)
    set_ranks(model, [0, 2, 5], seed=seed)
    live_adapter(model).ever_controlled = True
    model.save_pretrained(folder)


def _foreign(folder: Path, seed: int) -> None:
    """Of plain PEFT, with patterns; nothing vouches for it."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "key", "value"],
        r=4,
        lora_alpha=6,
        rank_pattern={"key": 2},
        alpha_pattern={r"^bert\.encoder\.layer\.0\.attention\.self\.key": 3, "layer.0.attention.self.query": 5},
    )
    model = get_peft_model(_base("bert"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)


@cache
def _base_folder(name: str) -> str:
    """Folder of a model of one layer, written once."""
    torch.manual_seed(1)
    config = ARCHITECTURES[name].config()
    config.num_hidden_layers = 1
    folder = Path(tempfile.mkdtemp(prefix="aroma-fuzz-")) / name
    atexit.register(shutil.rmtree, folder.parent)
    ARCHITECTURES[name].model_class(config).save_pretrained(folder)
    return str(folder)


def _base(name: str) -> Any:
    return ARCHITECTURES[name].model_class.from_pretrained(_base_folder(name))


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "paper": _paper,
    "start": _start,
    "language": _language,
    "foreign": _foreign,
}


class Adapter:
    """A whole adapter, what every operation makes of it, and a folder of another run.

    Args:
        name: One of `MAKERS`.
        home: Where to put everything.
    """

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self.home = home
        self.architecture = "llama" if name == "language" else "bert"
        self.whole, self.other = home / name, home / f"{name}-other"
        self.work = home / f"{name}-work" / "adapter"
        self.work.parent.mkdir()
        for folder, seed in ((self.whole, 5), (self.other, 6)):
            MAKERS[name](folder, seed)
            (folder / "README.md").unlink()
            (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": seed, "words": ["a", "b"]}))
            if name == "language":
                LanguageTask(LanguageSpec(), seed, ModelSpec(_base_folder("llama"))).save(folder)
            else:
                save_task(Task("classification", ("a", "b", "c"), "text", None, "label", seed), folder)
        self.operations: dict[str, Callable[[], Any]] = {
            "verify_adapter": self._verify,
            "inspect": lambda: self._command("inspect", str(self.work), "--sort", "name"),
            "export --merged": lambda: self._export("--merged"),
            "export --uniform": lambda: self._export("--uniform"),
        }
        if name == "language":
            self.operations["export --gguf"] = lambda: self._export("--gguf")
        if name == "foreign":
            del self.operations["verify_adapter"]  # nothing vouches for it

    @cached_property
    def expected(self) -> dict[str, Any]:
        """What every operation makes of the whole adapter."""
        return self._made_of(self.whole)

    @cached_property
    def expected_of_other(self) -> dict[str, Any]:
        """What every operation makes of the other run's adapter."""
        return self._made_of(self.other)

    def is_the_other(self) -> bool:
        """Whether the folder in work now is the other run's adapter, whole: then nothing is damaged."""
        return self.work.is_dir() and all(_content(self.work / name) == _content(self.other / name) for name in READ)

    def _made_of(self, folder: Path) -> dict[str, Any]:
        shutil.copytree(folder, self.work)
        found = {}
        for name in self.operations:
            with redirect_stderr(io.StringIO()) as errors:
                found[name] = self.run(name)
            assert self.name == "foreign" or not errors.getvalue(), errors.getvalue()
        self.clean()
        return found

    def clean(self) -> None:
        """Remove the damaged folder, and all that damage and operations left beside it."""
        shutil.rmtree(self.work.parent)
        self.work.parent.mkdir()

    def _clean_exports(self) -> None:
        for out in self.work.parent.glob("export*"):
            out.unlink() if out.is_file() else shutil.rmtree(out)

    def run(self, operation: str) -> Any:
        """Do one operation on the folder in work, as a user would, and return what it says or writes."""
        try:
            return self.operations[operation]()
        finally:
            self._clean_exports()

    def _verify(self) -> str:
        verify_adapter(self.work)
        return "passed"

    def as_peft_reads_it(self) -> dict[str, Tensor]:
        """Return the merged weights that plain PEFT makes of the folder in work, without patterns that it hangs on."""
        config = json.loads((self.work / "adapter_config.json").read_text())
        for field in ("rank_pattern", "alpha_pattern"):
            config[field] = {key: value for key, value in (config.get(field) or {}).items() if key not in HANGING}
        copy = shutil.copytree(self.work, self.work.parent / "copy")
        (copy / "adapter_config.json").write_text(json.dumps(config))
        merged = PeftModel.from_pretrained(_base(self.architecture), str(copy)).merge_and_unload()
        return dict(merged.state_dict())

    def _command(self, *arguments: str) -> str:
        """Run a command; its error is raised as what the user would see."""
        with (
            redirect_stdout(io.StringIO()) as output,
            redirect_stderr(io.StringIO()) as errors,
            # Once for all: they would take most of the time.
            mock.patch.object(cli, "make_parser", _parser),
            mock.patch.object(metadata, "entry_points", _entry_points),
        ):
            code = cli.main([*arguments])
        warned, _, error = errors.getvalue().partition("error: ")
        sys.stderr.write(warned)
        if code:
            raise CommandError(error.strip())
        return output.getvalue()

    def _export(self, kind: str) -> Any:
        """Export, and return what was written: tensors bit for bit, and what a configuration means."""
        out = self.work.parent / f"export{'.gguf' if kind == '--gguf' else ''}"
        self._command("export", str(self.work), str(out), kind)
        if out.is_file():
            return out.read_bytes()
        for name in COPIED:
            source = self.work / name
            written = (out / name).read_bytes() if (out / name).exists() else None
            assert written == (source.read_bytes() if source.exists() else None), f"{name}: copied wrong"
        configs = {file.name: _meaning(file) for file in sorted(out.glob("*config.json")) if file.name not in COPIED}
        tensors = {file.name: _bits(load_file(file)) for file in sorted(out.glob("*.safetensors"))}
        return configs, tensors


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


_parser = cache(cli.make_parser)
_entry_points = cache(metadata.entry_points)


def _meaning(file: Path) -> dict[str, Any]:
    """Return the fields of a configuration that say something else than PEFT's defaults."""
    fields = json.loads(file.read_text())
    defaults = LoraConfig().to_dict() if file.name == "adapter_config.json" else {}
    return {name: value for name, value in fields.items() if value != defaults.get(name) and name != "peft_version"}


def _bits(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}


class CommandError(Exception):
    """A command ended with exit code 2: its text is what the user reads."""


class TookTooLong(BaseException):
    """No operation may catch it."""


# One damage ----------------------------------------------------------------------------------------------------------


READ = {"adapter_config.json", "adapter_model.safetensors", "aroma_state.json", "aroma_state.safetensors"}
COPIED = {"tokenizer_config.json", "aroma_task.json"}


def attack(
    adapter: Adapter, harm: Corruption, seconds: float = SECONDS, operations: Iterable[str] | None = None
) -> list[Finding]:
    """Damage a copy of an adapter and try operations on it; all of them by default."""
    expected, of_other = adapter.expected, adapter.expected_of_other
    shutil.copytree(adapter.whole, adapter.work)
    # What cannot be interrupted ends the process, with a traceback.
    faulthandler.dump_traceback_later(3 * len(expected) * seconds + 30, exit=True, file=sys.__stderr__)
    try:
        done = harm.apply(adapter.work, adapter.other)
        if done is None:
            return []
        if adapter.is_the_other():
            expected = of_other
        found = [
            Finding(name, adapter.name, harm, done, *_try(adapter, name, expected[name], seconds))
            for name in operations or adapter.operations
        ]
        return [_verified(finding, found) for finding in found]
    finally:
        faulthandler.cancel_dump_traceback_later()
        adapter.clean()


def _try(adapter: Adapter, operation: str, expected: Any, seconds: float) -> tuple[str, str]:
    """Run an operation and classify how it ends."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors), _limits(seconds):
            result = adapter.run(operation)
    except TookTooLong:
        return HANG, f"more than {seconds} s"
    except (CommandError, AromaError) as error:
        return (CLEAR if _is_clear(str(error)) else VAGUE), str(error)
    except Exception as error:
        return TRACEBACK, f"{type(error).__name__}: {error}"
    read = READ | COPIED if operation in ("export --merged", "export --uniform") else READ
    if _outside(adapter.work) & read:
        return WRONG, "read or copied what lies outside of the folder"
    if result == expected:
        return EQUAL, ""
    told = [line for line in errors.getvalue().splitlines() if line.startswith("warning: ") and "/adapter" in line]
    if told:
        return TOLD, told[0]
    if adapter.name == "foreign" and operation == "export --merged" and _close(result, adapter.as_peft_reads_it()):
        return UNVOUCHED, "what PEFT makes of it, too"
    if operation == "export --merged" and _labels_alone_differ(adapter, result, expected):
        return UNVOUCHED, "aroma_task.json says so: nothing vouches for its label names"
    return WRONG, "another result"


def _labels_alone_differ(adapter: Adapter, result: Any, expected: Any) -> bool:
    """Whether another aroma_task.json gave a merged model other label names, and nothing else."""

    def without_labels(export: Any) -> Any:
        configs, tensors = export
        kept = {
            name: {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
            for name, config in configs.items()
        }
        return kept, tensors

    task, whole = (_content(folder / "aroma_task.json") for folder in (adapter.work, adapter.whole))
    return task != whole and without_labels(result) == without_labels(expected)


def _close(written: Any, model: dict[str, Tensor]) -> bool:
    """Whether the tensors of a merged export are those of a model, up to the order of sums."""
    found = {
        name: torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
        for tensors in written[1].values()
        for name, (dtype, shape, data) in tensors.items()
    }
    return found.keys() == model.keys() and all(
        torch.allclose(found[name], model[name], rtol=1e-5, atol=1e-5) for name in found
    )


def _is_clear(message: str) -> bool:
    """Whether a message is one line that says where the fault is and what to do about it."""
    places = [*READ, *COPIED, "/adapter", "adapter="]
    remedies = (
        "use another",
        "restore the",
        "give ",
        "put ",
        "upgrade",
        "set it in",
        "only plain LoRA",
        "name the modules",
        "convert",
    )
    edited = "one was edited" in message or "not a LoRA adapter" in message or "no tensors of it" in message
    return (
        len(message.splitlines()) == 1
        and any(place in message for place in (*places, "base_model="))
        and (edited or any(remedy in message for remedy in remedies))
    )


def _verified(finding: Finding, found: list[Finding]) -> Finding:
    """A folder that `verify_adapter` passes must not make another operation wrong."""
    if finding.operation == "verify_adapter" and finding.outcome == EQUAL:
        for other in found:
            if other.outcome in FAILURES:
                return Finding(**{**finding.__dict__, "outcome": WRONG, "says": f"passes, but {other}"})
    return finding


def _outside(folder: Path) -> set[str]:
    """Return the files of a folder that are symlinks to files elsewhere."""
    if folder.is_symlink() or not folder.is_dir():
        return set()
    links = [file for file in folder.iterdir() if file.is_symlink() and file.exists()]
    return {file.name for file in links if not file.resolve().is_relative_to(folder.resolve())}


@contextmanager
def _limits(seconds: float) -> Iterator[None]:
    """Bound time and memory."""

    def stop(*_: Any) -> None:
        raise TookTooLong

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, most))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
        signal.signal(signal.SIGALRM, handler)


# Many ----------------------------------------------------------------------------------------------------------------


def fuzz(
    adapters: Sequence[Adapter], numbers: Iterable[int], kinds: tuple[str, ...] | None = None, seconds: float = SECONDS
) -> Iterator[Finding]:
    """Yield the findings of corruptions by their numbers; the adapters are struck in turn."""
    for number in numbers:
        turn = number // len(kinds or KINDS)
        yield from attack(adapters[turn % len(adapters)], corruption(number, kinds), seconds)


def make_adapters(home: Path, names: Iterable[str] = tuple(MAKERS)) -> list[Adapter]:
    """Write whole adapters into `home`."""
    return [Adapter(name, home) for name in names]


def fuzz_in_processes(count: int, processes: int) -> list[Finding]:
    """Return the findings of the first `count` corruptions; however many processes share them, they are the same."""
    shares = [range(process, count, processes) for process in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [finding for share in pool.map(_share, shares) for finding in share]


def _share(numbers: Iterable[int]) -> list[Finding]:
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as home:
        return [*fuzz(make_adapters(Path(home)), numbers)]


# The page ------------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- python tests/fuzz.py -->", "<!-- end -->"


def tables(findings: list[Finding], count: int) -> str:
    """Return what the page says: outcomes by operation and by kind of damage, and how they came about."""
    adapters = ", ".join(MAKERS)
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "safetensors")
    )
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "\n".join(
        [
            f"{count:,} corruptions: {count // len(KINDS)} seeds, counted from 0, of each of {len(KINDS)} kinds, on",
            f"{len(MAKERS)} adapters in turn ({adapters}).",
            f"Revision {revision}, {versions}, Python {platform.python_version()}.",
            "",
            *_table("operation", [finding.operation for finding in findings], findings),
            "",
            *_table("damage", [finding.harm.kind for finding in findings], findings),
        ]
    )


def _table(title: str, rows: list[str], findings: list[Finding]) -> list[str]:
    counts = Counter((row, finding.outcome) for row, finding in zip(rows, findings, strict=True))
    names = [*dict.fromkeys(rows)]
    return [
        f"| {title} | {' | '.join(OUTCOMES)} |",
        f"|---|{'---:|' * len(OUTCOMES)}",
        *(f"| {name} | {' | '.join(f'{counts[name, outcome]:,}' for outcome in OUTCOMES)} |" for name in names),
    ]


def write_into(page: Path, text: str) -> None:
    """Put a text between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{page} has no lines {BEGIN} and {END}"
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="corruptions (10,000)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="page to write the tables into; they are printed otherwise")
    arguments = parser.parse_args()
    findings = fuzz_in_processes(arguments.count, arguments.processes)
    text = tables(findings, arguments.count)
    write_into(arguments.out, text) if arguments.out else print(text)
    failures = [finding for finding in findings if finding.outcome in FAILURES]
    for failure in failures[:100]:
        print(failure, file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
