"""The learning rate's climb at the start of every later inner loop (Figure 2 of the paper)."""

from __future__ import annotations


def rewarmup_factor(outer_step: int, inner_step: int, rewarmup_steps: int) -> float:
    """Return what the scheduled learning rate is multiplied by, in [0, 1], for the step about to be taken.

    The first inner loop has the schedule's own warm-up and is left alone.

    Args:
        outer_step: Number p ≥ 1 of the current outer step.
        inner_step: Optimizer steps already taken in this inner loop; the first one is taken with factor 0.
        rewarmup_steps: Length of the climb in optimizer steps; 0 for none.
    """
    if outer_step == 1 or rewarmup_steps == 0:
        return 1.0
    return min(1.0, inner_step / rewarmup_steps)
