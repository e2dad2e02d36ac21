"""The stock yaml of a task with one run's paths, learning rate, fold and settings; and what is not stock about it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.common.hints import did_you_mean
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.superb.run import Run

__all__ = ["CONF", "effective", "flat", "literal", "look_up", "not_stock", "overrides", "places", "rates", "write"]

CONF = Path(__file__).resolve().parent / "conf"
"""The yaml files with SUPERB's hyperparameters, as s3prl ships them; ``--conf`` gives others."""

_FREE = ("runner.fp16", "runner.train_dataloader", "runner.evaluate_ratio")  # s3prl reads these, no yaml holds them
_FREE_BELOW = ("optimizer.", "scheduler.")  # go to the optimizer as they are, which refuses what it does not know


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    out: dict[str, Any] = {}
    for key, value in config.items():
        out.update(flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value})
    return out


def look_up(config: Mapping[str, Any], dotted: str) -> Any:
    """Value of a dotted key, None where it is not there."""
    value: Any = config
    for part in dotted.split("."):
        value = (value or {}).get(part)
    return value


def _assign(config: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def places(run: Run) -> dict[str, Any]:
    """Paths and loader workers: settings that say where and how fast, never what."""
    values = run.task.settings(run.read_from, run.prepared)
    workers = 0 if run.smoke and run.workers is None else run.workers
    if workers is not None:
        values[run.task.workers] = workers
    return values


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(
            f"{file}: no such file; --conf must name a folder with {file.name} in it, such as {CONF} (the default)"
        )
    try:
        config = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not a yaml file ({error})") from error
    if not isinstance(config, dict) or "runner" not in config:
        raise ConfigError(f"{file}: got no mapping with a section 'runner', expected a file like {CONF / file.name}")
    return config


@functools.cache
def _stock(name: str) -> dict[str, Any]:
    file = CONF / f"{name}.yaml"
    return flat(_read(file)) if file.is_file() else {}


def effective(run: Run, lr: float | None = None, fold: str | None = None) -> dict[str, Any]:
    """The yaml as s3prl gets it.

    Raises ConfigError for a setting that the yaml does not know or of another type, and where --nproc cannot keep the
    benchmark's batch.
    """
    config = _read((run.conf or CONF) / f"{run.task.name}.yaml")
    known = {**_stock(run.task.name), **flat(config)}
    values = {**(run.task.smoke if run.smoke else {}), **places(run)}
    values |= {key: _checked(run, key, value, known) for key, value in run.settings.items()}
    if lr is not None:
        values["optimizer.lr"] = lr
    if fold is not None and run.task.fold_key:
        values[run.task.fold_key] = fold
    for dotted, value in values.items():
        _assign(config, dotted, value)
    if run.nproc > 1 and run.task.trained:
        _share_updates(run, config)
    return config


def _checked(run: Run, key: str, value: Any, known: Mapping[str, Any]) -> Any:
    """A value of ``--set``, of the type that the yaml has there."""
    if key in known:
        return _like(known[key], key, value)
    below = [other for other in known if other.startswith(f"{key}.")]
    if below:
        raise ConfigError(f"--set {key}: is a section; set one of {', '.join(below)}")
    if key in (*_FREE, *run.task.free, run.task.workers, run.task.fold_key) or key.startswith(_FREE_BELOW):
        return value
    raise ConfigError(f"--set {key}: {run.task.name} has no such setting; {did_you_mean(key, known)}")


def _like(now: Any, key: str, value: Any) -> Any:
    if isinstance(now, bool) or not isinstance(now, int | float):
        same = now is None or isinstance(value, type(now)) or value is None
    else:
        try:  # YAML 1.1 takes 1e-3 for a text
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        same = math.isfinite(number) and not isinstance(value, bool)
        if same:
            value = int(number) if isinstance(now, int) and number == int(number) else number
    if not same:
        raise ConfigError(f"--set {key}: got {value!r}, expected a value like {now!r}")
    return value


def _share_updates(run: Run, config: dict[str, Any]) -> None:
    """Several GPUs share what one takes an update: first the accumulated batches, then the batch itself."""
    task = run.task
    if not task.distributed:
        raise ConfigError(
            f"--nproc {run.nproc}: s3prl trains {task.name} in one process only, each further one would draw the same "
            "utterances; leave --nproc out"
        )
    batches = int(config["runner"]["gradient_accumulate_steps"])
    shared = math.gcd(batches, run.nproc)
    rest = run.nproc // shared
    batch = look_up(config, task.batch) if task.batch else None
    if rest > 1 and (batch is None or int(batch) % rest):
        raise ConfigError(
            f"--nproc {run.nproc}: an update of {task.name} takes {batches} batches of {batch} utterances, which "
            f"{run.nproc} GPUs cannot share evenly; give an --nproc that divides {batches * int(batch or 1)}, or set "
            f"runner.gradient_accumulate_steps{f' and {task.batch}' if task.batch else ''} with --set"
        )
    config["runner"]["gradient_accumulate_steps"] = batches // shared
    if rest > 1:
        _assign(config, task.batch, int(batch or 0) // rest)


def rates(run: Run) -> tuple[float, ...]:
    """Learning rates to choose among; none for a task that is not trained."""
    if not run.task.trained:
        return ()
    return run.lrs or (float(look_up(effective(run), "optimizer.lr")),)


def not_stock(run: Run) -> list[str]:
    """What differs from the benchmark's configuration, in words; the learning rate is free (see :data:`.tasks.SWEEP`).

    Compares the yaml that s3prl gets with the package's own, so it sees --smoke, --set and --conf alike.
    """
    if run.smoke:
        return ["--smoke"]
    stock = _stock(run.task.name)
    if not stock:
        return [f"--conf (the package holds no {run.task.name}.yaml to compare with)"]
    own = flat(effective(Run(**{**vars(run), "nproc": 1})))  # how GPUs share an update is no other configuration
    free = {*places(run), run.task.workers, run.task.fold_key, "optimizer.lr"}
    keys = sorted(key for key in own.keys() | stock.keys() if key not in free and own.get(key) != stock.get(key))
    found = [f"{key}={own.get(key)!r} (stock {stock.get(key)!r})" for key in keys]
    found += [f"-s {run.feature}"] if run.feature != "hidden_states" else []
    return found + (["--normalize"] if run.normalize else [])


def literal(value: Any) -> str:
    """A value as s3prl's ``-o`` takes it.

    Raises ConfigError for texts that it would cut.
    """
    text = repr(value)
    if "=" in text or ",," in text:
        raise ConfigError(f"{text}: s3prl's override option cannot carry '=' or ',,'; rename the folder or link to it")
    return text


def overrides(values: Mapping[str, Any]) -> list[str]:
    """``-o key=value,,key=value``."""
    return ["-o", ",,".join(f"{key}={literal(value)}" for key, value in values.items())] if values else []


def write(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write ``FOLDER/config.yaml``."""
    return write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
