"""What a run is made of, by content, and whether finished work was made of the same.

Paths play no part: a corpus, a checkpoint or an experiment may move. Two identities are compared field by field, so
that a refusal says what differs.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common import provenance
from s3prl_speaker_upstreams.common.digests import file_sha256, json_sha256
from s3prl_speaker_upstreams.superb.configuration import effective, flat, places
from s3prl_speaker_upstreams.superb.errors import IdentityMismatch
from s3prl_speaker_upstreams.superb.layouts import Layout
from s3prl_speaker_upstreams.superb.run import Run
from s3prl_speaker_upstreams.superb.saved import Saved

__all__ = [
    "content",
    "corpus_digest",
    "differences",
    "prepared_digest",
    "refuse",
    "resume_seed",
    "saved_differences",
    "stack",
    "static",
]

_TOLERANCE = 0.02  # of the upstream's mean and deviation on noise: devices round differently


def content(value: str | None) -> str | None:
    """Digest of what a file or folder holds; names, URLs and ids as they are."""
    if value is None:
        return None
    path = Path(value)
    if path.is_file():
        return f"sha256:{file_sha256(path, path.name)}"
    if path.is_dir():
        files = {str(one.relative_to(path)): file_sha256(one) for one in sorted(path.rglob("*")) if one.is_file()}
        return f"sha256:{json_sha256(files)}"
    return value


def _short(path: Path, root: Path) -> str:
    name, above = str(path), f"{root}{os.sep}"  # texts: a corpus has a hundred thousand paths
    return name[len(above) :] if name.startswith(above) else "/".join(path.parts[-2:])


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def corpus_digest(layout: Layout, root: Path) -> str:
    """Of the recordings' names and sizes, part by part, and of the texts' contents."""
    with ThreadPoolExecutor(16) as pool:  # a network file system answers many questions at once
        parts = {
            split: sorted(zip((_short(path, root) for path in paths), pool.map(_size, paths), strict=True))
            for split, paths in layout.splits.items()
        }
        texts = sorted(zip((_short(p, root) for p in layout.tables), pool.map(file_sha256, layout.tables), strict=True))
    return json_sha256([parts, texts])


def prepared_digest(prepared: Path, root: Path) -> str | None:
    """Of the prepared files, with the corpus' place taken out of them; None before they are there."""
    if not (prepared / ".whole").is_file():
        return None
    place = str(root).encode()
    found = {}
    for folder, names, files in os.walk(prepared):
        names[:] = [name for name in names if name != "corpus"]
        for name in files:
            path = Path(folder) / name
            if not name.startswith("."):
                text = path.read_bytes().replace(place, b"CORPUS")
                found[str(path.relative_to(prepared))] = json_sha256(text.decode(errors="surrogateescape"))
    return json_sha256(found)


def stack(run: Run) -> dict[str, str]:
    """Versions that can move a number; builds for other CUDA versions count as the same."""
    found = provenance.versions(("torch", "torchaudio", "numpy", "s3prl-speaker-upstreams"))
    found["python"] = ".".join(platform.python_version_tuple()[:2])
    return {name: version.split("+")[0] for name, version in found.items()}


def s3prl_version(run: Run) -> dict[str, str | None]:
    """Version and, where a checkout is used, its commit; a digest of its sources where that does not say it all."""
    if run.s3prl_root is not None:
        file = run.s3prl_root / "s3prl" / "version.txt"
        version = file.read_text().strip() if file.is_file() else None
        # a copy inside another project's checkout must not be given that project's commit
        revision = provenance.git_revision(run.s3prl_root) if (run.s3prl_root / ".git").exists() else None
        if revision is None or revision.endswith("-dirty"):
            package = run.s3prl_root / "s3prl"
            sources = {str(one.relative_to(package)): file_sha256(one) for one in sorted(package.rglob("*.py"))}
            revision = f"{revision or 'copy'}+{json_sha256(sources)[:12]}"
        return {"version": version, "revision": revision}
    found = provenance.versions(("s3prl", "espnet-s3prl"))
    names = [f"{name} {found[name]}" for name in ("s3prl", "espnet-s3prl") if name in found]
    return {"version": ", ".join(names).removeprefix("s3prl ") or None, "revision": None}


