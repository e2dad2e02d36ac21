"""One property against one layer: fit on every training part, test on the groups left out, and the controls."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cka_addon.probe import controls, folds, solver, statistics
from cka_addon.probe.errors import LabelError, ProbeError
from cka_addon.probe.examples import Gathered, Property

logger = logging.getLogger(__name__)

PROBES = ("linear", "mlp")
SOLVERS = ("auto", "exact", "stream")
EXACT_UP_TO = 30_000  # examples that are solved to convergence by themselves; more are streamed
COPIES = 4  # of one layer's examples that a fit in memory holds
INNER = 5  # one training group in five chooses the hyperparameters
PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)  # Voita and Titov, 2020


@dataclass(frozen=True)
class Settings:
    """How probes are fitted and held against each other; all of it is stored with the result.

    probes : "linear" and / or "mlp";  folds : 2 or more, or 1 to hold a quarter of the groups out
    solver : "exact" (in memory, to convergence), "stream" (any number of examples) or "auto" (exact up to 30,000
        examples that fit `memory`, bytes);  control, mdl : whether to fit the control task and the online code
    min_count : classes with fewer examples are left out and counted
    confidence, resamples : of the intervals and of the differences
    """

    probes: tuple[str, ...] = ("linear",)
    folds: int = 5
    solver: str = "auto"
    memory: int = 2 << 30
    control: bool = True
    mdl: bool = False
    confidence: float = 0.95
    resamples: int = 1000
    min_count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.probes:
            if name not in PROBES:
                raise ProbeError(f"got probe '{name}'; expected one of {', '.join(PROBES)}")
        if self.solver not in SOLVERS:
            raise ProbeError(f"got solver={self.solver!r}; expected one of {', '.join(SOLVERS)}")
        if not self.probes or self.folds < 1 or self.resamples < 100 or not 0 < self.confidence < 1:
            raise ProbeError(
                f"got probes={self.probes}, folds={self.folds}, resamples={self.resamples}, confidence="
                f"{self.confidence}; expected a probe, at least 1 fold, 100 resamples and a confidence between 0 and 1"
            )


@dataclass
class Question:
    """A property ready to be asked of layers.

    keep : positions of the used examples among those on disk;  y : (examples,) int64 classes or float64 numbers
    control : the same for the control task;  group : (examples,) int;  fold : (examples,) int, -1 trains only
    within : (examples,) int, whose means are taken away, or None
    """

    prop: Property
    gathered: Gathered
    settings: Settings
    keep: np.ndarray
    y: np.ndarray
    control: np.ndarray
    classes: list[str]
    group: np.ndarray
    groups: list[str]
    fold: np.ndarray
    by: str
    why: str
    within: np.ndarray | None = None
    warnings: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def number(self) -> bool:
        """Whether a number is foretold, not a class."""
        return self.prop.kind == "number"

    @property
    def tested(self) -> np.ndarray:
        """(examples,) bool, those that some fold tests."""
        return self.fold >= 0

    def streamed(self, width: int) -> bool:
        """Whether a layer of this width is streamed."""
        if self.settings.solver != "auto":
            return self.settings.solver == "stream"
        return len(self.y) > EXACT_UP_TO or COPIES * 4 * width * len(self.y) > self.settings.memory

    def inner(self, train: np.ndarray, fold: int) -> np.ndarray:
        """(train,) bool: the groups of the training part that choose the hyperparameters."""
        names = [self.groups[g] for g in self.group[train]]
        labels = None if self.number else [self.classes[c] for c in self.y[train]]
        many = len(set(names))
        if many < 2:
            raise ProbeError(f"{self.prop.name}: fold {fold} trains on one {self.by} only; expected at least two")
        dealt = folds.deal(names, labels, min(INNER, many), self.settings.seed + 1 + fold)
        return dealt == 0

    def sums(self, guess: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Sums over groups of what was foretold for the tested examples (see `statistics`)."""
        at = self.tested
        if self.number:
            base = np.zeros(len(truth))
            for f in range(self.settings.folds):
                base[self.fold == f] = truth[self.fold != f].mean()
            error, spread = (guess - truth) ** 2, (base - truth) ** 2
            return statistics.group_sums(self.group[at], len(self.groups), error[at], spread[at])
        return statistics.class_sums(
            self.group[at], len(self.groups), truth[at], guess[at].astype(np.int64), len(self.classes)
        )

    def used_groups(self) -> np.ndarray:
        """Groups that are tested."""
        return np.unique(self.group[self.tested])


