"""Damage to folders of files, by kind and by seed: what disks, killed copies, hands and enemies do to them.

    for harm in corruptions(300):
        folder = shutil.copytree(whole, scratch / "folder")
        what_was_done = harm.apply(folder, other=whole_folder_of_another_run)

A corruption chooses its file, and where to strike, by its seed alone: the same seed and folder give the same damage.
`apply` returns what it did, in words; None where the folder has nothing that this kind could strike.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Harm = Callable[[random.Random, Path, Path], str | None]

KINDS: dict[str, Harm] = {}
"""Every kind by its name; each takes random numbers, the folder, and a whole folder of another run."""


@dataclass(frozen=True)
class Corruption:
    """One damage.

    Args:
        seed: Decides what is struck and how.
        kind: One of `KINDS`.
    """

    seed: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.kind} #{self.seed}"

    def apply(self, folder: Path, other: Path) -> str | None:
        """Damage `folder` and return what was done; None if nothing could be.

        Args:
            folder: Changed in place; damage outside of it is done beside it, in its parent folder.
            other: A whole folder of another run, with files of the same names.
        """
        return KINDS[self.kind](random.Random(f"{self.kind} {self.seed}"), folder, other)


def corruption(number: int, kinds: tuple[str, ...] | None = None) -> Corruption:
    """Return one of an endless row of corruptions, in which all kinds follow each other."""
    names = kinds or tuple(KINDS)
    return Corruption(number // len(names), names[number % len(names)])


def corruptions(count: int, kinds: tuple[str, ...] | None = None) -> Iterator[Corruption]:
    """Yield the first `count` of them."""
    return (corruption(number, kinds) for number in range(count))


def kind(function: Harm) -> Harm:
    KINDS[function.__name__.replace("_", " ")] = function
    return function


def files_of(folder: Path, suffix: str = "") -> list[Path]:
    """Return the regular files in `folder`, by name."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(suffix))


# Bytes ---------------------------------------------------------------------------------------------------------------


@kind
def bytes_flipped(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder))
    data = bytearray(file.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 1, 8]))]
    for place in places:
        data[place] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128])
    file.write_bytes(data)
    return f"{file.name}: bits of bytes {places}"


@kind
def truncated(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder))
    data = file.read_bytes()
    length = rng.choice([rng.randrange(len(data)), len(data) - 1])
    file.write_bytes(data[:length])
    return f"{file.name}: {length} of {len(data)} bytes"


@kind
def extended(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder))
    tail = rng.choice([b"\0", b"\n", b"{}", file.read_bytes(), bytes(4096)])
    with file.open("ab") as stream:
        stream.write(tail)
    return f"{file.name}: {len(tail)} more bytes"


@kind
def block_of_zeros(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder))
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    length = min(rng.choice([16, 512, 4096]), len(data) - start)
    data[start : start + length] = bytes(length)
    file.write_bytes(data)
    return f"{file.name}: zeros at {start}–{start + length}"


@kind
def emptied(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder))
    file.write_bytes(b"")
    return file.name


# Files ---------------------------------------------------------------------------------------------------------------


@kind
def deleted(rng: random.Random, folder: Path, other: Path) -> str:
    files = files_of(folder)
    gone = rng.sample(files, rng.choice([1, 1, 2, len(files)]))
    for file in gone:
        file.unlink()
    return ", ".join(sorted(file.name for file in gone))


@kind
def folder_in_its_place(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder))
    full = rng.random() < 0.5
    file.unlink()
    file.mkdir()
    if full:
        (file / "inner.json").write_text("{}")
    return f"{file.name}: {'a folder with a file' if full else 'an empty folder'}"


@kind
def symlink_in_its_place(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder))
    outside = folder.parent / f"outside-{folder.name}"
    targets = {"itself": file.name, "nothing": "nowhere", "its folder": ".", "another file": "adapter_config.json"}
    target = rng.choice([*targets, "two that name each other", "the same content outside", "a file of the system"])
    if target == "the same content outside":
        outside.mkdir(exist_ok=True)
        targets[target] = shutil.copy(file, outside / file.name)
    elif target == "a file of the system":
        targets[target] = "/etc/hostname"
    elif target == "two that name each other":
        targets[target] = f"{file.name}.twin"
        (folder / f"{file.name}.twin").symlink_to(file.name)
    file.unlink()
    file.symlink_to(targets[target])
    return f"{file.name}: a symlink to {target}"


