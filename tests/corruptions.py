"""Damage to a folder, by kind and number: what disks, killed copies and hands do; each kind says what it did."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Kind = Callable[[random.Random, Path, Path], str]
KINDS: list[Kind] = []


def corrupt(number: int, folder: Path, other: Path) -> str:
    """Do the damage of a number; all kinds follow each other."""
    kind = KINDS[number % len(KINDS)]
    return f"{kind.__name__} #{number}: {kind(random.Random(number), folder, other)}"


def kind(function: Kind) -> Kind:
    KINDS.append(function)
    return function


def files_of(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(suffix))


def on_bytes(change: Callable[[random.Random, bytearray], bytes | bytearray]) -> None:
    """Add a kind that changes the bytes of a file."""

    def strike(rng: random.Random, folder: Path, other: Path) -> str:
        file = rng.choice([file for file in files_of(folder) if file.stat().st_size])
        file.write_bytes(change(rng, bytearray(file.read_bytes())))
        return file.name

    strike.__name__ = change.__name__
    KINDS.append(strike)


@on_bytes
def overwritten(rng: random.Random, data: bytearray) -> bytearray:
    start, zeros = rng.randrange(len(data)), bytes(rng.choice([1, 1, 512]))
    data[start : start + len(zeros)] = zeros[: len(data) - start]
    data[start] ^= 1 << rng.randrange(8)
    return data


@on_bytes
def truncated(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.choice([0, rng.randrange(len(data)), len(data) - 1])]


@on_bytes
def extended(rng: random.Random, data: bytearray) -> bytearray:
    return data + rng.choice([b"\0", b"\n", b"{}", bytes(data), bytes(4096)])


@kind
def deleted(rng: random.Random, folder: Path, other: Path) -> str:
    gone = rng.sample(files_of(folder), rng.choice([1, 1, 2]))
    for file in gone:
        file.unlink()
    return ", ".join(file.name for file in gone)


@kind
def something_else_in_its_place(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder))
    content = file.read_bytes()
    file.unlink()
    what = rng.choice(["folder", "FIFO", "/dev/zero", "itself", "nowhere", ".", "outside"])
    if what == "folder":
        file.mkdir()
    elif what == "FIFO":  # nobody writes to it
        os.mkfifo(file)
    elif what == "outside":
        (folder.parent / "outside").write_bytes(content)
        file.symlink_to(folder.parent / "outside")
    else:
        file.symlink_to(file.name if what == "itself" else what)
    return f"{file.name}: {what}"


@kind
def file_of_another_run(rng: random.Random, folder: Path, other: Path) -> str:
    name = rng.choice([file.name for file in files_of(folder) if (other / file.name).is_file()])
    shutil.copy(other / name, folder / name)
    return name


@kind
def names_exchanged(rng: random.Random, folder: Path, other: Path) -> str:
    one, two = rng.sample(files_of(folder), 2)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    return f"{one.name} and {two.name}"


VALUES: tuple[Any, ...] = (None, True, 0, 1, -3, 2.5, 1e300, float("nan"), "", "query", [], ["a"], [[]], {}, {"a": 1})
TEXTS = ("[]", "{}", "null", "NaN", "[" * 100_000, "{" * 9, "1" + "0" * 5000, "\ufeff{}")


@kind
def json_edited(rng: random.Random, folder: Path, other: Path) -> str:
    """A value changed, replaced or removed at some depth, or all of it."""
    file = rng.choice(files_of(folder, ".json"))
    content = json.loads(file.read_text())
    parent, key = {"all": content}, "all"
    while isinstance(parent[key], dict | list) and parent[key] and (key == "all" or rng.random() < 0.8):
        parent = parent[key]
        key = rng.choice(sorted(parent) if isinstance(parent, dict) else range(len(parent)))
    old = parent[key]
    number = isinstance(old, int | float) and old
    what = rng.choice(["changed", "removed", "replaced", "all"])
    if what == "removed":
        parent.pop(key)
    else:
        parent[key] = number + 1 if what == "changed" and number else rng.choice(VALUES)
    file.write_text(rng.choice(TEXTS) if what == "all" else json.dumps(content, indent=2))
    return f"{file.name}: {key} {what}"


@kind
def safetensors_header(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder, ".safetensors"))
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice(sorted({*header} - {"__metadata__"}))
    edits = {"dtype": "F16", "shape": [2**62, 2**62], "data_offsets": [0, 2**60], "name": f"{name}x", "size": 2**63}
    what = rng.choice(sorted(edits))
    if what == "name":
        header[edits[what]] = header.pop(name)
    elif what != "size":
        header[name][what] = edits[what]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", 2**63 if what == "size" else len(text)) + text + body)
    return f"{file.name}: {what} of {name}"


EDITS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.zeros_like,
    lambda tensor: 2 * tensor,
    lambda tensor: tensor * torch.nan,
    lambda tensor: tensor.int(),
    lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor[None],
    lambda tensor: tensor.flatten(),
    lambda tensor: torch.tensor(1.0),
    lambda tensor: tensor[:0],
    lambda tensor: tensor[1:].contiguous(),
)


@kind
def tensors_changed(rng: random.Random, folder: Path, other: Path) -> str:
    file = rng.choice(files_of(folder, ".safetensors"))
    tensors = load_file(file)
    name, number = rng.choice(sorted(tensors)), rng.randrange(len(EDITS))
    tensors[name] = EDITS[number](tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file.name}: edit {number} of {name}"