def static(run: Run, corpus: str) -> dict[str, Any]:
    """What can be known without loading the upstream or preparing the corpus.

    `corpus` is :func:`corpus_digest`. Learning rate, fold and number of updates belong to one experiment, not to the
    run, and are left out.
    """
    free = {*places(run), run.task.workers, "optimizer.lr", "runner.total_steps", run.task.fold_key}
    return {
        "task": run.task.name,
        "upstream": run.upstream,
        "ckpt": content(run.ckpt),
        "model_config": content(run.model_config),
        "feature": run.feature,
        "normalize": run.normalize,
        "seed": run.seed,
        "corpus": corpus,
        "config": {key: value for key, value in flat(effective(run)).items() if key not in free},
        "stack": stack(run),
        "s3prl": s3prl_version(run),
    }


def _same(key: str, then: Any, now: Any) -> bool:
    if key == "behaviour":
        return len(then) == len(now) and all(
            math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE * abs(y[1]))
            for x, y in zip(then, now, strict=True)
            for a, b in zip(x, y, strict=True)
        )
    return then == now


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], accept: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
    """(field, then, now) of all fields that both know and that differ; nested ones are dotted.

    >>> differences({"seed": 1, "stack": {"torch": "2.1"}}, {"seed": 2, "stack": {"torch": "2.11"}}, ["stack"])
    [('seed', 1, 2)]
    """
    accepted, found = set(accept), []
    for key in then.keys() & now.keys() - accepted:
        old, new = then[key], now[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            flat_old, flat_new = flat(old), flat(new)
            found += [
                (f"{key}.{name}", flat_old.get(name), flat_new.get(name))
                for name in sorted(flat_old.keys() | flat_new.keys())
                if flat_old.get(name) != flat_new.get(name)
            ]
        elif not _same(key, old, new):
            found.append((key, old, new))
    return sorted(found, key=lambda one: one[0])


def refuse(where: Path, found: list[tuple[str, Any, Any]], run: Run) -> IdentityMismatch:
    """The error for finished work at `where` that was made from something else."""
    shown = [f"{name} {_brief(then)}, this run has {_brief(now)}" for name, then, now in found[:3]]
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    fields = sorted({name.split(".")[0] for name, _, _ in found})
    accept = f"; --accept {','.join(fields)} goes on all the same, and says so in the result"
    return IdentityMismatch(
        f"{where}: was made with {'; '.join(shown)}{more}. To keep both, give another --tag (such as "
        f"{run.label}-2) or --exp; --force makes it anew{accept if set(fields) <= {'stack', 's3prl'} else ''}"
    )


def _brief(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 60 else f"{text[:56]}...{text[-1]}"


def resume_seed(seed: int, step: int) -> int:
    """Seed of a training that goes on from update `step`, so that it does not draw again what it has seen.

    >>> resume_seed(1337, 1000) == resume_seed(1337, 1000) != resume_seed(1337, 2000)
    True
    """
    return int(json_sha256([seed, step])[:7], 16)


def saved_differences(
    run: Run, saved: Saved, config: Mapping[str, Any], seeds: Iterable[int], *, places_known: bool
) -> list[tuple[str, Any, Any]]:
    """How a checkpoint's own record of its command and yaml differs from this run.

    seeds : those that the training may have been started or resumed with
    places_known : whether the digests of checkpoint and -g were recorded, so that their paths say nothing
    """
    args = {
        "upstream": run.upstream,
        "downstream": run.task.downstream,
        "upstream_feature_selection": run.feature,
        "upstream_feature_normalize": run.normalize,
        "upstream_layer_selection": None,
        "upstream_trainable": False,
    }
    found = [(name, saved.args[name], now) for name, now in args.items() if name in saved.args]
    if "seed" in saved.args and saved.args["seed"] not in set(seeds):
        found.append(("seed", saved.args["seed"], run.seed))
    if not places_known:
        for name, now in (("upstream_ckpt", run.ckpt), ("upstream_model_config", run.model_config)):
            if name in saved.args and run.place(saved.args[name]) != run.place(now):
                found.append((name, content(saved.args[name]), content(now)))
    free = {*places(run), run.task.workers, "runner.total_steps"}
    then, own = flat(saved.config), flat(config)
    # s3prl's recipes take keys out of what they save and fill in others that the yaml leaves empty
    found += [
        (f"config.{key}", then[key], own[key])
        for key in sorted(then.keys() & own.keys() - free)
        if own[key] is not None
    ]
    return [(name, old, new) for name, old, new in found if old != new]