def ask(
    gathered: Gathered,
    settings: Settings,
    group_of: Mapping[str, str],
    by: str,
    within_of: Mapping[str, str] | None = None,
) -> Question:
    """Make a question of gathered examples: classes, folds, control labels.

    group_of : recording -> group. Raises LabelError where there is one class only, FoldError for too few groups.
    """
    prop = gathered.prop
    rows = gathered.rows()
    if not len(rows):
        raise LabelError(f"{prop.name}: no example is left ({rows.counts}); expected labels within the recordings")
    beyond = rows.counts.get("segments beyond the audio", 0)
    total = sum(len(prop.labels.segments[n]) for n in prop.names.values()) if prop.labels.segments else 0
    if beyond > total / 2:
        raise LabelError(
            f"{prop.name}: {beyond} of {total} segments begin behind the end of their recording; expected seconds: are "
            "the times in another unit, or the labels of other recordings?"
        )
    keep = np.arange(len(rows))
    counts = dict(rows.counts)
    warnings: list[str] = []
    if prop.kind == "class":
        often = Counter(rows.values.tolist())
        rare = sorted(c for c, n in often.items() if n < settings.min_count)
        if rare:
            keep = np.flatnonzero(~np.isin(rows.values, rare))
            warnings.append(
                f"{len(rare)} classes of fewer than {settings.min_count} examples left out: {', '.join(rare[:5])}"
            )
        classes = sorted(set(often) - set(rare))
        if len(classes) < 2:
            raise LabelError(
                f"{prop.name}: got one class only, {classes}; expected at least two: take another column, or leave the "
                "restriction (--where) that makes them equal"
            )
        code = {c: i for i, c in enumerate(classes)}
        y = np.array([code[v] for v in rows.values[keep].tolist()], dtype=np.int64)
    else:
        classes = []
        y = rows.values.astype(np.float64)
        if not np.isfinite(y).all():
            raise LabelError(f"{prop.name}: got values that are no finite numbers; expected finite ones")
        if np.ptp(y) == 0:
            raise LabelError(f"{prop.name}: got one value only, {y[0]:g}; expected numbers that vary")
    utterances = rows.utterances[keep]
    names = [group_of[u] for u in utterances.tolist()]
    labels = None if prop.kind == "number" else [classes[c] for c in y]
    made = folds.make_folds(names, labels, utterances.tolist(), folds=settings.folds, seed=settings.seed, by=by)
    if made.by != by:
        names = utterances.tolist()
        warnings.append(f"grouped by utterance, not by {by}: {made.why}")
    groups, group = np.unique(np.array(names, dtype=str), return_inverse=True)
    if labels is not None:
        warnings += folds.class_warnings(made.fold, labels)
    within = None
    if within_of is not None:
        _, within = np.unique(np.array([within_of[u] for u in utterances.tolist()]), return_inverse=True)
    control = controls.control_labels(rows.types[keep].tolist(), y, settings.seed)
    question = Question(
        prop,
        gathered,
        settings,
        keep,
        y,
        control,
        classes,
        group,
        groups.tolist(),
        made.fold,
        made.by,
        made.why,
        within,
        warnings,
        counts,
        rows.left_out,
    )
    if len(question.used_groups()) < statistics.MIN_GROUPS:
        warnings.append(f"{len(question.used_groups())} {made.by}s are tested: no intervals, no verdicts")
    return question


@dataclass
class Answer:
    """What one layer knows: sums over groups, of the labels and of the control task.

    strengths : hyperparameter chosen in each fold;  bits : online code length, with `uniform` bits for no knowledge
    """

    sums: np.ndarray
    control: np.ndarray | None
    strengths: list[float]
    how: str
    bits: float | None = None
    uniform: float | None = None


def baseline(question: Question) -> np.ndarray:
    """Sums of the majority class (or the mean) of each training part."""
    guess = np.zeros(len(question.y), dtype=question.y.dtype)
    for f in range(question.settings.folds):
        train = question.y[question.fold != f]
        guess[question.fold == f] = train.mean() if question.number else np.bincount(train).argmax()
    return question.sums(guess, question.y)


def answer(question: Question, model: str, layer: str, width: int, probe: str) -> Answer:
    """Fit and test one probe family on one layer."""
    if question.streamed(width):
        if probe != "linear":
            raise ProbeError(
                f"{question.prop.name}: {len(question.y)} examples of {width} numbers are streamed, the small network "
                "works in memory only; use --per-utterance N, more --memory with --solver exact, or --probes linear"
            )
        if question.settings.mdl:
            raise ProbeError(
                f"{question.prop.name}: the online code needs the examples in memory, {len(question.y)} are streamed; "
                "use --per-utterance N, or --solver exact with enough --memory"
            )
        return _stream_number(question, model, layer) if question.number else _stream(question, model, layer, width)
    x = question.gathered.layer(model, layer)[torch.from_numpy(question.keep)]
    if question.within is not None:
        x = x - _within_means(question, [(x, np.arange(len(x)))], width)[torch.from_numpy(question.within)]
    return _exact(question, x, probe)


