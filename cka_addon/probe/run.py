"""`probe`: from models (or stores) and labels to answers, resumable and in shards.

OUT/plan.json              what was asked: a folder is continued by the same question only
OUT/examples/              the layers at the labelled places (removed at the end, but not by shards)
OUT/answers/               one file per property, probe and layer that is solved
OUT/probe.json .csv ...    the result
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from cka_addon import audio, provenance
from cka_addon.errors import AudioError, SpecError
from cka_addon.models import Model, ModelInfo, check_names, load_model, load_models
from cka_addon.probe import controls, made, solve, solver, statistics, vectors
from cka_addon.probe.errors import LabelError, ProbeError
from cka_addon.probe.examples import Gathered, Property, Reader, check_units, gather
from cka_addon.probe.labels import (
    Labels,
    LabelSpec,
    match_names,
    parse_label,
    path_labels,
    read_labels,
    read_table,
    speakers_of,
)
from cka_addon.probe.result import METRICS, ProbeResult
from cka_addon.store import FeatureStore, parse_shard

logger = logging.getLogger(__name__)

FORMAT = 1


def probe(
    models: Sequence | str | Model | None = None,
    recordings: str | Path | Sequence | None = None,
    *,
    stores: Sequence[str | Path | FeatureStore] | str | Path | None = None,
    labels: Sequence[str | LabelSpec | Labels] | str | Labels = (),
    out: str | Path | None = None,
    baseline: bool | Sequence = False,
    fbank: bool = True,
    group: str | Mapping[str, str] | None = None,
    where: Sequence[str] | str = (),
    within: str | Mapping[str, str] | None = None,
    control_types: str | Labels | None = None,
    against: Sequence[str] = (),
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    per_utterance: int | None = None,
    material: made.Material | None = None,
    settings: solve.Settings | None = None,
    shard: str | tuple[int, int] | None = None,
    keep_examples: bool = False,
    limit: int | None = None,
    skip_unreadable: bool = False,
    device: str = "cpu",
    progress: bool = True,
    announce: Callable[[str], None] = logger.info,
    **options: object,
) -> ProbeResult | None:
    """Ask every layer of one or more models for properties of speech; None while other shards are missing.

    models and recordings, or stores (with recordings for the FBANK control and computed labels)
    labels : specifications `[NAME=]SOURCE[:COLUMN][@UNIT]` (see `cka_addon.probe.labels`) or `Labels`
    out : folder to resume from and write to; a temporary one where it is None
    baseline : True for the untrained twin of every model, or specifications of untrained models
    group : labels (specification or recording -> group) whose groups are never split over training and test; by itself
        the speaker, from labels of that name or from the path
    where : "COLUMN=VALUE" or "FILE:COLUMN=VALUE", keep those utterances only;  within : labels whose means are removed
    control_types : labels that say what an example is an instance of, for the control task
    against : "PROPERTY=GLOVE.txt", "PROPERTY=FILE.npz" or "PROPERTY=one-hot"
    ignore : values that are no label;  per_utterance : at most so many examples of each utterance
    settings, options : see `Settings`, e.g. folds=10, probes=("linear", "mlp")
    Raises LabelError, FoldError, ProbeError, SpecError, AudioError, NonFinite.

    >>> import torch, soundfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> rows = ["utterance,pitch"]
    >>> for i in range(40):
    ...     high = i % 2
    ...     (folder / f"s{i % 10}").mkdir(exist_ok=True)
    ...     tone = np.sin(np.arange(8000) * (0.1 + 0.1 * high)) + np.random.default_rng(i).standard_normal(8000)
    ...     soundfile.write(folder / f"s{i % 10}" / f"{i}.wav", tone / 9, 16000)
    ...     rows.append(f"{i},{'high' if high else 'low'}")
    >>> _ = (folder / "labels.csv").write_text("\\n".join(rows))
    >>> def model(wavs):
    ...     frames = wavs[0][: len(wavs[0]) // 320 * 320].reshape(1, -1, 320)
    ...     return {"hidden_states": [torch.randn(1, frames.shape[1], 4), torch.fft.rfft(frames).abs()[..., :20]]}
    >>> made = probe([Model(model, "toy")], folder, labels=f"{folder}/labels.csv:pitch", fbank=False, progress=False)
    >>> [r["value"] > 0.9 for r in made.find("pitch")["rows"]]
    [False, True]
    """
    base = settings or solve.Settings()
    settings = replace(base, **options)  # type: ignore[arg-type]
    material = material or made.Material()
    reader, roles = _reader(
        models, recordings, stores, baseline, fbank, material, settings, limit, skip_unreadable, device
    )
    wanted = [labels] if isinstance(labels, (str, LabelSpec, Labels)) else list(labels)
    if not wanted:
        raise LabelError("got no labels; expected at least one: --labels FILE:COLUMN, phones.ctm, made:channel, ...")
    known = _tables(wanted)
    reader.ids = _where(reader.ids, [where] if isinstance(where, str) else list(where), known, announce)
    properties = [_property(w, reader, dict(kinds or {}), ignore, announce) for w in wanted]
    names = [p.name for p in properties]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise LabelError(f"two labels are called '{twice}'; expected different names: write NAME=FILE:COLUMN")
    if control_types is not None:
        _add_types(properties, control_types, reader.ids, announce)
    check_units(properties, reader.infos, reader.stores)
    _check_audio(properties, reader)
    group_of, by = _groups(group, properties, reader.ids, known, reader.recordings, announce)
    within_of = None if within is None else _mapping(within, reader.ids, known, "within")
    pairs = [vectors.parse(a, names) for a in against]
    for p in properties:
        announce(
            f"{p.name}: {len(p.names)} of {len(reader.ids)} utterances, per {p.unit}, {p.kind}"
            + (f" ({p.about['matched']})" if "matched" in p.about else "")
        )
    plan = {
        "format": FORMAT,
        "models": [{k: v for k, v in i.to_dict().items() if k != "provenance"} for i in reader.infos],
        "weights": [i.provenance.get("weights_sha256") for i in reader.infos],
        "properties": [_digest_of(p) for p in properties],
        "utterances": hashlib.sha256("\n".join(reader.ids).encode()).hexdigest(),
        "per_utterance": per_utterance,
        "seed": settings.seed,
        "material": asdict(material),
    }
    plan = json.loads(json.dumps(plan))
    temporary = tempfile.mkdtemp(prefix="cka_probe_") if out is None else None
    folder = Path(temporary or str(out))
    try:
        _begin(folder, plan)
        gathered = gather(
            properties,
            reader,
            folder,
            per_utterance=per_utterance,
            seed=settings.seed,
            shard=parse_shard(shard),
            skip=skip_unreadable,
            progress=progress,
            announce=announce,
        )
        if gathered is None:
            announce(f"{folder}: this shard is done, others are still missing")
            return None
        lock = FileLock(folder / ".solve.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            announce(f"{folder}: this shard is done, another process solves")
            return None
        about = {
            "group": by,
            "where": list([where] if isinstance(where, str) else where),
            "within": within if isinstance(within, (str, type(None))) else "given",
            "against": list(against),
            "ignore": list(ignore),
            "recordings": str(recordings) if isinstance(recordings, (str, Path)) else None,
            "stores": [str(s.path) for s in reader.stores],
        }
        try:
            result = _solve(
                gathered, settings, group_of, by, within_of, reader.infos, roles, pairs, folder, plan, about, progress
            )
        finally:
            lock.release()
        # Another shard that ends now would make the examples again.
        if not keep_examples and shard is None:
            shutil.rmtree(folder / "examples", ignore_errors=True)
        return result
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


# -- what is asked ---------------------------------------------------------------------------------------------------
def _reader(
    models, recordings, stores, baseline, fbank, material, settings, limit, skip, device
) -> tuple[Reader, dict[str, str]]:
    if (models is None) == (stores is None):
        raise SpecError(
            "got " + ("neither" if models is None else "both") + " models and stores; expected one of the two"
        )
    found: list[audio.Recording] = []
    if recordings is not None:
        found = audio.find_recordings(recordings, limit=limit)
        bad = [r for r in found if r.problem]
        if bad and not skip:
            raise AudioError(
                f"{len(bad)} of {len(found)} recordings cannot be read, first {bad[0].path}: {bad[0].problem}; repair "
                "them or pass --skip-unreadable (they are then left out and counted)"
            )
        found = [r for r in found if not r.problem]
    opened: list[FeatureStore] = []
    loaded: list[Model] = []
    if stores is not None:
        listed = [stores] if isinstance(stores, (str, Path, FeatureStore)) else list(stores)
        opened = [s if isinstance(s, FeatureStore) else FeatureStore(s) for s in listed]
    else:
        if recordings is None:
            raise SpecError("got models and no recordings; expected recordings: --audio")
        single = isinstance(models, (str, Model)) or callable(models)
        loaded = load_models([models] if single else list(models), device=device)
    roles = {i.name: "model" for s in opened for i in s.infos} | {m.name: "model" for m in loaded}
    extra: list[Model] = []
    if baseline is True:
        if not loaded:
            raise SpecError("a store holds no model to make an untrained twin of; give it: --baseline MODEL")
        for model in loaded:
            twin = controls.untrained(model, settings.seed)
            if twin is not None:
                extra.append(twin)
    elif baseline:
        extra = [load_model(b, device=device) for b in ([baseline] if isinstance(baseline, str) else baseline)]
    roles |= {m.name: "untrained" for m in extra}
    if fbank and recordings is not None:
        extra.append(controls.filterbank())
        roles[controls.FBANK] = "control"
    elif fbank:
        logger.warning("no FBANK control: the store has no recordings, give them with --audio")
    if extra and recordings is None:
        raise SpecError("an untrained model needs recordings; give them: --audio")
    reader = Reader([*loaded, *extra], opened, found, material, settings.seed)
    check_names([i.name for i in reader.infos])
    reader.ids = reader.ids[:limit]
    return reader, roles


def _tables(wanted: Sequence) -> list[Path]:
    """csv and tsv files among the labels: where --where, --group and --within look for columns."""
    paths = []
    for item in wanted:
        spec = parse_label(item) if isinstance(item, str) else item
        if isinstance(spec, LabelSpec) and Path(spec.source).suffix.lower() in (".csv", ".tsv"):
            paths.append(Path(spec.source))
    return list(dict.fromkeys(paths))


def _mapping(what: str | Mapping[str, str], ids: Sequence[str], known: Sequence[Path], purpose: str) -> dict[str, str]:
    """Recording -> value, for grouping: a mapping, `path:speaker`, FILE:COLUMN, or a column of the label tables."""
    if isinstance(what, Mapping):
        found = {u: str(what[u]) for u in ids if u in what}
    elif what == "utterance":
        found = {u: u for u in ids}
    else:
        text = what
        if ":" not in text and not Path(text).exists():
            holders = [p for p in known if text in read_table(p)[0]]
            if not holders and text == "speaker":
                return speakers_of(ids)
            if not holders:
                offer = sorted({c for p in known for c in read_table(p)[0]})
                raise LabelError(
                    f"got --{purpose} {text}; expected FILE:COLUMN or one of the columns {', '.join(offer)}"
                )
            text = f"{holders[0]}:{text}"
        spec = parse_label(text)
        labels = path_labels(spec, ids) if spec.source == "path" else read_labels(spec, kind="class")
        if labels.segments:
            raise LabelError(f"got --{purpose} {text}, which has times; expected one value per utterance")
        names, _ = match_names(labels.ids, ids, f"--{purpose}")
        found = {u: labels.utterances[n] for n, u in names.items()}
    if missing := [u for u in ids if u not in found]:
        raise LabelError(
            f"--{purpose}: {len(missing)} of {len(ids)} recordings have no value, first '{missing[0]}'; expected one "
            "for each: complete the labels or restrict the recordings (--where, a list file)"
        )
    return found


def _where(ids: list[str], conditions: Sequence[str], known: Sequence[Path], announce) -> list[str]:
    for text in conditions:
        column, equals, value = text.rpartition("=")
        if not equals or not column:
            raise LabelError(f"got --where '{text}'; expected COLUMN=VALUE or FILE:COLUMN=VALUE, e.g. gender=f")
        if ":" not in column:
            holders = [p for p in known if column in read_table(p)[0]]
            if not holders:
                raise LabelError(
                    f"got --where '{text}'; expected FILE:{column}={value}, or labels of a table with that column"
                )
            column = f"{holders[0]}:{column}"
        labels = read_labels(column, kind="class")
        names, _ = match_names(labels.ids, ids, "--where")
        chosen = {u for n, u in names.items() if labels.utterances.get(n) == value}
        if not chosen:
            seen = ", ".join(sorted(labels.values())[:8])
            raise LabelError(f"--where {text}: no recording has that value; expected one of {seen}")
        announce(f"where {text}: {len(chosen)} of {len(ids)} recordings")
        ids = [u for u in ids if u in chosen]
    return ids


def _property(item, reader: Reader, kinds: dict[str, str], ignore: Sequence[str], announce) -> Property:
    spec = parse_label(item) if isinstance(item, str) else item
    if isinstance(spec, Labels):
        labels = spec
    elif spec.source == "path":
        labels = path_labels(spec, reader.ids)
    elif spec.source == "made":
        kind = made.check_kind(spec.column, made.CONDITIONS, "made")
        if spec.unit == "segment":
            raise LabelError(f"got made:{kind}@segment; expected @utterance or @frame")
        labels = Labels(spec.name, f"made:{kind}", spec.unit or "utterance")
        return Property(spec.name, labels.unit, "class", labels, {u: u for u in reader.ids}, change=kind)
    elif spec.source == "computed":
        kind = made.check_kind(spec.column, made.COMPUTED, "computed")
        unit = spec.unit or made.COMPUTED[kind]
        if (
            unit == "segment"
            or (made.COMPUTED[kind] == "utterance" and unit != "utterance")
            or (kind, unit)
            == (
                "position",
                "utterance",
            )
        ):
            raise LabelError(f"got computed:{kind}@{unit}; expected @{made.COMPUTED[kind]}")
        labels = Labels(spec.name, f"computed:{kind}", unit, "number")
        return Property(spec.name, unit, "number", labels, {u: u for u in reader.ids}, number=kind)
    else:
        labels = read_labels(spec, kind=kinds.get(spec.name))
    found = labels.ids
    labels = labels.without(ignore) if ignore else labels
    names, rule = match_names(found, reader.ids, labels.name)
    matched = {
        u: n for n, u in names.items() if (labels.segments.get(n) if labels.segments else n in labels.utterances)
    }
    if not matched:
        raise LabelError(f"{labels.name}: no label is left without {', '.join(ignore)}; expected other values too")
    about = {"matched": f"matched by {rule}"}
    missing = len(reader.ids) - len(matched)
    if missing:
        announce(f"{labels.name}: {missing} of {len(reader.ids)} recordings have no label, left out")
    return Property(labels.name, labels.unit, labels.kind, labels, matched, about=about)


def _add_types(properties: list[Property], what: str | Labels, ids: Sequence[str], announce) -> None:
    labels = what if isinstance(what, Labels) else read_labels(what, kind="class")
    names, _ = match_names(labels.ids, ids, "--control-types")
    for prop in properties:
        prop.types, prop.type_names = labels, {u: n for n, u in names.items()}
    announce(f"control task: types are the values of {labels.name}")


def _check_audio(properties: Sequence[Property], reader: Reader) -> None:
    for prop in properties:
        if prop.number not in (None, "position") and not reader.recordings:
            raise LabelError(f"{prop.name}: computed from recordings, a store has none; give them: --audio")


def _groups(
    group: str | Mapping[str, str] | None,
    properties: Sequence[Property],
    ids: Sequence[str],
    known: Sequence[Path],
    recordings: Mapping[str, audio.Recording],
    announce: Callable[[str], None],
) -> tuple[dict[str, str], str]:
    """Recording -> group, and what groups are: as asked, else the speaker (labels, list, path), else the utterance."""
    if group is not None:
        name = group if isinstance(group, str) else "group"
        return _mapping(group, ids, known, "group"), name.rpartition(":")[2]
    for prop in properties:
        if prop.name == "speaker" and prop.labels.utterances and set(prop.names) >= set(ids):
            return {u: prop.labels.utterances[prop.names[u]] for u in ids}, "speaker"
    if any("speaker" in read_table(p)[0] for p in known):
        try:
            return _mapping("speaker", ids, known, "group"), "speaker"
        except LabelError as error:
            announce(f"the column speaker cannot group: {error}")
    listed = {u: r.speaker for u, r in recordings.items() if r.speaker}
    if set(listed) >= set(ids):
        return {u: listed[u] for u in ids}, "speaker"
    try:
        found = speakers_of(ids)
    except LabelError as error:
        announce(f"grouped by utterance: {error}; or state the groups: --group FILE:COLUMN")
        return {u: u for u in ids}, "utterance"
    if len(set(found.values())) < 2:
        announce("grouped by utterance: all recordings lie in one folder, so it is no speaker; --group FILE:COLUMN")
        return {u: u for u in ids}, "utterance"
    announce(f"grouped by the speaker in the path: {len(set(found.values()))}, e.g. {next(iter(found.values()))}")
    return found, "speaker"


def _digest_of(prop: Property) -> dict:
    """What makes the examples of a property: its labels, unit and types."""
    labels = prop.labels
    rows = {
        u: [[s.start, s.end, s.value] for s in labels.segments[n]] if labels.segments else labels.utterances.get(n)
        for u, n in sorted(prop.names.items())
    }
    types: object = None
    if isinstance(prop.types, Labels):
        types = [prop.types.utterances, {k: [[s.start, s.value] for s in v] for k, v in prop.types.segments.items()}]
    digest = hashlib.sha256(json.dumps([rows, types], sort_keys=True, default=str).encode()).hexdigest()
    return {"name": prop.name, "unit": prop.unit, "kind": prop.kind, "source": labels.source, "labels_sha256": digest}


def _begin(folder: Path, plan: dict) -> None:
    path = folder / "plan.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        provenance.write_json(path, plan)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    for key, value in plan.items():
        if there.get(key) != value:
            raise ProbeError(
                f"{folder}: was begun with another {key} ({_short(there.get(key))}, now {_short(value)}); give the "
                "same models, recordings, labels and seed to go on, or another folder"
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."


# -- answers ---------------------------------------------------------------------------------------------------------
def _solve(
    gathered: dict[str, Gathered],
    settings: solve.Settings,
    group_of: Mapping[str, str],
    by: str,
    within_of: Mapping[str, str] | None,
    infos: Sequence[ModelInfo],
    roles: Mapping[str, str],
    pairs: Sequence[tuple[str, vectors.Source]],
    folder: Path,
    plan: dict,
    about: dict,
    progress: bool,
) -> ProbeResult:
    questions = {name: solve.ask(g, settings, group_of, by, within_of) for name, g in gathered.items()}
    mark = json.dumps(
        [
            asdict(replace(settings, confidence=0.95, resamples=1000)),
            sorted(group_of.items()),
            within_of and sorted(within_of.items()),
        ]
    )
    key = hashlib.sha256((f"{solver.VERSION}" + mark + json.dumps(plan, sort_keys=True)).encode()).hexdigest()[:16]
    work = [
        (name, kind, column)
        for name, q in questions.items()
        for kind in settings.probes
        for column in q.gathered.columns
    ]
    answers: dict[tuple[str, str, str, str], solve.Answer] = {}
    with tqdm(total=len(work), desc="probes", unit="layer", disable=not progress) as bar:
        for name, kind, (model, layer, width) in work:
            file = (
                folder / "answers" / f"{key}-{questions[name].prop.folder()}-{kind}-{_plain(model)}-{_plain(layer)}.npz"
            )
            answers[name, kind, model, layer] = _answer(file, questions[name], model, layer, width, kind)
            bar.update()
    properties = []
    for name, question in questions.items():
        found = {k[1:]: a for k, a in answers.items() if k[0] == name}
        properties.append(_report(question, found, roles, pairs, settings))
    details = {
        "models": [{**i.to_dict(), "role": roles[i.name]} for i in infos],
        "settings": asdict(settings),
        "plan": plan,
        **about,
        "made_by": provenance.collect(),
    }
    return ProbeResult(properties, json.loads(json.dumps(details, default=str)))


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


def _answer(file: Path, question: solve.Question, model: str, layer: str, width: int, kind: str) -> solve.Answer:
    if file.is_file():
        with np.load(file) as data:
            meta = json.loads(str(data["meta"]))
            control = data["control"] if "control" in data.files else None
            return solve.Answer(data["sums"], control, meta["strengths"], meta["how"], meta["bits"], meta["uniform"])
    made_now = solve.answer(question, model, layer, width, kind)
    meta = {k: getattr(made_now, k) for k in ("strengths", "how", "bits", "uniform")}

    def write(path: Path) -> None:
        with open(path, "wb") as handle:
            if made_now.control is None:
                np.savez(handle, sums=made_now.sums, meta=np.array(json.dumps(meta)))
            else:
                np.savez(handle, sums=made_now.sums, control=made_now.control, meta=np.array(json.dumps(meta)))

    provenance.write_atomically(file, write)
    return made_now


def _report(
    question: solve.Question,
    found: Mapping[tuple[str, str, str], solve.Answer],
    roles: Mapping[str, str],
    pairs: Sequence[tuple[str, vectors.Source]],
    settings: solve.Settings,
) -> dict:
    prop, used = question.prop, question.used_groups()
    metric = statistics.r2 if question.number else statistics.accuracy
    draws = statistics.draw(len(used), settings.resamples, settings.seed)

    def estimate(sums: np.ndarray, of=metric) -> statistics.Estimate:
        return statistics.interval(sums, of, draws, confidence=settings.confidence)

    chance = estimate(solve.baseline(question)[used])
    rows = []
    order = {layer: i for i, layer in enumerate(dict.fromkeys((m, n) for _, m, n in found))}
    first = {m: min(i for (n, _), i in order.items() if n == m) for m, _ in order}
    for (kind, model, layer), got in found.items():
        sums = got.sums[used]
        value = estimate(sums)
        row: dict = {
            "probe": kind,
            "model": model,
            "layer": layer,
            "index": order[model, layer] - first[model],
            "role": roles[model],
            "value": value.value,
            "lower": value.lower,
            "upper": value.upper,
        }
        if not question.number:
            f1 = estimate(sums, statistics.macro_f1)
            row |= {"macro_f1": f1.value, "macro_f1_lower": f1.lower, "macro_f1_upper": f1.upper}
        if got.control is not None:
            half = sums.shape[1]
            both = np.concatenate([sums, got.control[used]], 1)
            gap = estimate(both, lambda s, h=half: metric(s[..., :h]) - metric(s[..., h:]))
            row |= {"control": float(metric(got.control[used].sum(0)))}
            row |= {"selectivity": gap.value, "selectivity_lower": gap.lower, "selectivity_upper": gap.upper}
        if got.bits is not None and got.uniform is not None:
            row |= {"code_bits": got.bits, "uniform_bits": got.uniform, "compression": got.uniform / got.bits}
        row |= {"solver": got.how, "strengths": got.strengths, "verdict": None}
        rows.append(row)
    differences = []
    verdicts: dict[str, dict[str, str]] = {}
    for kind in settings.probes:
        columns = [(m, n) for k, m, n in found if k == kind]
        sums_of = [found[kind, m, n].sums[used] for m, n in columns]
        for family, index, some in _families(columns, roles):
            made_now = statistics.differences(
                [sums_of[i] for i in index],
                metric,
                pairs=some,
                confidence=settings.confidence,
                resamples=settings.resamples,
                seed=settings.seed,
            )
            names = ["/".join(columns[i]) for i in index]
            for d in made_now:
                differences.append(
                    {
                        "probe": kind,
                        "family": family,
                        "a": names[d.a],
                        "b": names[d.b],
                        "difference": d.value,
                        "lower": d.lower,
                        "upper": d.upper,
                        "p": d.p,
                        "significant": d.significant,
                    }
                )
            if some is None:
                verdicts.setdefault(kind, {}).update(statistics.verdicts(names, made_now))
    for row in rows:
        row["verdict"] = verdicts.get(row["probe"], {}).get(f"{row['model']}/{row['layer']}")
    against = [
        line
        for name, source in pairs
        if name == prop.name
        for line in vectors.compare(question, source, seed=settings.seed, confidence=settings.confidence)
    ]
    return {
        "name": prop.name,
        "unit": prop.unit,
        "kind": prop.kind,
        "metric": METRICS[prop.kind],
        "source": prop.labels.source,
        "classes": question.classes,
        "examples": int(question.tested.sum()),
        "groups": len(used),
        "by": question.by,
        "why": question.why,
        "chance": {"value": chance.value, "lower": chance.lower, "upper": chance.upper, "why": chance.why},
        "rows": rows,
        "differences": differences,
        "verdicts": verdicts,
        "vectors": against,
        "warnings": question.warnings,
        "counts": question.counts,
        "left_out": question.left_out,
        **prop.about,
    }


def _families(columns: Sequence[tuple[str, str]], roles: Mapping[str, str]):
    """Families of differences: the layers of one model among themselves, and every layer against the controls and the
    layers of other models."""
    models = list(dict.fromkeys(m for m, _ in columns))
    for model in models:
        index = [i for i, (m, _) in enumerate(columns) if m == model]
        if len(index) > 1:
            yield f"layers of {model}", index, None
    across = [(i, j) for i in range(len(columns)) for j in range(i + 1, len(columns)) if columns[i][0] != columns[j][0]]
    if across:
        yield "across models", list(range(len(columns))), across