@kind
def endless_file(rng: random.Random, folder: Path, other: Path) -> str:
    """A FIFO that nobody writes to, or a device without an end."""
    file = rng.choice(files_of(folder))
    file.unlink()
    if rng.random() < 0.7:
        os.mkfifo(file)
        return f"{file.name}: a FIFO"
    file.symlink_to("/dev/zero")
    return f"{file.name}: /dev/zero"


@kind
def file_of_another_run(rng: random.Random, folder: Path, other: Path) -> str | None:
    names = [file.name for file in files_of(folder) if (other / file.name).is_file()]
    if not names:
        return None
    taken = rng.sample(names, min(rng.choice([1, 1, 2]), len(names)))
    for name in taken:
        shutil.copy(other / name, folder / name)
    return ", ".join(sorted(taken))


@kind
def names_exchanged(rng: random.Random, folder: Path, other: Path) -> str | None:
    files = files_of(folder)
    if len(files) < 2:
        return None
    one, two = rng.sample(files, 2)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    return f"{one.name} and {two.name}"


@kind
def folder_itself(rng: random.Random, folder: Path, other: Path) -> str:
    shutil.rmtree(folder)
    place = rng.choice(["gone", "empty", "a file", "a symlink to itself", "a FIFO"])
    if place == "empty":
        folder.mkdir()
    elif place == "a file":
        folder.write_text("{}")
    elif place == "a symlink to itself":
        folder.symlink_to(folder.name)
    elif place == "a FIFO":
        os.mkfifo(folder)
    return place


# JSON ----------------------------------------------------------------------------------------------------------------

WRONG_TYPES: tuple[Any, ...] = (None, True, False, 0, 1, -3, 2.5, "", "text", [], [1], ["a"], [[]], {}, {"a": 1})

ABSURD: tuple[str, ...] = (
    "1" + "0" * 400,
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "10000000",
    "1000000",
    "-1",
    "-10000000",
    "9223372036854775808",
    "1e300",
    "0.0",
    '"\\ud800"',
    '"' + "a" * 100_000 + '"',
    '"../../../etc/passwd"',
    '"/dev/zero"',
    '"\\u0000"',
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
)
"""Values as JSON text: numbers beyond sense, strings that are no names, and nests."""

HANGING = ("([a-z0-9._]*)*X", "(a|a|[a-z.]|[a-z._0-9])*!", "(.*)*(.*)*(.*)*@", "(?:x|[a-z._0-9]+)+=", "(", "[", "*")
"""Regular expressions that match no name of a module and take forever to say so, or are none."""


