"""The study that machines share: made by the first, joined by the others if they search the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study

from aroma.errors import bad_value

from .space import grid_points
from .spec import Search
from .storage import no_experimental_warnings
from .tickets import put_missing

_IDENTITY = "aroma_search"
_PATIENCE = 10.0
"""Seconds that whoever made the study has to say what it searches; after that it counts as killed."""


def join_study(search: Search, storage: RDBStorage) -> Study:
    """Return the study of a search, with its tickets if it is new.

    Raises:
        ConfigError: The study of that name searches something else; the differing keys are named.
    """
    try:
        study = optuna.create_study(study_name=search.study, storage=storage, direction="maximize")
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=search.study, storage=storage)
        _require_same(search, study)
    else:
        study.set_user_attr(_IDENTITY, search.identity())
        put_missing(study, search.trials, storage.heartbeat_stale_trial_callback)
    return study


def sampler_for(search: Search, number: int) -> BaseSampler:
    """Return what gives ticket `number` its values: the same on every machine, but that TPE looks at the results."""
    seed = int(np.random.SeedSequence([search.sampler_seed, number]).generate_state(1)[0])
    with no_experimental_warnings():
        if search.sampler == "grid":
            return PartialFixedSampler(grid_points(search.space)[number], RandomSampler(seed))
        if search.sampler == "tpe":
            # Constant liar: what runs elsewhere counts as bad, or all workers would try the same place.
            return TPESampler(seed=seed, constant_liar=True)
        return RandomSampler(seed)


def _require_same(search: Search, study: Study) -> None:
    theirs = _identity_of(study)
    if theirs is None:  # made, and its maker killed before it could say what for
        if study.get_trials(deepcopy=False):
            raise bad_value(
                "study", search.study, "a study of that name exists, made by another program; give another"
            )
        study.set_user_attr(_IDENTITY, search.identity())
        return
    differing = _differing_keys(search.identity(), theirs)
    if differing:
        raise bad_value(
            "study",
            search.study,
            f"the study of that name searches something else, which differs in {', '.join(differing)}; use the same "
            "search file on all machines, or give another study",
        )


def _identity_of(study: Study) -> dict[str, Any] | None:
    deadline = time.monotonic() + _PATIENCE
    while (identity := study.user_attrs.get(_IDENTITY)) is None and time.monotonic() < deadline:
        if study.get_trials(deepcopy=False):
            break
        time.sleep(0.2)
    return identity


def _differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two nested mappings differ."""
    differing: list[str] = []
    for key in {**one, **other}:
        left, right = one.get(key), other.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            differing += _differing_keys(left, right, f"{prefix}{key}.")
        elif left != right or (key in one) != (key in other):
            differing.append(f"{prefix}{key}")
    return differing