def _fit(question: Question, probe: str, x: Tensor, y: Tensor, inner: np.ndarray, seed: int, strength: float | None):
    classes = len(question.classes)
    if probe == "mlp":
        return solver.fit_network(x, y, classes, inner=inner, seed=seed)
    if question.number:
        kinds = solver.RIDGE_STRENGTHS if strength is None else (strength,)
        return solver.fit_ridge(x, y, inner=inner, strengths=kinds)
    if strength is not None:
        return solver.fit_softmax(x, y, classes, strengths=(strength,))
    return solver.fit_softmax(x, y, classes, inner=inner)


def _exact(question: Question, x: Tensor, probe: str) -> Answer:
    tasks = {"labels": question.y}
    if question.settings.control:
        tasks["control"] = question.control
    guesses = {name: np.zeros(len(question.y), dtype=question.y.dtype) for name in tasks}
    strengths: list[float] = []
    for f in range(question.settings.folds):
        train = np.flatnonzero(question.fold != f)
        test = np.flatnonzero(question.fold == f)
        inner = question.inner(train, f)
        xt = x[torch.from_numpy(train)]
        strength = None
        for name, y in tasks.items():
            # The control task is asked of the same probe: its strength is the one chosen for the labels.
            fitted = _fit(question, probe, xt, torch.from_numpy(y[train]), inner, question.settings.seed + f, strength)
            if name == "labels":
                strengths.append(fitted.strength)
                strength = fitted.strength if probe == "linear" else None
            xs = x[torch.from_numpy(test)]
            found = fitted.predict(xs) if question.number else fitted.scores(xs).argmax(1)
            guesses[name][test] = found.numpy()
    bits = uniform = None
    if question.settings.mdl and not question.number and probe == "linear":
        bits, uniform = online_code(question, x)
    control = question.sums(guesses["control"], question.control) if "control" in guesses else None
    return Answer(question.sums(guesses["labels"], question.y), control, strengths, "exact", bits, uniform)


