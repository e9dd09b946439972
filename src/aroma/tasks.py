"""Several tasks learnt one after another over one base model: a folder of adapters that build on each other.

The components of a task are its own. They start orthogonal to those of all earlier tasks, which lie beneath, take part
in every answer, and are never changed. The folder holds a plain LoRA adapter for each task, and `aroma_tasks.json`:

.. code-block:: text

    FOLDER/aroma_tasks.json     the tasks in their order, and which ones each was trained over
    FOLDER/TASK/                its own components and head, as any saved adapter
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, bad_value
from .files import own_file, read_json, write_json
from .outputs import TOKENIZER_FILES, copy_files, filled_at_once
from .outputs import new_folder as require_new_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from .saved import AdapterWeights
    from .tuner import AromaConfig

TASKS_FILE = "aroma_tasks.json"
CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
"""As in peft.utils, which loads PyTorch."""
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_GROWING = "default"
"""Name of the adapter that grows, in the model."""


class Tasks:
    """A folder of tasks that were learnt one after another.

    .. code-block:: python

        tasks = Tasks("adapters")
        model = tasks.grow(base, AromaConfig(task_type="SEQ_CLS"))
        Trainer(model, args, train_dataset=dataset, callbacks=[AromaCallback()]).train()
        tasks.save(model, "topics")                    # the next task is laid over this one
        model = tasks.load(fresh_base, "topics")       # plain LoRA

    Args:
        folder: The folder; made by the first save.

    Raises:
        CheckpointError: `aroma_tasks.json` is damaged or edited.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._over = _read_index(self.folder)

    @property
    def names(self) -> list[str]:
        """The tasks, in the order in which they were learnt."""
        return [*self._over]

    def over(self, task: str) -> list[str]:
        """Return which tasks a task was trained over; those that were removed since are left out.

        Raises:
            ConfigError: There is no such task.
        """
        return [name for name in self._over[self._known(task)] if name in self._over]

    def require_new(self, task: str) -> None:
        """Raise unless a new task can have this name.

        Raises:
            ConfigError: It is taken, or no name of a folder and an adapter.
        """
        if not _NAME.fullmatch(task) or task == _GROWING:
            remedy = f"give letters, digits, _, - and ., beginning with a letter or digit, and not {_GROWING!r}"
            raise bad_value("task", task, remedy)
        if task in self._over:
            raise bad_value("task", task, f"{self.folder} has it already; give another name, or remove it first")
        if os.path.lexists(self.folder / task):  # a save that was killed, or another's
            remedy = (
                f"{self.folder / task} is there, and {TASKS_FILE} does not name it; delete it, or give another name"
            )
            raise bad_value("task", task, remedy)

    # A new task ------------------------------------------------------------------------------------------------------

    def grow(self, base: nn.Module, config: AromaConfig) -> PeftModel:
        """Return a model that grows an adapter over those of all tasks.

        Args:
            base: The base model, with a head for the new task; its weights are frozen.
            config: Configuration of the new adapter.

        Raises:
            ConfigError: The base model lacks a matrix of a task, or it has another shape.
            CheckpointError: An adapter is missing, damaged or edited.
        """
        from peft import get_peft_model

        model: Any = get_peft_model(base, config, adapter_name=_GROWING)
        self.lay_beneath(model)
        return model

    def lay_beneath(self, model: Any) -> None:
        """Lay all tasks beneath the adapter `default` of a `PeftModel` that is about to grow.

        Raises:
            ConfigError, CheckpointError: See `grow`.
        """
        from .tuner import lay_beneath

        for task, adapter in [(task, self._read(task)) for task in self._over]:
            _lay(model, task, adapter)
        model.set_adapter(_GROWING)
        lay_beneath(model, _GROWING, self._over)

    def save(self, model: Any, task: str) -> None:
        """Save what a model from `grow` has learnt as a new task.

        Raises:
            ConfigError: The name is taken, or the model grew over other tasks than these.
        """
        from .checkpoint import save_adapter
        from .tuner import aroma_layers

        self._look_again()
        self.require_new(task)
        beneath = {layer.beneath.get(_GROWING) for layer in aroma_layers(model, _GROWING).values()}
        if beneath != {(*self._over,)}:
            raise bad_value(
                "task",
                task,
                f"the model grew over other tasks than {', '.join(self._over) or 'none'}, which the folder has now; "
                "take it from grow() of this very folder (aroma.save_adapter keeps what this one has learnt)",
            )
        save_adapter(model, self.folder / task, _GROWING)
        self._note({**self._over, task: self.names})

    def add(self, task: str, adapter: str | os.PathLike[str], over: Sequence[str]) -> None:
        """Copy a saved adapter into the folder as a new task.

        Args:
            task: Its name.
            over: The tasks that it was trained over.

        Raises:
            ConfigError: The name is taken, or `over` are not the tasks of this folder.
            CheckpointError: The adapter is damaged.
        """
        from .checkpoint import verify_adapter

        self._look_again()
        self.require_new(task)
        if [*over] != self.names:
            remedy = f"it was trained over {', '.join(over) or 'none'}, and {self.folder} has {', '.join(self.names)}"
            raise bad_value("task", task, f"{remedy}; train it again over these")
        verify_adapter(adapter)
        files = [file for file in Path(adapter).iterdir() if file.is_file()]
        with filled_at_once(self.folder / task, sum(file.stat().st_size for file in files)) as staging:
            for file in files:
                shutil.copyfile(own_file(Path(adapter), file.name), staging / file.name)
        self._note({**self._over, task: self.names})

    def remove(self, task: str) -> None:
        """Remove a task; the files of the others stay as they are.

        Tasks that were trained over it lose what it gave them, and answer otherwise.

        Raises:
            ConfigError: There is no such task.
        """
        self._look_again()
        self._note({name: over for name, over in self._over.items() if name != self._known(task)})
        shutil.rmtree(self.folder / task)

    # Used ------------------------------------------------------------------------------------------------------------

    def load(self, base: nn.Module, task: str | None = None, tasks: Sequence[str] | None = None) -> PeftModel:
        """Return the base model with a plain LoRA adapter; nothing of AROMA is in it.

        Args:
            base: The base model, with a head as the task has.
            task: The task whose head is used. With it the tasks that it was trained over are loaded, unless `tasks`
                says which; None: the last of `tasks`, or of all.
            tasks: Whose components are added up.

        Raises:
            ConfigError: There is no such task.
            CheckpointError: An adapter is missing, damaged or edited.
        """
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as scratch:
            self._write(Path(scratch), task, tasks)
            return PeftModel.from_pretrained(base, scratch)

    def export(self, out: str | os.PathLike[str], task: str | None = None, tasks: Sequence[str] | None = None) -> None:
        """Write what `load` loads as one plain LoRA adapter.

        Args:
            out: Folder to write; must be new or empty.
            task: See `load`.
            tasks: See `load`.

        Raises:
            OutputError: `out` is not empty, or cannot be written.
            ConfigError, CheckpointError: See `load`.
        """
        target = require_new_folder("out", out)
        head, _ = self._chosen(task, tasks)
        with filled_at_once(target, None) as staging:
            self._write(staging, task, tasks)
            copy_files([self.folder / head], staging, (*TOKENIZER_FILES, "aroma_task.json"))

    def _chosen(self, task: str | None, tasks: Sequence[str] | None) -> tuple[str, list[str]]:
        """Return whose head, and whose components, in the order of the folder."""
        if not self._over:
            raise bad_value("task", task, f"{self.folder} has no tasks yet; save one first")
        if tasks is None:
            head = self.names[-1] if task is None else self._known(task)
            return head, [*self.over(head), head]
        if not tasks:
            raise bad_value("tasks", [], "name one at least")
        chosen = {self._known(name) for name in tasks}
        return self._known(tasks[-1] if task is None else task), [name for name in self._over if name in chosen]

    def _write(self, folder: Path, task: str | None, tasks: Sequence[str] | None) -> None:
        from .files import write_tensors
        from .tuner.state import write_export_state

        head, chosen = self._chosen(task, tasks)
        whole = joined(self._read(head), [self._read(name) for name in chosen])
        tensors = tensors_of(whole)
        whole.lora_config().save_pretrained(str(folder))
        write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors)
        assert whole.state is not None, "AROMA has saved it"
        ranks = {name: entry["rank"] for name, entry in whole.state["modules"].items()}
        write_export_state(folder, whole.state, read_json(folder / CONFIG_NAME), tensors, ranks)

    # The folder ------------------------------------------------------------------------------------------------------

    def _look_again(self) -> None:
        """Read which tasks the folder has now: another process may have saved or removed one."""
        self._over = _read_index(self.folder)

    def _known(self, task: str) -> str:
        if task not in self._over:
            raise bad_value(
                "task", task, f"{self.folder} has {', '.join(self._over) or 'none yet'}; give one of these"
            )
        return task

    def _read(self, task: str) -> AdapterWeights:
        from .checkpoint import verify_adapter
        from .saved import read_adapter

        verify_adapter(self.folder / task)
        return read_adapter(self.folder / task)

    def _note(self, over: dict[str, list[str]]) -> None:
        content = {"format": _FORMAT, "tasks": [{"name": name, "over": [*names]} for name, names in over.items()]}
        write_json(self.folder / TASKS_FILE, content)
        self._over = over


