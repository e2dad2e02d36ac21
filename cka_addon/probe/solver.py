"""The linear probes: softmax regression and ridge, in memory to convergence or in a stream for any number of examples.

Softmax regression minimises mean cross-entropy + strength / 2 * |W|^2 over W in standardised features; scikit-learn's
`LogisticRegression(C)` is the same with strength = 1 / (C n). Both forms here work in coordinates in which the problem
is nearly round: the inverse of the features' covariance on one side of W, the inverse of the classes' curvature on the
other (a Kronecker-factored Newton matrix). L-BFGS then needs tens of steps, and one pass of averaged gradient steps
over a few hundred thousand frames is as good as convergence, because the average of such steps has to first order the
variance of the minimiser itself (Polyak and Juditsky, 1992).

Ridge regression needs the sums X'X and X'y only, which every fold gives once: exact in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cka_addon.probe.errors import ProbeError

VERSION = 2  # of what is computed here: answers of other versions are not taken over when a run goes on
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # penalties tried, per example, strong to weak
STREAM_STRENGTHS = (1e-3, 1e-4, 1e-5)
RIDGE_STRENGTHS = tuple(10.0**k for k in range(1, -7, -1))
WARM = 6144  # examples that a stream keeps to find scales, curvature and a start
BATCH = 1024  # examples per step of a stream
RATE = 0.02  # of the Newton step, per batch of 1,024: larger steps need more averaging
STEPS = 240  # a stream of fewer steps than this is read again
DAMPING = 0.3  # of the classes' curvature, relative to its mean: rare classes are known badly
CHUNK = 8192  # examples per product
TIGHT = 1e-6  # relative gain of a step at which a fit ends: accuracy stands still long before
MOST = 300  # steps of a fit
LOOSE = 2e-5  # the same, while strengths are only compared


@dataclass
class Softmax:
    """A fitted softmax probe on raw features: scores are x @ weight + bias.

    weight : (width, classes) float32;  bias : (classes,);  strength : penalty chosen;  tried : {strength: loss}
    """

    weight: Tensor
    bias: Tensor
    strength: float
    tried: dict[float, float] = field(default_factory=dict)

    def scores(self, x: Tensor) -> Tensor:
        """(examples, width) -> (examples, classes)."""
        return torch.addmm(self.bias, x.to(self.weight.dtype), self.weight)


@dataclass
class Ridge:
    """A fitted ridge probe on raw features: predictions are x @ weight + bias. weight : (width,) float64."""

    weight: Tensor
    bias: float
    strength: float
    tried: dict[float, float] = field(default_factory=dict)

    def predict(self, x: Tensor) -> Tensor:
        """(examples, width) -> (examples,) float64."""
        return x.double() @ self.weight + self.bias


@dataclass
class Scale:
    """Mean and spread of every feature over the training examples; features that do not vary get spread 1."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scale:
        """From examples, in float64 about the first of them."""
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        square = torch.zeros_like(total)
        for part in x.split(CHUNK):
            away = (part - x[0]).double()
            total += away.sum(0)
            square += away.square().sum(0)
        mean = total / len(x)
        variance = square / len(x) - mean.square()
        std = variance.clamp_min(0).sqrt()
        size = (mean + x[0].double()).abs() + std
        std = torch.where(std > 1e-6 * size.clamp_min(1e-12), std, torch.ones_like(std))
        return cls((mean + x[0].double()).to(x.dtype), std.to(x.dtype))

    def apply(self, x: Tensor) -> Tensor:
        """Standardised copy."""
        return (x - self.mean).div_(self.std)

    def unscale(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights for standardised features -> the same function of raw ones."""
        raw = weight / self.std[:, None]
        return raw, bias - self.mean @ raw


def covariance(z: Tensor) -> Tensor:
    """(width, width) second moments of standardised examples."""
    total = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float64)
    for part in z.split(CHUNK):
        total += part.T @ part
    return (total / len(z)).float()


def _inverse(matrix: Tensor, damping: float) -> Tensor:
    eye = torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.inv(matrix.double() + damping * eye).float()


def _class_curvature(p: Tensor) -> Tensor:
    """Mean of diag(p) - p p' over examples, damped. p : (examples, classes) probabilities."""
    g = (torch.diag(p.sum(0)) - p.T @ p) / len(p)
    return g + DAMPING * g.diagonal().mean() * torch.eye(len(g))


@dataclass
class _Precondition:
    """W = left V right': the coordinates V in which the softmax problem is nearly round.

    With the Cholesky factors L L' of the features' and M M' of the classes' matrix, left is L'^-1 and right is M'^-1.
    """

    left: Tensor
    right: Tensor
    left_back: Tensor
    right_back: Tensor

    @classmethod
    def of(cls, cov: Tensor, curvature: Tensor, damping: float) -> _Precondition:
        left_back, left = _factor(cov, damping)
        right_back, right = _factor(curvature, 0.0)
        return cls(left, right, left_back, right_back)

    def to_weight(self, v: Tensor) -> Tensor:
        return self.left @ v @ self.right.T

    def to_gradient(self, g: Tensor) -> Tensor:
        return self.left.T @ g @ self.right

    def from_weight(self, w: Tensor) -> Tensor:
        return self.left_back @ w @ self.right_back.T


def _factor(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(L', L'^-1) of matrix + damping: in float64, float32 loses definiteness where features repeat each other."""
    eye = torch.eye(len(matrix), dtype=torch.float64)
    back = torch.linalg.cholesky(matrix.double() + damping * eye).T
    return back.float().contiguous(), torch.linalg.solve_triangular(back, eye, upper=True).float().contiguous()


def _log_priors(y: Tensor, classes: int) -> Tensor:
    # Half an example more of every class: one that a training part lacks must not have probability 0.
    counts = torch.bincount(y, minlength=classes).float() + 0.5
    return (counts / counts.sum()).log()


def _minimise(
    z: Tensor,
    y: Tensor,
    classes: int,
    strength: float,
    weight: Tensor,
    bias: Tensor,
    pre: _Precondition,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """L-BFGS (scipy) from (weight, bias) on standardised examples."""
    from scipy.optimize import minimize

    n, d = z.shape
    rows = torch.arange(CHUNK)

    def split(v: np.ndarray) -> tuple[Tensor, Tensor]:
        t = torch.from_numpy(v.astype(np.float32))
        return pre.to_weight(t[: d * classes].view(d, classes)), t[d * classes :] @ pre.right.T

    def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = split(v)
        loss = 0.0
        gw, gb = torch.zeros(d, classes), torch.zeros(classes)
        for zb, yb in zip(z.split(CHUNK), y.split(CHUNK), strict=True):
            lp = torch.log_softmax(torch.addmm(b, zb, w), 1)
            at = rows[: len(yb)]
            loss -= float(lp[at, yb].sum(dtype=torch.float64))
            p = lp.exp_()
            p[at, yb] -= 1
            gw += zb.T @ p
            gb += p.sum(0)
        value = loss / n + 0.5 * strength * float(w.square().sum(dtype=torch.float64))
        g = torch.cat([pre.to_gradient(gw / n + strength * w).reshape(-1), gb / n @ pre.right])
        return value, g.double().numpy()

    begin = torch.cat([pre.from_weight(weight).reshape(-1), pre.right_back @ bias])
    options = {"maxiter": MOST, "ftol": tolerance, "gtol": 1e-6}
    found = minimize(objective, begin.double().numpy(), jac=True, method="L-BFGS-B", options=options)
    return split(found.x)


def log_loss(scores: Tensor, y: Tensor) -> float:
    """Mean cross-entropy in nats."""
    lp = torch.log_softmax(scores.double(), 1)
    return -float(lp[torch.arange(len(y)), y].mean())


def fit_softmax(
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    inner: np.ndarray | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> Softmax:
    """Softmax regression on examples in memory, to convergence.

    x : (examples, width) float32, raw;  y : (examples,) int64 below `classes`
    inner : (examples,) bool, the part of the training examples that chooses the strength (whole groups); the probe is
        then fitted again on all of them. None takes the only strength given.
    Raises ProbeError where there is nothing to choose with.

    >>> g = torch.Generator().manual_seed(0)
    >>> y = torch.randint(3, (600,), generator=g)
    >>> x = torch.randn(600, 5, generator=g) + 4 * torch.nn.functional.one_hot(y, 5)
    >>> probe = fit_softmax(x, y, 3, inner=np.arange(600) % 4 == 0)
    >>> bool((probe.scores(x).argmax(1) == y).float().mean() > 0.95)
    True
    """
    if inner is None and len(strengths) > 1:
        raise ProbeError(f"got {len(strengths)} strengths and no inner part; expected one strength or `inner`")
    tried: dict[float, float] = {}
    best = strengths[0]
    if inner is not None:
        mask = torch.from_numpy(inner)
        keep = ~mask
        for strength, probe in _path(x[keep], y[keep], classes, strengths, LOOSE):
            tried[strength] = log_loss(probe.scores(x[mask]), y[mask])
            if tried[strength] < min((v for k, v in tried.items() if k != strength), default=np.inf):
                best = strength
            elif tried[strength] > 1.02 * tried[best]:
                break  # weaker penalties only fit the training part more
    *_, (_, probe) = _path(x, y, classes, [s for s in strengths if s > best][-1:] + [best], TIGHT)
    probe.tried = tried
    return probe


def _path(
    x: Tensor, y: Tensor, classes: int, strengths: Sequence[float], tolerance: float
) -> Iterator[tuple[float, Softmax]]:
    """Probes for penalties from strong to weak, each begun where the one before ended."""
    if not len(x):
        raise ProbeError("got no training example; expected at least one: use fewer folds or more audio")
    scale = Scale.of(x)
    z = scale.apply(x)
    cov = covariance(z)
    log_prior = _log_priors(y, classes)
    weight, bias = torch.zeros(x.shape[1], classes), log_prior.clone()
    p = log_prior.exp()[None]
    curvature = _class_curvature(p)
    for strength in strengths:
        # A penalty adds to the curvature of every direction: at most 1 / 4 of a class's own is the features'.
        damping = max(4 * strength, 1e-4)
        pre = _Precondition.of(cov, curvature, damping)
        weight, bias = _minimise(z, y, classes, strength, weight, bias, pre, tolerance)
        sample = z[:: max(1, len(z) // 8192)]
        curvature = _class_curvature(torch.softmax(torch.addmm(bias, sample, weight), 1))
        raw, shift = scale.unscale(weight, bias)
        yield strength, Softmax(raw, shift, strength)


class StreamSoftmax:
    """Softmax regression over a stream of examples: memory does not depend on their number.

    The first `WARM` training examples are kept, solved to convergence and give scales, curvature and the start; then
    every batch of 1,024 is one step for all strengths at once. The probe is the average over the second half of the
    steps, for the strength whose average foretold the coming batches best.

    width : of the features;  classes : number of them;  steps : batches that will come, all passes together

    >>> g = torch.Generator().manual_seed(0)
    >>> y = torch.randint(3, (40000,), generator=g)
    >>> x = torch.randn(40000, 5, generator=g) + 2 * torch.nn.functional.one_hot(y, 5)
    >>> stream = StreamSoftmax(5, 3, steps=39)
    >>> for part in range(0, 40000, 1024):
    ...     stream.update(x[part : part + 1024], y[part : part + 1024])
    >>> bool((stream.finish().scores(x).argmax(1) == y).float().mean() > 0.85)
    True
    """

    def __init__(
        self, width: int, classes: int, *, steps: int, strengths: Sequence[float] = STREAM_STRENGTHS, warm: int = WARM
    ) -> None:
        self.width, self.classes, self.steps = width, classes, max(1, steps)
        self.strengths = tuple(strengths)
        self.warm, self.held = warm, 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._ready = False
        self.seen = self.taken = self.averaged = 0
        self.foretold = np.zeros(len(self.strengths))
        self.told = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Learn from examples: x (examples, width), y (examples,) int64."""
        if not len(y):
            return
        self.seen += 1
        if not self._ready:
            self._kept.append((x.clone(), y.clone()))
            self.held += len(y)
            if self.held >= self.warm:
                self._begin()
            return
        self._step(x, y)

    def _begin(self) -> None:
        x, y = (torch.cat(column) for column in zip(*self._kept, strict=True))
        self._kept = []
        self.scale = Scale.of(x)
        z = self.scale.apply(x)
        cov = covariance(z)
        # A start from so few examples wants a strong penalty; its curvature is what the steps are scaled by.
        ((_, probe),) = _path(x, y, self.classes, [0.01], LOOSE)
        weight = probe.weight * self.scale.std[:, None]
        bias = probe.bias + self.scale.mean @ probe.weight
        p = torch.softmax(torch.addmm(bias, z, weight), 1)
        curvature = _class_curvature(p)
        self.right = _inverse(curvature, 0.0)
        # Directions that the sample knows badly must not be stretched beyond what it knows of them, nor so far that the
        # penalty alone makes a step too large: penalty x left x right stays below 1.
        least = float(torch.linalg.eigvalsh(curvature.double())[0])
        self.left = [_inverse(cov, max(1e-3, s / least)) for s in self.strengths]
        many = len(self.strengths)
        self.weight = weight.repeat(1, many)
        self.bias = bias.repeat(many)
        self.mean_weight, self.mean_bias = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.penalty = torch.tensor(self.strengths).repeat_interleave(self.classes)
        self._ready = True
        for part in range(0, len(y), BATCH):
            self._step(x[part : part + BATCH], y[part : part + BATCH])

    def _probabilities(self, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scores = torch.addmm(bias, z, weight).view(len(z), len(self.strengths), self.classes)
        return torch.softmax(scores, 2)

    def _step(self, x: Tensor, y: Tensor) -> None:
        n, many = len(y), len(self.strengths)
        z = self.scale.apply(x)
        rows = torch.arange(n)
        half = self.taken >= self.steps // 2
        if half and self.averaged and self.taken % 4 == 0:
            p = self._probabilities(z, self.mean_weight, self.mean_bias)[rows, :, y]
            self.foretold -= p.clamp_min(1e-12).log().mean(0).double().numpy()
            self.told += 1
        p = self._probabilities(z, self.weight, self.bias)
        p[rows, :, y] -= 1
        residual = p.view(n, -1)
        gradient = z.T @ residual / n + self.penalty * self.weight
        rate = RATE * min(1.0, n / BATCH)
        for left, g, weight in zip(
            self.left, gradient.split(self.classes, 1), self.weight.split(self.classes, 1), strict=True
        ):
            weight.sub_(left @ g @ self.right, alpha=rate)
        self.bias -= rate * (residual.mean(0).view(many, self.classes) @ self.right).view(-1)
        self.taken += 1
        if half:
            self.averaged += 1
            self.mean_weight += (self.weight - self.mean_weight) / self.averaged
            self.mean_bias += (self.bias - self.mean_bias) / self.averaged

    def finish(self) -> Softmax:
        """The averaged probe. Raises ProbeError where the stream was too short to begin."""
        if not self._ready:
            if not self.held:
                raise ProbeError("got an empty stream; expected training examples")
            self._begin()
        if not self.averaged:
            self.mean_weight, self.mean_bias = self.weight, self.bias
        if not bool(torch.isfinite(self.mean_weight).all()):
            raise ProbeError("the streamed probe diverged; expected finite weights: sample fewer examples (in memory)")
        tried = {}
        chosen = len(self.strengths) // 2
        if self.told:
            tried = {s: float(v / self.told) for s, v in zip(self.strengths, self.foretold, strict=True)}
            chosen = int(self.foretold.argmin())
        part = slice(chosen * self.classes, (chosen + 1) * self.classes)
        raw, bias = self.scale.unscale(self.mean_weight[:, part], self.mean_bias[part])
        return Softmax(raw, bias, self.strengths[chosen], tried)


def passes_for(examples: int) -> int:
    """How often a stream reads its examples so that it takes enough steps.

    >>> passes_for(500_000), passes_for(100_000)
    (1, 3)
    """
    return max(1, -(-STEPS * BATCH // max(1, examples)))


@dataclass
class Moments:
    """Sums for ridge regression about a shift: they add up, so folds are subtracted and shards merged exactly.

    shift : (width,) subtracted from x;  n : examples;  xx : (width, width) float64;  x, xy : (width,);  y, yy : numbers
    """

    shift: Tensor
    n: int = 0
    y: float = 0.0
    yy: float = 0.0
    xx: Tensor = field(default_factory=lambda: torch.zeros(0))
    x: Tensor = field(default_factory=lambda: torch.zeros(0))
    xy: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        if not self.xx.numel():
            d = len(self.shift)
            self.xx = torch.zeros(d, d, dtype=torch.float64)
            self.x = torch.zeros(d, dtype=torch.float64)
            self.xy = torch.zeros(d, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add examples: x (examples, width), y (examples,) float64."""
        for xb, yb in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            away = xb - self.shift
            self.xx += away.T @ away
            away64 = away.double()
            self.x += away64.sum(0)
            self.xy += yb @ away64
        self.n += len(y)
        self.y += float(y.sum())
        self.yy += float(y @ y)

    def plus(self, other: Moments, sign: int = 1) -> Moments:
        """Sums of both (sign 1) or of this one without the other (sign -1)."""
        return Moments(
            self.shift,
            self.n + sign * other.n,
            self.y + sign * other.y,
            self.yy + sign * other.yy,
            self.xx + sign * other.xx,
            self.x + sign * other.x,
            self.xy + sign * other.xy,
        )

    def squared_error(self, probe: Ridge) -> float:
        """Sum of squared errors of a probe on these examples, from the sums alone."""
        w, b = probe.weight, probe.bias + float(self.shift.double() @ probe.weight)
        fit = float(w @ self.xx @ w) + 2 * b * float(self.x @ w) + self.n * b * b
        return self.yy - 2 * (float(self.xy @ w) + b * self.y) + fit


def solve_ridge(moments: Moments, strength: float) -> Ridge:
    """Ridge on standardised features from sums: |y - Zw|^2 / n + strength |w|^2.

    scikit-learn's `Ridge(alpha)` on standardised features is the same with strength = alpha / n.
    """
    n = moments.n
    if n < 2:
        raise ProbeError(f"got {n} training examples; expected at least 2: use fewer folds or more audio")
    mean, level = moments.x / n, moments.y / n
    cov = moments.xx / n - torch.outer(mean, mean)
    size = moments.xx.diagonal() / n
    std = cov.diagonal().clamp_min(0).sqrt()
    std = torch.where(std > 1e-6 * size.sqrt().clamp_min(1e-12), std, torch.full_like(std, torch.inf))
    cross = (moments.xy / n - mean * level) / std
    scaled = cov / torch.outer(std, std)
    scaled.diagonal().add_(strength)
    w = torch.linalg.solve(scaled, cross) / std
    return Ridge(w, level - float(mean @ w) - float(moments.shift.double() @ w), strength)


def choose_ridge(train: Moments, inner: Moments, strengths: Sequence[float] = RIDGE_STRENGTHS) -> Ridge:
    """Ridge on `train` with the strength that is best on `inner`, a part of it, when fitted without that part.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(400, 6, generator=g); y = (x[:, 0] * 3 + 1).double()
    >>> whole, part = Moments(torch.zeros(6)), Moments(torch.zeros(6))
    >>> whole.update(x, y); part.update(x[:100], y[:100])
    >>> bool((choose_ridge(whole, part).predict(x) - y).abs().max() < 0.01)
    True
    """
    outer = train.plus(inner, -1)
    tried = {s: inner.squared_error(solve_ridge(outer, s)) / max(1, inner.n) for s in strengths}
    probe = solve_ridge(train, min(tried, key=lambda s: tried[s]))
    probe.tried = tried
    return probe


def fit_ridge(x: Tensor, y: Tensor, *, inner: np.ndarray, strengths: Sequence[float] = RIDGE_STRENGTHS) -> Ridge:
    """Ridge on examples in memory; `inner` marks the part that chooses the strength."""
    mask = torch.from_numpy(inner)
    rest, part = Moments(x.float().mean(0)), Moments(x.float().mean(0))
    rest.update(x[~mask], y[~mask])
    part.update(x[mask], y[mask])
    return choose_ridge(rest.plus(part), part, strengths)


@dataclass
class Network:
    """A small network probe: one hidden layer. classes : 0 for numbers."""

    body: torch.nn.Module
    scale: Scale
    classes: int
    level: float = 0.0
    spread: float = 1.0
    tried: dict[float, float] = field(default_factory=dict)
    strength: float = 0.0

    def scores(self, x: Tensor) -> Tensor:
        """(examples, width) -> (examples, classes) or (examples, 1)."""
        with torch.inference_mode():
            return torch.cat([self.body(self.scale.apply(part)) for part in x.split(CHUNK)])

    def predict(self, x: Tensor) -> Tensor:
        """(examples, width) -> (examples,) float64, for numbers."""
        return self.scores(x)[:, 0].double() * self.spread + self.level


def fit_network(
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    inner: np.ndarray,
    seed: int,
    hidden: int = 128,
    most: int = 60,
    patience: int = 4,
    batch: int = 256,
) -> Network:
    """One hidden layer of ReLUs with Adam; the number of epochs is chosen on `inner`, a part of the training examples.

    y : int64 classes, or float64 numbers with classes=0. The same seed gives the same probe.
    """
    mask = torch.from_numpy(inner)
    scale = Scale.of(x[~mask])
    level, spread = (0.0, 1.0) if classes else (float(y[~mask].mean()), float(y[~mask].std().clamp_min(1e-12)))
    target = y if classes else ((y - level) / spread).float()
    generator = torch.Generator().manual_seed(seed)
    out = classes or 1
    body = torch.nn.Sequential(torch.nn.Linear(x.shape[1], hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, out))
    with torch.no_grad():
        for p in body.parameters():
            bound = (x.shape[1] if p.shape[-1] == x.shape[1] or p.shape == (hidden,) else hidden) ** -0.5
            p.uniform_(-bound, bound, generator=generator)
    optimiser = torch.optim.AdamW(body.parameters(), lr=1e-3, weight_decay=0.01)
    z, zt, yt, yv = scale.apply(x[~mask]), scale.apply(x[mask]), target[~mask], target[mask]

    def loss_of(scores: Tensor, goal: Tensor) -> Tensor:
        if classes:
            return torch.nn.functional.cross_entropy(scores, goal)
        return torch.nn.functional.mse_loss(scores[:, 0], goal)

    best, kept, since = np.inf, None, 0
    tried: dict[float, float] = {}
    for epoch in range(1, most + 1):
        for rows in torch.randperm(len(z), generator=generator).split(batch):
            optimiser.zero_grad()
            loss_of(body(z[rows]), yt[rows]).backward()
            optimiser.step()
        with torch.inference_mode():
            now = float(loss_of(body(zt), yv))
        tried[float(epoch)] = now
        if now < best:
            best, since, kept = now, 0, {k: v.clone() for k, v in body.state_dict().items()}
        else:
            since += 1
            if since >= patience:
                break
    if kept is None:
        raise ProbeError("the network probe diverged in its first epoch; expected finite features of moderate size")
    body.load_state_dict(kept)
    return Network(body, scale, classes, level, spread, tried, float(min(tried, key=lambda e: tried[e])))


def batches(
    parts: Iterable[tuple[list[Tensor], np.ndarray]], size: int, rng: np.random.Generator, mix: int = 8
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Cut a stream of (layers, rows) into shuffled batches; `mix` parts are shuffled together at a time."""
    pool: list[tuple[list[Tensor], np.ndarray]] = []

    def drain(last: bool) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        nonlocal pool
        rows = np.concatenate([r for _, r in pool])
        layers = [torch.cat(column) for column in zip(*(x for x, _ in pool), strict=True)]
        order = rng.permutation(len(rows))
        full = len(rows) // size if not last else -(-len(rows) // size)
        for i in range(full):
            some = order[i * size : (i + 1) * size]
            at = torch.from_numpy(some)
            yield [x[at] for x in layers], rows[some]
        rest = order[full * size :]
        pool = [([x[torch.from_numpy(rest)] for x in layers], rows[rest])] if len(rest) else []

    for part in parts:
        pool.append(part)
        if len(pool) > mix and sum(len(r) for _, r in pool) >= size:
            yield from drain(False)
    if pool:
        yield from drain(True)