def online_code(question: Question, x: Tensor) -> tuple[float, float]:
    """Bits to send the labels to someone who has the features (Voita and Titov, 2020), and bits without them.

    Groups come in a random order; each portion is coded by a probe fitted on the portions before it.
    """
    y, many = question.y, len(question.classes)
    rng = np.random.default_rng([question.settings.seed, 7])
    rank = rng.permutation(len(question.groups))[question.group]
    order = np.lexsort((rng.permutation(len(y)), rank))
    ends = sorted({max(int(round(p * len(y))), 1) for p in PORTIONS if round(p * len(y)) >= min(2 * many, len(y) // 4)})
    bits = ends[0] * np.log2(many)
    for begin, end in zip(ends, ends[1:], strict=False):
        train, coming = order[:begin], order[begin:end]
        # Whole groups choose the strength; of a single one, every fifth example.
        several = len(set(question.group[train].tolist())) > 1
        inner = question.inner(train, 0) if several else np.arange(begin) % INNER == 0
        if not inner.any() or inner.all():
            inner = np.arange(begin) % INNER == 0
        probe = solver.fit_softmax(
            x[torch.from_numpy(train)], torch.from_numpy(y[train]), many, inner=inner, strengths=solver.STRENGTHS
        )
        scores = probe.scores(x[torch.from_numpy(coming)])
        bits += solver.log_loss(scores, torch.from_numpy(y[coming])) * len(coming) / np.log(2)
    return float(bits), float(len(y) * np.log2(many))


# -- streams ---------------------------------------------------------------------------------------------------------
def _within_means(question: Question, parts, width: int) -> Tensor:
    """(values, width) mean of the features over the examples of every value of `within`."""
    if question.within is None:
        raise ProbeError("no grouping was given whose means could be taken away")
    count = int(question.within.max()) + 1
    total = torch.zeros(count, width, dtype=torch.float64)
    for x, at in parts:
        total.index_add_(0, torch.from_numpy(question.within[at]), x.double())
    return (total / torch.from_numpy(np.bincount(question.within, minlength=count))[:, None]).float()


def _reading(question: Question, model: str, layer: str) -> Callable[[], Iterator[tuple[Tensor, np.ndarray]]]:
    """A function that reads the layer's used examples from the begin: (features, positions in `question.y`)."""
    place = np.full(int(question.keep.max()) + 1, -1)
    place[question.keep] = np.arange(len(question.keep))

    def read() -> Iterator[tuple[Tensor, np.ndarray]]:
        for x, at in question.gathered.parts(model, layer):
            known = at < len(place)
            mine = np.where(known, place[np.minimum(at, len(place) - 1)], -1)
            use = mine >= 0
            if use.all():
                yield x, mine
            elif use.any():
                yield x[torch.from_numpy(use)], mine[use]

    if question.within is None:
        return read
    means = _within_means(question, read(), next(iter(read()))[0].shape[1])
    codes = question.within

    def centred() -> Iterator[tuple[Tensor, np.ndarray]]:
        for x, at in read():
            yield x - means[torch.from_numpy(codes[at])], at

    return centred


def _stream(question: Question, model: str, layer: str, width: int) -> Answer:
    read = _reading(question, model, layer)
    settings = question.settings
    tasks = {"labels": question.y}
    if settings.control:
        tasks["control"] = question.control
    learn: dict[tuple[str, int], solver.StreamSoftmax] = {}
    passes = 1
    for f in range(settings.folds):
        train = int((question.fold != f).sum())
        if train < len(question.classes):
            raise ProbeError(f"{question.prop.name}: fold {f} trains on {train} examples; expected more than classes")
        passes = max(passes, solver.passes_for(train))
        steps = solver.passes_for(train) * len(question.y) // solver.BATCH
        for name in tasks:
            learn[name, f] = solver.StreamSoftmax(width, len(question.classes), steps=steps)
    for number in range(passes):
        rng = np.random.default_rng([settings.seed, 8, number])
        parts = (([x], at) for x, at in read())
        for (x,), at in solver.batches(parts, solver.BATCH, rng):
            for f in range(settings.folds):
                use = question.fold[at] != f
                rows = torch.from_numpy(np.flatnonzero(use))
                some = x if use.all() else x[rows]
                for name, y in tasks.items():
                    learn[name, f].update(some, torch.from_numpy(y[at[use]]))
    probes = {key: stream.finish() for key, stream in learn.items()}
    guesses = {name: np.zeros(len(question.y), np.int64) for name in tasks}
    for x, at in read():
        for f in range(settings.folds):
            use = question.fold[at] == f
            if use.any():
                some = x[torch.from_numpy(use)]
                for name in tasks:
                    guesses[name][at[use]] = probes[name, f].scores(some).argmax(1).numpy()
    control = question.sums(guesses["control"], question.control) if settings.control else None
    strengths = [probes["labels", f].strength for f in range(settings.folds)]
    times = "one pass" if passes == 1 else f"{passes} passes"
    return Answer(question.sums(guesses["labels"], question.y), control, strengths, f"stream, {times}")


def _stream_number(question: Question, model: str, layer: str) -> Answer:
    """Ridge from sums, per fold and for the groups that choose the strength; one pass, and one to foretell."""
    read = _reading(question, model, layer)
    settings = question.settings
    tasks = {"labels": question.y}
    if settings.control:
        tasks["control"] = question.control
    first = next(iter(read()))[0]
    shift = first.mean(0)
    # Parts: every fold, cut by whether it chooses the strength of the other folds (the same groups for all of them).
    inner = folds.deal([question.groups[g] for g in question.group], None, INNER, settings.seed + 1) == 0
    part = np.where(question.fold < 0, settings.folds, question.fold) * 2 + inner
    sums = {(name, p): solver.Moments(shift) for name in tasks for p in range(2 * (settings.folds + 1))}
    for x, at in read():
        for p in np.unique(part[at]).tolist():
            use = part[at] == p
            for name, y in tasks.items():
                sums[name, p].update(x[torch.from_numpy(use)], torch.from_numpy(y[at[use]]))
    probes: dict[tuple[str, int], solver.Ridge] = {}
    strengths = []
    for f in range(settings.folds):
        for name in tasks:
            mine = [p for p in range(2 * (settings.folds + 1)) if p // 2 != f]
            chooses = _total([sums[name, p] for p in mine if p % 2])
            rest = _total([sums[name, p] for p in mine if not p % 2])
            if not chooses.n or not rest.n:
                raise ProbeError(f"{question.prop.name}: fold {f} has no groups left to choose the strength with")
            probes[name, f] = solver.choose_ridge(rest.plus(chooses), chooses)
        strengths.append(probes["labels", f].strength)
    guesses = {name: np.zeros(len(question.y)) for name in tasks}
    for x, at in read():
        for f in range(settings.folds):
            use = question.fold[at] == f
            if use.any():
                some = x[torch.from_numpy(use)]
                for name in tasks:
                    guesses[name][at[use]] = probes[name, f].predict(some).numpy()
    control = question.sums(guesses["control"], question.control) if settings.control else None
    return Answer(question.sums(guesses["labels"], question.y), control, strengths, "stream, one pass")


def _total(parts: Sequence[solver.Moments]) -> solver.Moments:
    whole = parts[0]
    for other in parts[1:]:
        whole = whole.plus(other)
    return whole