def _read_index(folder: Path) -> dict[str, list[str]]:
    """Return the tasks that each task was trained over, by its name and in the order of the tasks."""
    path = folder / TASKS_FILE
    if not os.path.lexists(path):
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise bad_value("tasks", str(folder), f"it has no {TASKS_FILE}; give a folder of tasks, or a new one")
        return {}
    content = read_json(own_file(folder, TASKS_FILE))
    remedy = "no version of aroma writes that; restore the file"
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise bad_value(f"{path}: format", found, f"this aroma reads format {_FORMAT}; upgrade", CheckpointError)
    over: dict[str, list[str]] = {}
    entries = content.get("tasks")
    for entry in entries if isinstance(entries, list) else [None]:
        name, names = (entry.get("name"), entry.get("over")) if isinstance(entry, dict) else (None, None)
        is_name = isinstance(name, str) and _NAME.fullmatch(name) and name not in (_GROWING, *over)
        if not (is_name and isinstance(names, list) and all(isinstance(one, str) for one in names)):
            raise bad_value(f"{path}: tasks", json.dumps(entry)[:200], remedy, CheckpointError)
        over[str(name)] = names
    return over


def _lay(model: Any, task: str, adapter: AdapterWeights) -> None:
    """Lay a saved adapter, without its head, beneath what grows: it takes part, and never trains."""
    from peft import PeftModel, set_peft_model_state_dict

    from .tuner import AromaConfig, aroma_layers

    _refuse_parts(adapter)
    modules = dict(model.get_base_model().named_modules())
    for name, update in adapter.updates.items():
        matrix = _matrix(modules, name, adapter.experts)
        if matrix is None:
            raise ConfigError(f"task {task!r}: the base model has no {name}; give the model that it was trained over")
        shape = (getattr(matrix, "out_features", None), getattr(matrix, "in_features", None))
        if None not in shape and shape != update.shape:
            raise ConfigError(f"task {task!r}: {name} is {shape} in the base model, and {update.shape} in the task")
    # Not the method of a subclass, which would give it a head.
    names, parameters = [*adapter.modules], [*adapter.experts]
    PeftModel.add_adapter(
        model, task, AromaConfig(target_modules=names, target_parameters=parameters or None, inference_mode=True)
    )
    set_peft_model_state_dict(model, tensors_of(replace(adapter, others={})), adapter_name=task)
    for layer in aroma_layers(model, task).values():
        layer.freeze(task)