class Unlimited:
    """A pattern matched by `re`, which no limit stops; takes the place of one of `regex`."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def match(self, text: str, timeout: float) -> Any:
        return self._pattern.match(text)

    def fullmatch(self, text: str, timeout: float) -> Any:
        return self._pattern.fullmatch(text)


@kind
def json_value_changed(rng: random.Random, folder: Path, other: Path) -> str | None:
    """A value of the same type: what a hand or a hasty script writes."""
    return _edit(rng, folder, lambda value: _changed(rng, value))


@kind
def json_value_of_another_type(rng: random.Random, folder: Path, other: Path) -> str | None:
    return _edit(rng, folder, lambda value: rng.choice([new for new in WRONG_TYPES if type(new) is not type(value)]))


@kind
def json_value_absurd(rng: random.Random, folder: Path, other: Path) -> str | None:
    text = rng.choice(ABSURD)
    return _edit(rng, folder, lambda _: "@@@", lambda written: written.replace('"@@@"', text), f"{text[:30]}")


@kind
def json_field_removed(rng: random.Random, folder: Path, other: Path) -> str | None:
    return _edit_parent(rng, folder, lambda parent, key: parent.pop(key))


@kind
def json_field_added(rng: random.Random, folder: Path, other: Path) -> str | None:
    def add(parent: Any, key: Any) -> None:
        value = rng.choice(WRONG_TYPES)
        if isinstance(parent, dict):
            parent[f"{key}_2"] = value
        else:
            parent.insert(key, value)

    return _edit_parent(rng, folder, add)


@kind
def json_field_twice(rng: random.Random, folder: Path, other: Path) -> str | None:
    """A second entry of a name at the end, which readers of JSON prefer."""
    file, content = _json_file(rng, folder)
    if file is None or not isinstance(content, dict) or not content:
        return None
    name = rng.choice(sorted(content))
    text = json.dumps(content).rstrip()
    file.write_text(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(_changed(rng, content[name]))}}}")
    return f"{file.name}: {name}"


@kind
def json_replaced(rng: random.Random, folder: Path, other: Path) -> str | None:
    file, content = _json_file(rng, folder)
    if file is None:
        return None
    texts = [
        "[]",
        "{}",
        "null",
        "1",
        '"text"',
        "NaN",
        "[{}]",
        "[" * 100_000,
        "{" * 9,
        json.dumps([content]),
        "\ufeff{}",
    ]
    text = rng.choice(texts)
    file.write_text(text, encoding="utf-8")
    return f"{file.name}: {text[:20]}"


@kind
def json_encoded_otherwise(rng: random.Random, folder: Path, other: Path) -> str | None:
    file, _ = _json_file(rng, folder)
    if file is None:
        return None
    encoding = rng.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1 with an umlaut"])
    text = file.read_text(encoding="utf-8")
    file.write_bytes(text.encode(encoding) if "latin" not in encoding else text.encode() + b"\xfc")
    return f"{file.name}: {encoding}"


@kind
def hostile_pattern(rng: random.Random, folder: Path, other: Path) -> str | None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    field = rng.choice(["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"])
    pattern = rng.choice(HANGING)
    content[field] = {pattern: 4} if field.endswith("k_pattern") or field.startswith("alpha") else pattern
    file.write_text(json.dumps(content), encoding="utf-8")
    return f"{file.name}: {field}={content[field]}"


@kind
def hostile_state(rng: random.Random, folder: Path, other: Path) -> str | None:
    """An edit of aroma_state.json that its checksum was made to fit."""
    file = folder / "aroma_state.json"
    if not file.is_file():
        return None
    state = json.loads(file.read_text(encoding="utf-8"))
    module = rng.choice(sorted(state["modules"]))
    grown = rng.choice([name for name, entry in state["modules"].items() if entry["rank"]] or [module])
    weights = "adapter_model.safetensors"
    edits: dict[str, Callable[[], Any]] = {
        "processes=10**7": lambda: state.update(processes=10**7),
        "processes='2'": lambda: state.update(processes="2"),
        "files: /dev/zero": lambda: state["files"].update({"/dev/zero": "0" * 64}),
        "files: outside": lambda: state["files"].update({"../outside": "0" * 64}),
        "files: a list": lambda: state.update(files=["adapter_model.safetensors"]),
        "files: a folder": lambda: state["files"].update({".": "0" * 64}),
        "files: no digest": lambda: state["files"].update({weights: 7}),
        "modules: a list": lambda: state.update(modules=[module]),
        "modules: none": lambda: state.update(modules={}),
        "a module without a shape": lambda: state["modules"][module].pop("shape"),
        "a module of text": lambda: state["modules"].update({module: "text"}),
        "a huge shape": lambda: state["modules"].update({"a.b": {"shape": [10**9, 10**9], "rank": 0}}),
        "a shape of text": lambda: state["modules"][module].update(shape=["a", "b"]),
        "a negative shape": lambda: state["modules"][module].update(shape=[-1, 8]),
        "another shape": lambda: state["modules"][grown].update(shape=[7, 7]),
        "another rank": lambda: state["modules"][grown].update(rank=99),
        "r=10**6": lambda: state["modules"][grown].update(rank=10**6),
        "controller: a list": lambda: state.update(controller=[1]),
        "controller: text": lambda: state.update(controller="text"),
        "controller without config": lambda: state.update(controller={"reset": "prune"}),
        "controller of config alone": lambda: state.update(controller={"config": {"reset": "prune"}}),
        "controller of other modules": lambda: (state["controller"] or {}).update(modules=[{"name": "a"}]),
        "controller at a huge step": lambda: (state["controller"] or {}).update(global_step="x" * 100_000),
        "config: a list": lambda: state.update(config=[]),
        "components: a number": lambda: state.update(components=1),
        "no modules": lambda: state.pop("modules"),
        "no files": lambda: state.pop("files"),
    }
    name = rng.choice(sorted(edits))
    edits[name]()
    seal(file, state)
    return name


def _json_file(rng: random.Random, folder: Path) -> tuple[Path | None, Any]:
    files = files_of(folder, ".json")
    if not files:
        return None, None
    file = rng.choice(files)
    return file, json.loads(file.read_text(encoding="utf-8"))


def _edit(
    rng: random.Random,
    folder: Path,
    new: Callable[[Any], Any],
    rewrite: Callable[[str], str] = str,
    shown: str | None = None,
) -> str | None:
    """Replace a value somewhere in a JSON file."""
    told: list[Any] = []

    def replace(parent: Any, key: Any) -> None:
        old = parent[key]
        parent[key] = new(old)
        told.append(shown if shown is not None else parent[key])

    where = _edit_parent(rng, folder, replace, rewrite)
    return None if where is None else f"{where} = {str(told[0])[:60]}"


def _edit_parent(
    rng: random.Random, folder: Path, edit: Callable[[Any, Any], Any], rewrite: Callable[[str], str] = str
) -> str | None:
    """Call `edit` with the parent and the key of a value somewhere in a JSON file."""
    file, content = _json_file(rng, folder)
    if file is None or not isinstance(content, dict | list) or not content:
        return None
    parent, path = content, []
    while True:
        key = rng.choice(sorted(parent) if isinstance(parent, dict) else [*range(len(parent))])
        path.append(str(key))
        child = parent[key]
        if not (isinstance(child, dict | list) and child and rng.random() < 0.8):
            break
        parent = child
    edit(parent, key)
    file.write_text(rewrite(json.dumps(content, indent=2)), encoding="utf-8")
    return f"{file.name}: {'.'.join(path)}"


def _changed(rng: random.Random, value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 2, 16, 256])
    if isinstance(value, float):
        return value * 2 + 0.25
    if isinstance(value, str):
        return rng.choice([f"{value}x", value[:-1] + "~", value.upper() + "_", "query"])
    if isinstance(value, list):
        return [*value, *value[:1]] if rng.random() < 0.5 or not value else value[1:]
    if isinstance(value, dict):
        return {} if value and rng.random() < 0.5 else {**value, "query": 4}
    return rng.choice([True, 4, "query", ["query"]])


# Tensors -------------------------------------------------------------------------------------------------------------


@kind
def safetensors_header(rng: random.Random, folder: Path, other: Path) -> str | None:
    """An edit of the header that leaves the bytes of the tensors as they are."""
    files = files_of(folder, ".safetensors")
    if not files:
        return None
    file = rng.choice(files)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")
    one, two = rng.choice(names), rng.choice(names)
    entry = header[one]
    edits: dict[str, Callable[[], Any]] = {
        "another dtype": lambda: entry.update(dtype=rng.choice(["I32", "F16", "BF16", "F64", "X9", "U32"])),
        "a transposed shape": lambda: entry.update(shape=entry["shape"][::-1]),
        "a flat shape": lambda: entry.update(shape=[1, *entry["shape"]]),
        "a huge shape": lambda: entry.update(shape=[2**62, 2**62]),
        "a negative shape": lambda: entry.update(shape=[-1, 8]),
        "offsets beyond the end": lambda: entry.update(data_offsets=[0, 2**60]),
        "offsets of another": lambda: entry.update(data_offsets=header[two]["data_offsets"]),
        "two exchanged": lambda: header.update({one: header[two], two: entry}),
        "another name": lambda: header.update({f"{one}x": header.pop(one)}),
        "a name lost": lambda: header.pop(one),
        "metadata of text": lambda: header.update(__metadata__="text"),
        "other metadata": lambda: header.update(__metadata__={"format": rng.choice(["tf", "np", ""])}),
        "entry of text": lambda: header.update({one: "text"}),
    }
    name = rng.choice(sorted([*edits, "a huge header", "a header of nests", "no header"]))
    if name in edits:
        edits[name]()
    text = {"a header of nests": b"[" * 50_000, "no header": b""}.get(name, json.dumps(header).encode())
    size = 2**63 if name == "a huge header" else len(text)
    file.write_bytes(struct.pack("<Q", size) + text + body)
    return f"{file.name}: {name} ({one})"


TENSOR_EDITS: dict[str, Callable[[dict[str, Tensor], str, str], Any]] = {
    "zeros": lambda tensors, one, two: tensors[one].zero_(),
    "doubled": lambda tensors, one, two: tensors[one].mul_(2),
    "huge": lambda tensors, one, two: tensors[one].mul_(1e30),
    "half precision": lambda tensors, one, two: tensors.update({one: tensors[one].half()}),
    "exchanged": lambda tensors, one, two: tensors.update({one: tensors[two].clone(), two: tensors[one].clone()}),
}
"""What may also be the tensors of another whole adapter: only a digest tells."""

TENSOR_BREAKS: dict[str, Callable[[dict[str, Tensor], str, str], Any]] = {
    "NaN": lambda tensors, one, two: tensors[one].view(-1)[:1].fill_(torch.nan),
    "infinity": lambda tensors, one, two: tensors[one].view(-1)[:1].fill_(torch.inf),
    "integers": lambda tensors, one, two: tensors.update({one: tensors[one].int()}),
    "complex": lambda tensors, one, two: tensors.update({one: tensors[one].to(torch.complex64)}),
    "one lost": lambda tensors, one, two: tensors.pop(one),
    "all lost": lambda tensors, one, two: tensors.clear(),
    "no A": lambda tensors, one, two: [tensors.pop(name) for name in [*tensors] if ".lora_A." in name],
    "no B": lambda tensors, one, two: [tensors.pop(name) for name in [*tensors] if ".lora_B." in name],
    "one more": lambda tensors, one, two: tensors.update({f"{one}.more": tensors[one].clone()}),
    "another name": lambda tensors, one, two: tensors.update({f"x{one}": tensors.pop(one)}),
    "one more dimension": lambda tensors, one, two: tensors.update({one: tensors[one][None]}),
    "flat": lambda tensors, one, two: tensors.update({one: tensors[one].flatten()}),
    "a scalar": lambda tensors, one, two: tensors.update({one: torch.tensor(1.0)}),
    "no rows": lambda tensors, one, two: tensors.update({one: tensors[one][:0]}),
    "a row less": lambda tensors, one, two: tensors.update({one: tensors[one][1:].contiguous()}),
    "10,000 rows": lambda tensors, one, two: tensors.update({one: torch.ones(10_000, *tensors[one].shape[1:])}),
}
"""What no whole adapter has."""


@kind
def tensors_changed(rng: random.Random, folder: Path, other: Path) -> str | None:
    """A valid safetensors file with other tensors in it."""
    return _edit_tensors(rng, folder, TENSOR_EDITS | TENSOR_BREAKS)


@kind
def hostile_tensors(rng: random.Random, folder: Path, other: Path) -> str | None:
    """Tensors that no whole adapter has, and digests in aroma_state.json that were made to fit."""
    done = _edit_tensors(rng, folder, TENSOR_BREAKS, of="lora_")
    file = folder / "aroma_state.json"
    if done is not None and file.is_file():
        state = json.loads(file.read_text(encoding="utf-8"))
        state["files"] = {name: sha256((folder / name).read_bytes()).hexdigest() for name in state["files"]}
        seal(file, state)
    return done


def _edit_tensors(
    rng: random.Random,
    folder: Path,
    edits: dict[str, Callable[[dict[str, Tensor], str, str], Any]],
    of: str = "",
) -> str | None:
    files = files_of(folder, ".safetensors")
    if not files:
        return None
    file = rng.choice(files)
    tensors = load_file(file)
    names = sorted(name for name in tensors if of in name) or sorted(tensors)
    one, two, name = rng.choice(names), rng.choice(names), rng.choice(sorted(edits))
    edits[name](tensors, one, two)
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file.name}: {name} ({one})"


def seal(file: Path, state: dict[str, Any]) -> None:
    """Write aroma_state.json with a checksum that fits."""
    content = {key: value for key, value in state.items() if key != "checksum"}
    checksum = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**content, "checksum": checksum}, indent=2), encoding="utf-8")
