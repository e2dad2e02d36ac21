"""Groups of utterances: who speaks, or any other label, as units of intervals and for values within groups."""

from __future__ import annotations

from collections.abc import Sequence

from cka_addon.errors import SpecError


def speakers(ids: Sequence[str], labels: str | None = None) -> dict[str, str]:
    """The speaker of every utterance, from a file of labels ("labels.tsv:speaker", utt2spk), or from the paths.

    Raises SpecError where one of them has none.

    >>> speakers(["anna/1", "anna/2", "ben/1"])
    {'anna/1': 'anna', 'anna/2': 'anna', 'ben/1': 'ben'}
    """
    if labels is not None:
        found = values(ids, labels)
        missing = [name for name in ids if name not in found]
        if missing:
            raise SpecError(f"{labels}: says nothing of {len(missing)} of {len(ids)} utterances, first '{missing[0]}'")
        return found
    from cka_addon.probe.labels import speakers_of

    return speakers_of(ids)


def values(ids: Sequence[str], labels: str) -> dict[str, str]:
    """Utterance -> value of a label file, for those utterances that it knows.

    labels : [NAME=]FILE[:COLUMN] as `cka-addon probe --labels` takes it, or path:speaker
    """
    from cka_addon.probe.labels import match_names, parse_label, path_labels, read_labels

    spec = parse_label(labels)
    if spec.source == "path":
        return dict(path_labels(spec, ids).utterances)
    read = read_labels(spec)
    if not read.utterances:
        raise SpecError(f"{labels}: holds labels with times; expected one value per utterance")
    names, _ = match_names(read.ids, ids)
    # `match_names` gives the utterance for each of the file's names.
    return {utterance: read.utterances[name] for name, utterance in names.items()}
