"""What is measured: model, batch, rounds, device."""

from __future__ import annotations

from dataclasses import dataclass

from aroma.errors import bad_value

DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class BenchSettings:
    """Settings of one benchmark; together with the machine they decide its numbers.

    Args:
        model: A named shape, a local folder or a hub name; only its configuration is used.
        batch_size: Sequences of a batch.
        length: Tokens of a sequence; nothing is padded.
        rounds: Timed steps of every case.
        warmup_rounds: Steps of every case before those.
        dtype: Of the backbone's weights, `"float32"` or `"bfloat16"`.
        device: `"cpu"` or `"cuda"`.
        threads: CPU threads; None for PyTorch's own choice.
        seed: Of weights, input, and finished components.
        only: Keys of the cases to measure; None for all. The floor is always measured.
        compiled: Whether each case is measured a second time with `torch.compile`.
        peak: Whether peak memory is measured; on a CPU that takes a process of its own for every case.
        keep_memory: Whether the process keeps the memory that it frees; see `lab.allocator`.

    Raises:
        ConfigError: A value that cannot work.
    """

    model: str = "roberta-base"
    batch_size: int = 8
    length: int = 128
    rounds: int = 9
    warmup_rounds: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    only: tuple[str, ...] | None = None
    compiled: bool = False
    peak: bool = True
    keep_memory: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "rounds"):
            _require_at_least(1, name, getattr(self, name))
        _require_at_least(0, "warmup_rounds", self.warmup_rounds)
        if self.threads is not None:
            _require_at_least(1, "threads", self.threads)
        for name, choices in (("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise bad_value(name, getattr(self, name), f"choose one of {', '.join(choices)}")


def _require_at_least(minimum: int, name: str, value: int) -> None:
    if value < minimum:
        raise bad_value(name, value, f"give {minimum} or more")
