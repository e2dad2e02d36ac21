"""Elements of a job array: everything that may run at once, and what joins it."""

from __future__ import annotations

from collections.abc import Sequence

from s3prl_speaker_upstreams.superb.run import DEFAULT_SEED
from s3prl_speaker_upstreams.superb.task import Task

__all__ = ["PARTS", "elements"]

PARTS = ("all", "train", "join")
"""all: an element does all stages of one (task, upstream, seed); train: it trains one learning rate and fold of it;
join: it chooses among what those trained, evaluates and scores."""

_STAGES = {"train": "check,prepare,train", "join": "choose,evaluate,score"}


def elements(
    part: str,
    tasks: Sequence[Task],
    upstreams: Sequence[str],
    *,
    seeds: Sequence[int] = (DEFAULT_SEED,),
    lrs: Sequence[float] = (),
) -> list[list[str]]:
    """Options of the command ``run``, one list an element, in an order that the arguments alone decide.

    lrs : learning rates; empty takes each yaml's own, which is one element

    Examples
    --------
    >>> from s3prl_speaker_upstreams.superb.tasks import TASKS
    >>> for options in elements("train", [TASKS["KS"]], ["fbank"], lrs=(1e-3, 1e-4)):
    ...     print(*options)
    KS fbank --seed 1337 --lr 0.001,0.0001 --only-lr 0.001 --stages check,prepare,train
    KS fbank --seed 1337 --lr 0.001,0.0001 --only-lr 0.0001 --stages check,prepare,train
    """
    found = []
    for task in tasks:
        for upstream in upstreams:
            for seed in seeds:
                whole = [task.name, upstream, "--seed", str(seed)]
                whole += ["--lr", ",".join(map(repr, lrs))] if lrs else []
                if part != "train":
                    found.append(whole + (["--stages", _STAGES[part]] if part in _STAGES else []))
                    continue
                for lr in lrs if lrs and task.trained else (None,):
                    for fold in task.folds or (None,):
                        own = ["--only-lr", repr(lr)] if lr is not None else []
                        own += ["--only-fold", fold] if fold is not None else []
                        found.append([*whole, *own, "--stages", _STAGES[part]])
    return found
