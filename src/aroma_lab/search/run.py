"""A search from its file to its best values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aroma.errors import bad_value
from aroma.files import read_json, write_json

from ..grid.expand import check_methods, check_tasks
from ..grid.status import Silent, Watcher
from ..grid.worker import WORKER_MODULE
from .spec import Search
from .storage import open_storage, shown
from .study import join_study
from .tickets import MACHINE, Ticket, best_of
from .worker import SearchWorker


@dataclass(frozen=True)
class SearchOutcome:
    """What a search came to, over all machines.

    Args:
        tickets: All trials, done.
        best: The one with the highest held-out score; None if all failed.
        file: Where it is written.
    """

    tickets: tuple[Ticket, ...]
    best: Ticket | None
    file: Path

    @property
    def failed(self) -> list[Ticket]:
        """Trials that failed."""
        return [ticket for ticket in self.tickets if ticket.error is not None]


def run_search(search: Search, watcher: Watcher | None = None, *, module: str = WORKER_MODULE) -> SearchOutcome:
    """Run what a search lacks, here and wherever else its study is being worked at, and write `search.json`.

    Every trial is scored on examples held out from the training data; what is reported is never looked at.

    Args:
        search: The search.
        watcher: Is told how it goes.
        module: What runs a trial; see `aroma_lab.grid.worker.Worker`.

    Raises:
        ConfigError: A method's option that cannot be, a storage that cannot be reached or went away, a study that
            searches something else, or an output that holds another's trials or result.
        DataError: Examples that cannot be used.
    """
    file = search.output / "search.json"
    _require_own(file, search)
    check_methods(search.extreme_trials())
    # Before the study is made, which would be one of the wrong task. What another module makes of it is not known.
    if module == WORKER_MODULE and not _is_over(file, search):
        check_tasks(search.extreme_trials())
    storage = open_storage(search.storage, search.heartbeat)
    try:
        study = join_study(search, storage)
        tickets = SearchWorker(search, study, storage, watcher or Silent(), module).run()
    finally:
        storage.engine.dispose()
    write_json(file, search_record(search, tickets))
    return SearchOutcome(tuple(tickets), best_of(tickets), file)


def search_record(search: Search, tickets: Sequence[Ticket]) -> dict[str, Any]:
    """Return the content of `search.json`; trials are written in their order, failed ones too."""
    best = best_of(tickets)
    return {
        "study": search.study,
        "storage": shown(search.storage),
        "task": search.task,
        "method": search.method,
        "scored_on": "held_out",
        "searched": search.identity(),
        "trials": search.trials,
        "best": None if best is None else _record(search, best),
        "tried": [_record(search, ticket) for ticket in tickets],
    }


def _require_own(file: Path, search: Search) -> None:
    """Raise if another search's or anybody's `search.json` is where this one's goes.

    Raises:
        ConfigError: It is.
    """
    if not file.exists():
        return
    content = read_json(file)
    study = content.get("study") if isinstance(content, dict) else None
    if study != search.study:
        raise bad_value(
            "output",
            str(search.output),
            f"search.json there is of study {study!r}, and would be overwritten; give another output",
        )


def _is_over(file: Path, search: Search) -> bool:
    """Whether a search has been written with all its trials, so that none is left to run."""
    return file.exists() and len(read_json(file).get("tried", [])) >= search.trials


def _record(search: Search, ticket: Ticket) -> dict[str, Any]:
    return {
        "number": ticket.number,
        "values": {key: ticket.last.params[key] for key in search.space if key in ticket.last.params},
        "score": ticket.last.value if ticket.complete else None,
        "error": ticket.error,
        "attempts": len(ticket.attempts),
        "machine": ticket.last.user_attrs.get(MACHINE),
        "run": f"runs/{search.run_name(ticket.number)}",
    }
