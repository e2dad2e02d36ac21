"""The SUPERB tasks, one module each; whatever module lies in this folder is a task.

Adding one: write ``mytask.py`` here with a :class:`..task.Task` called ``TASK``, and ``../conf/NAME.yaml`` beside the
others (or give it with ``--conf``).

Examples
--------
>>> list(TASKS)[:4]
['PR', 'ASR', 'KS', 'QbE']
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence

from s3prl_speaker_upstreams.superb.errors import UnknownTask
from s3prl_speaker_upstreams.superb.task import Metric, Package, Task

__all__ = ["FOLDS", "SWEEP", "TASKS", "Metric", "Package", "Task", "find_task", "load_tasks"]

FOLDS = ("fold1", "fold2", "fold3", "fold4", "fold5")
"""ER's folds: each IEMOCAP session is the test set once; the score is their mean."""

SWEEP = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Learning rates of ``--lr sweep``: the powers of ten that the SUPERB paper (arXiv 2105.01051, section 4) searches."""


def load_tasks(folders: Sequence[str] | None = None) -> dict[str, Task]:
    """Name -> task of all modules in the folders of this package, in the order of SUPERB's tables.

    Raises
    ------
    TypeError if a module has no ``TASK``; ValueError if two tasks have one name.
    """
    found: dict[str, Task] = {}
    for module in pkgutil.iter_modules(__path__ if folders is None else folders):
        name = f"{__name__}.{module.name}"
        task = getattr(importlib.import_module(name), "TASK", None)
        if not isinstance(task, Task):
            raise TypeError(f"{name}: has no TASK of class {Task.__module__}.Task")
        if task.name in found:
            raise ValueError(f"{name}: its task {task.name!r} is that of another module; give it another name")
        found[task.name] = task
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


TASKS: dict[str, Task] = load_tasks()
"""Name -> task, in the order of SUPERB's tables."""


def find_task(name: str) -> Task:
    """The task called `name`, whatever its case.

    Raises UnknownTask, with the nearest name and the list of all.

    Examples
    --------
    >>> find_task("qbe").downstream
    'quesst14_dtw'
    """
    folded = {task.lower(): task for task in TASKS}
    if name.lower() in folded:
        return TASKS[folded[name.lower()]]
    near = difflib.get_close_matches(name.lower(), folded, n=1)
    hint = f"; did you mean {folded[near[0]]}?" if near else ""
    raise UnknownTask(f"unknown task {name!r}{hint} The tasks are {', '.join(TASKS)}")
