"""The options of the commands that run models: what is read, how features are stored, how CKA is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cka_addon.config import check, did_you_mean, option
from cka_addon.errors import SpecError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Inputs:
    """Where features come from: models and recordings, or stores; and which part of the work is done here."""

    model: tuple[str, ...] = option(
        (), "a model, see below; repeat for more, all are run in one pass over the audio", metavar="MODEL", short="-m"
    )
    audio: str | None = option(
        None,
        "folder of recordings, or a text file with one path (or id<TAB>path) per line",
        metavar="PATH",
        short="-a",
    )
    store: tuple[str, ...] = option(
        (), "a feature store instead of -m and -a; repeat to compare models of several stores", metavar="STORE"
    )
    limit: int | None = option(None, "use only the first N recordings (sorted by id)", metavar="N")
    skip_unreadable: bool = option(False, "leave out recordings that cannot be read or give NaN, and count them")
    device: str | None = option(None, "cpu, cuda or cuda:N (default: cuda where there is one)")
    shard: str | None = option(None, "do the I-th of N parts (array jobs); join them with merge", metavar="I/N")


@dataclass(frozen=True)
class DumpOptions:
    """What a feature store keeps; all of it is written into the store."""

    dtype: Literal["float32", "float16"] = option(
        "float32", "float16 halves the size and keeps 3 digits; values beyond 65504 are refused"
    )
    keep: Literal["frames", "sampled", "means"] = option(
        "frames", "all frames, --frames random ones per utterance, or the mean of each utterance"
    )
    frames: int = option(50, "frames per utterance with --keep sampled", metavar="N", least=1)
    seed: int = option(0, "seed of every random choice")
    shard_mib: int = option(256, "size of one file; at most this much work is lost by a kill", metavar="MIB", least=0)

    def __post_init__(self) -> None:
        check(self)


MEASURES = ("cka", "procrustes", "cca", "svcca", "pwcca", "rsa", "knn")


def parse_measures(text: str) -> tuple[str, ...]:
    """ "cka,procrustes" -> ("cka", "procrustes"); "all" is all, cka is always there. Raises SpecError for others.

    >>> parse_measures("cca")
    ('cka', 'cca')
    """
    if text == "all":
        return MEASURES
    found = tuple(dict.fromkeys(m.strip() for m in text.split(",") if m.strip()))
    for name in found:
        if name not in MEASURES:
            raise SpecError(f"got measure '{name}'{did_you_mean(name, MEASURES)}")
    return found if "cka" in found else ("cka", *found)


@dataclass(frozen=True)
class Options:
    """How CKA is computed; all of it is stored with the result.

    >>> Options(mode="exact")
    Traceback (most recent call last):
    ...
    cka_addon.errors.SpecError: got mode='exact'; expected one of minibatch, full
    """

    mode: Literal["minibatch", "full"] = option(
        "minibatch",
        "minibatch: HSIC averaged over minibatches, then divided (the study's estimator, arXiv 2010.15327); "
        "full: the exact value over all examples, in one pass",
    )
    measures: str = option(
        "cka",
        "what a second opinion says, with commas: cka, procrustes, cca, svcca, pwcca, rsa, knn, or all; from the same "
        "pass (--mode full); rsa with its centring is close to CKA, do not count them as two witnesses",
        metavar="A,B",
    )
    ridge: float = option(0.0, "cca, svcca, pwcca: share of a layer's mean variance added before whitening", least=0)
    variance: float = option(0.99, "svcca: share of each layer's variance that its components hold", least=0.01)
    neighbours: int = option(10, "knn: how many nearest examples are compared", metavar="N", least=1)
    examples: Literal["frames", "sampled", "means"] = option(
        "frames", "what an example is: every frame, --frames random ones per utterance, or utterance means"
    )
    frames: int = option(50, "frames per utterance with --examples sampled", metavar="N", least=1)
    batch_size: int = option(
        512,
        "examples per minibatch; the unbiased estimate hardly depends on it, small ones are noisier",
        metavar="N",
    )
    mix: int = option(
        16,
        "utterances shuffled together before they are cut into minibatches; 1 keeps the order of time, and a minibatch "
        "then compares little more than the frames of one utterance",
        metavar="N",
        least=1,
    )
    biased: bool = option(False, "the biased estimator HSIC_0 instead of HSIC_1")
    form: Literal["auto", "gram", "stream"] = option(
        "auto", "arithmetic: Gram matrices (few examples), streaming (many), or the cheaper one"
    )
    pairs: Literal["all", "within", "across"] = option(
        "all", "which layers to compare: all, only of one model, only of different ones"
    )
    align: Literal["nearest", "pool"] = option(
        "nearest", "models of different frame rate: take the nearest frame, or the mean around it"
    )
    blocks: int = option(
        20,
        "groups of utterances that are computed together: the unit of work sharing and, with --mode minibatch, of the "
        "intervals (fewer, where a group would hold less than --mix utterances)",
        metavar="N",
        least=1,
    )
    interval: Literal["jackknife", "bootstrap", "none"] = option(
        "jackknife",
        "how intervals are made: leaving out one unit at a time (Student's t), or drawing units with replacement "
        "(bootstrap-t)",
    )
    unit: Literal["utterance", "speaker"] = option(
        "utterance",
        "what the corpus is a sample of: with speaker, intervals say how far other speakers would give the same",
    )
    labels: str | None = option(
        None,
        "who speaks, with --unit speaker: table:column (labels.tsv:speaker) or utt2spk; default: the list or the paths",
        metavar="FILE[:COLUMN]",
    )
    confidence: float = option(0.95, "of the intervals")
    resamples: int = option(1000, "of the bootstrap", least=10)
    permutations: int = option(
        0,
        "also compute the value for examples permuted N times: what no relation looks like",
        metavar="N",
        least=0,
    )
    seed: int = option(0, "seed of every random choice")
    precision: Literal["float32", "float64"] = option("float32", "of the products; sums are always float64")

    def __post_init__(self) -> None:
        check(self)
        smallest = 2 if self.biased else 4
        if self.batch_size < smallest:
            raise SpecError(f"got batch_size={self.batch_size}; expected at least {smallest}")
        if len(parse_measures(self.measures)) > 1 and self.mode != "full":
            raise SpecError(f"got measures={self.measures} with mode={self.mode}; measures beyond cka need mode='full'")
        if not 0 < self.confidence < 1:
            raise SpecError(f"got confidence={self.confidence}; expected a value between 0 and 1, e.g. 0.95")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the features that go into the products."""
        import torch

        return torch.float64 if self.precision == "float64" else torch.float32