def _matrix(modules: Mapping[str, nn.Module], name: str, experts: Container[str]) -> Any:
    """Return the module with a matrix of a task, by its name in the base model; None if there is none."""
    stack, _, index = name.rpartition(".")
    if stack not in experts:
        return modules.get(name)
    module, _, parameter = stack.rpartition(".")
    holder: Any = modules.get(module)
    weight = getattr(getattr(holder, "base_layer", holder), parameter, None)
    return holder if weight is not None and int(index) < len(weight) else None


def _refuse_parts(adapter: AdapterWeights) -> None:
    """Raise if an adapter has parts of modules: only one adapter of a model can split a module."""
    if adapter.parts:
        raise bad_value(
            "split_modules",
            next(iter(adapter.parts)),
            "there is no folder of tasks for parts of a module, which only one adapter of a model can split; leave "
            "split_modules out, or use the adapter in PEFT",
        )


def read_whole(folder: str | os.PathLike[str]) -> AdapterWeights:
    """Read a saved adapter as it answers: one of a folder of tasks together with those that it was trained over.

    Raises:
        CheckpointError, ConfigError: See `read_adapter`.
    """
    from .saved import read_adapter

    path = Path(folder)
    if not is_task(path):
        return read_adapter(path)
    tasks = Tasks(path.resolve().parent)
    names = [*tasks.over(path.resolve().name), path.resolve().name]
    return joined(read_adapter(path), [tasks._read(name) for name in names])


