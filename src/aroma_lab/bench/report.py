"""The result as tables for a terminal, and as a picture; both drawn from one pandas frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from .measure import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20

_COLOURS = {"aroma": "#D55E00", "lora": "#0072B2"}  # of Okabe and Ito; all other cases are grey


def case_frame(result: Result) -> pd.DataFrame:
    """Return one row per case. Times in milliseconds, sizes in MiB, ratios to forward and backward of the floor."""
    return pd.DataFrame(
        {
            "case": case["key"],
            "name": case["name"],
            "fwd+bwd ms": 1000 * case["forward_backward"]["median"],
            "× floor": case["forward_backward_ratio"]["median"],
            "lower": case["forward_backward_ratio"]["lower"],
            "upper": case["forward_backward_ratio"]["upper"],
            "step ms": 1000 * case["step"]["median"],
            "step × floor": case["step_ratio"]["median"],
            "kept MiB": case["kept_bytes"] / MIB,
            "optimizer MiB": case["optimizer_bytes"] / MIB,
            "trainable": case["trainable_parameters"],
        }
        for case in result["cases"]
    )


def case_table(result: Result) -> str:
    """Return the table of times, ratios and sizes as text."""
    formats = {
        **dict.fromkeys(("× floor", "lower", "upper", "step × floor"), "{:.3f}"),
        **dict.fromkeys(("fwd+bwd ms", "step ms", "kept MiB"), "{:.1f}"),
        **{"optimizer MiB": "{:.2f}", "trainable": "{:,}"},
    }
    return f"{headline(result)}\n{_text(case_frame(result).drop(columns='name'), formats)}"


def comparison_table(result: Result) -> str:
    """Return the table of AROMA over LoRA r=8 as text: ratios, below 1 where AROMA takes less."""
    frame = pd.DataFrame(
        {
            "case": one["key"],
            "over": one["other"],
            "fwd+bwd": one["forward_backward_ratio"]["median"],
            "lower": one["forward_backward_ratio"]["lower"],
            "upper": one["forward_backward_ratio"]["upper"],
            "step": one["step_ratio"]["median"],
            "kept": one["kept_ratio"],
        }
        for one in result["comparisons"]
    )
    return f"AROMA over LoRA r=8\n{_text(frame, dict.fromkeys(frame.columns[2:], '{:.3f}'))}"


def notes(result: Result) -> list[str]:
    """Return in sentences what the controller costs, and with what it was measured."""
    cost, found = result["controller"], result["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    processor = found["device"] if result["settings"]["device"] == "cuda" else found["cpu_model"]
    return [
        f"Controller: {cost['amortised_ms']:.2f} ms per step on average, {cost['amortised_fraction']:.2%} of an "
        f"ordinary step ({cost['step_ms']:.1f} ms). A check every {cost['check_interval']} steps takes "
        f"{cost['check_ms']:.2f} ms.",
        f"One outer step (check, merge, reset, norms of the weights): {cost['outer_ms']:.1f} ms, "
        f"{cost['outer_fraction']:.2f} of an ordinary step.",
        f"{processor}; {found['threads']} of {found['cpu_count']} threads, OMP_WAIT_POLICY "
        f"{found['wait_policy'] or 'not set'}.",
        f"{versions}; revision {found['git_revision'] or 'unknown'}.",
        "The backbone's own dropouts are 0; a dropout in a case's name is the adapter's.",
    ]


def headline(result: Result) -> str:
    """Return in one line what was measured."""
    settings = result["settings"]
    size = f"{settings['batch_size']}×{settings['length']}"
    return f"{settings['model']}, batch {size}, {settings['dtype']}, rounds in turns: {settings['rounds']}"


def _text(frame: pd.DataFrame, formats: dict[str, str]) -> str:
    formatters = {name: form.format for name, form in formats.items()}
    text: str = frame.to_string(index=False, na_rep="–", formatters=formatters)
    return text


# The picture ---------------------------------------------------------------------------------------------------------


def draw(result: Result) -> Figure:
    """Return a figure that belongs to no window: one row per case, with its time and the bytes it keeps.

    A filled circle is forward and backward, with a line from quartile to quartile; a hollow one is the whole step.
    """
    from matplotlib.figure import Figure

    frame = case_frame(result)
    figure = Figure(figsize=(11, 1.6 + 0.27 * len(frame)), layout="constrained")
    times, kept = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    colours = [_COLOURS.get(key.partition("-")[0], "#767676") for key in frame["case"]]
    times.axvline(1, color="#767676", linewidth=1.0, linestyle="--")
    times.hlines(frame.index, frame["lower"], frame["upper"], colors=colours)
    times.scatter(frame["× floor"], frame.index, s=25, c=colours)
    times.scatter(frame["step × floor"], frame.index, s=45, facecolors="none", edgecolors=colours)
    times.set_xlabel("× floor:  ● forward + backward, quartiles   ○ whole step")
    kept.barh(frame.index, frame["kept MiB"], height=0.55, color=colours)
    kept.set_xlabel("kept for backward, MiB")
    for axes in (times, kept):
        axes.set_frame_on(False)
        axes.set_axisbelow(True)
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.tick_params(length=0)
    times.set_yticks(frame.index, frame["name"])
    times.invert_yaxis()
    figure.suptitle(f"Cost of one training step\n{headline(result)}", x=0.01, ha="left", fontsize=10)
    return figure