@contextmanager
def loadable(adapter: AdapterWeights) -> Iterator[Path]:
    """Yield a folder from which PEFT loads the tensors of an adapter that was read whole."""
    if not is_task(adapter.folder):
        yield adapter.folder
        return
    from .files import write_tensors

    with tempfile.TemporaryDirectory() as scratch:
        write_tensors(Path(scratch) / SAFETENSORS_WEIGHTS_NAME, tensors_of(adapter))
        yield Path(scratch)


def tensors_of(adapter: AdapterWeights) -> dict[str, Tensor]:
    """Return an adapter's tensors as its file has them: components in their form, and others of any shape."""
    from .tuner.layout import PEFT_PREFIX

    tensors = dict(adapter.others)
    for stem, (form, B, A) in adapter.packed().held.items():
        tensors |= form.tensors(f"{PEFT_PREFIX}{stem}", B, A)
    return tensors


def export_plain(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], tasks: Sequence[str] | None = None
) -> list[str]:
    """Write tasks as one plain LoRA adapter, and return their names.

    Args:
        folder: A folder of tasks, or a task in one.
        out: Folder to write; must be new or empty.
        tasks: Of a folder of tasks: whose components are added up; the last one's head is used. None: all.

    Raises:
        ConfigError: It is neither, or `tasks` are given for one task.
        OutputError, CheckpointError: See `Tasks.export`.
    """
    path = Path(folder).resolve()
    if os.path.lexists(path / TASKS_FILE):
        found, task = Tasks(path), None
        tasks = found.names if tasks is None else tasks
    elif os.path.lexists(path.parent / TASKS_FILE):
        found, task = Tasks(path.parent), path.name
        if tasks is not None:
            raise bad_value("--tasks", [*tasks], f"{folder} is one task; give the folder that holds it")
    else:
        raise bad_value("ADAPTER", str(folder), "it is no folder of tasks, and a saved adapter is plain as it is")
    found.export(out, task, tasks)
    return found._chosen(task, tasks)[1]


def is_task(folder: str | os.PathLike[str]) -> bool:
    """Whether an adapter is one of a folder of tasks, and was trained over others."""
    path = Path(folder).resolve()
    return os.path.lexists(path.parent / TASKS_FILE) and bool(_read_index(path.parent).get(path.name))


def joined(head: AdapterWeights, adapters: Sequence[AdapterWeights]) -> AdapterWeights:
    """Return one adapter whose updates are the sums of those of `adapters`, with head and state of `head`."""
    import torch

    from .saved import AdapterWeights, experts_tensors

    updates, modules = {}, {}
    experts: dict[str, list[str]] = {}
    for adapter in adapters:
        if adapter.state is None:
            remedy = "AROMA did not save it, so its modules and their shapes are not known; give adapters of AROMA"
            raise bad_value("adapters", str(adapter.folder), remedy)
        _refuse_parts(adapter)
        modules.update(adapter.state["modules"])
        for module, names in adapter.state.get("experts", {}).items():
            experts[module] = _joined_names(module, experts.get(module, []), names)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.updates):
        own = [adapter.updates[name] for adapter in adapters if name in adapter.updates]
        A = torch.cat([update.A for update in own])
        updates[name] = replace(own[0], B=torch.cat([update.B for update in own], 1), A=A, alpha=float(len(A)))
    ranked = {name: {**entry, "rank": updates[name].rank if name in updates else 0} for name, entry in modules.items()}
    state = {**(head.state or {}), "modules": ranked, "experts": experts}
    whole = AdapterWeights(head.folder, head.config, updates, head.others, state, {}, {})
    return replace(whole, experts=experts_tensors(whole))


def _joined_names(module: str, some: list[str], more: list[str]) -> list[str]:
    """Return all parameters of experts that tasks grow in a module, in the order in which PEFT wraps them.

    Raises:
        ConfigError: Neither task grows all of them, so the order is not known.
    """
    fewer, all_names = sorted((some, more), key=len)
    if not {*fewer} <= {*all_names}:
        raise bad_value(
            "target_parameters",
            fewer[0],
            f"tasks that are joined grow other parameters of {module}, {', '.join(all_names)}; let one of them grow "
            "all of these",
        )
    return all_names
