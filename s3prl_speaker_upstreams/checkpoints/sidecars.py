"""What the files beside a checkpoint tell about it: configurations, read as data and never executed.

What each project's configuration means stands with its format; here is how one is read, and how it is held to what
can be had: an argument that is not known, or not had, is refused by name, because it may change the numbers.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointMismatch

__all__ = ["Settings", "arguments", "component", "expect", "layer_widths", "mentions", "read_json", "read_yaml"]

logger = logging.getLogger(__name__)

_ALONE = "to read the weights without their configuration, move them out of the folder and pass what differs as options"


@dataclass(frozen=True)
class Settings:
    """Fields of EcapaConfig and FrontendConfig that a project's configuration states, and the file that states them.

    >>> Settings({"dilations": (2, 3, 4)}).frontend
    {}
    """

    ecapa: Mapping[str, Any] = field(default_factory=dict)
    frontend: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


class _DataLoader(yaml.SafeLoader):
    """Plain YAML; a tagged node (``!new:package.Class``, ``!ref <key>``) becomes its content with the tag beside it."""


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    tag = node.tag
    if isinstance(node, yaml.MappingNode):
        return {"!": tag, **loader.construct_mapping(node, deep=True)}
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    return {"!": tag, "value": loader.construct_scalar(node)}


_DataLoader.add_multi_constructor("!", _tagged)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as plain data. Tags are kept as the key ``"!"`` and run nothing; references are looked up.

    References are SpeechBrain's ``!ref <key>`` and 3D-Speaker's plain ``<key>``. Returns {} (and logs why) if the file
    is not a YAML mapping.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "hyperparams.yaml"
    >>> _ = path.write_text("n: 80\\nmodel: !new:os.system\\n    command: !ref <n>\\nother: {n: <n>}\\n")
    >>> read_yaml(path)["model"], read_yaml(path)["other"]
    ({'!': '!new:os.system', 'command': 80}, {'n': 80})
    """
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.load(file, Loader=_DataLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        logger.warning("%s: not readable as YAML, not used: %s", path, str(error).splitlines()[0])
        return {}
    if not isinstance(data, dict):
        return {}
    done: dict[int, Any] = {}
    return {str(key): _resolve(value, data, done) for key, value in data.items()}


def _resolve(value: Any, root: Mapping[str, Any], done: dict[int, Any]) -> Any:
    if isinstance(value, str):
        return _referred(value, root, value)
    if not isinstance(value, (dict, list)):
        return value
    if id(value) not in done:
        # Aliases make one node appear many times, or within itself: each is looked at once.
        done[id(value)] = value
        done[id(value)] = _resolved(value, root, done)
    return done[id(value)]


def _resolved(value: dict | list, root: Mapping[str, Any], done: dict[int, Any]) -> Any:
    if isinstance(value, list):
        return [_resolve(v, root, done) for v in value]
    if value.get("!") == "!ref" and isinstance(value.get("value"), str):
        return _referred(value["value"], root, value)
    return {k: _resolve(v, root, done) for k, v in value.items()}


def _referred(text: str, root: Mapping[str, Any], otherwise: Any, depth: int = 0) -> Any:
    """The plain value that ``<key>`` stands for; a whole component, or anything else, stays as it is."""
    whole = re.fullmatch(r"<([\w-]+)>", text.strip())
    value = root.get(whole.group(1), otherwise) if whole else otherwise
    if isinstance(value, dict) and value.get("!") == "!ref" and isinstance(value.get("value"), str):
        value = value["value"]
    if isinstance(value, str) and whole and depth < 8:
        return _referred(value, root, value, depth + 1)
    return otherwise if isinstance(value, dict) else value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; {} if it is not there or is none.

    >>> read_json(Path("/nowhere/configuration.json"))
    {}
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def mentions(path: Path, word: str) -> bool:
    """Whether a text file is there and holds a word.

    >>> mentions(Path("/nowhere/hyperparams.yaml"), "speechbrain.")
    False
    """
    try:
        return word in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def expect(path: Path, what: str, got: Any, expected: Any, why: str = "this model cannot be loaded") -> None:
    """Refuse a setting that cannot be had.

    >>> expect(Path("config.yaml"), "groups", 2, 1)
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.CheckpointMismatch: config.yaml: got groups=2, expected 1; this model cannot be \
loaded. If that is not of this file: to read the weights without their configuration, move them out of the folder and \
pass what differs as options
    """
    if got != expected:
        raise CheckpointMismatch(
            f"{path}: got {what}={got!r}, expected {expected!r}; {why}. If that is not of this file: {_ALONE}"
        )


def arguments(
    path: Path,
    of: str,
    given: Any,
    *,
    ours: Mapping[str, str],
    fixed: Mapping[str, Any],
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """What a component's arguments say in this package's fields.

    path, of : of messages: the file, and the component
    given : its arguments; anything but a mapping says nothing
    ours : the project's argument -> the field here that it is
    fixed : the project's argument -> the only value of it that can be had
    ignored : arguments that change nothing of what a trained model gives

    Raises CheckpointMismatch for any other argument, and for a value that is a reference to something else.

    >>> arguments(Path("c.yaml"), "model", {"lin_neurons": 192, "groups": 1}, ours={"lin_neurons": "embedding_dim"},
    ...           fixed={"groups": 1})
    {'embedding_dim': 192}
    >>> arguments(Path("c.yaml"), "model", {"gropus": 2}, ours={}, fixed={"groups": 1})
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.CheckpointMismatch: c.yaml: model: got gropus=2, expected one of groups; an \
argument that is not known may change the numbers. If it does not: to read the weights without their configuration, \
move them out of the folder and pass what differs as options
    """
    found: dict[str, Any] = {}
    for key, value in given.items() if isinstance(given, Mapping) else ():
        if key in ("!", *ignored):
            continue
        if key in fixed:
            expect(path, f"{of}.{key}", value, fixed[key])
        elif key not in ours:
            raise CheckpointMismatch(
                f"{path}: {of}: got {key}={value!r}, expected one of {', '.join(sorted([*ours, *fixed]))}; an argument "
                f"that is not known may change the numbers. If it does not: {_ALONE}"
            )
        elif isinstance(value, (Mapping, str)) and not (isinstance(value, str) and re.fullmatch(r"[\w.+-]+", value)):
            raise CheckpointMismatch(
                f"{path}: {of}: got {key}={value!r}, expected a plain value: the expression is not evaluated here; "
                f"write its value into the file. Or: {_ALONE}"
            )
        elif value is not None:
            found[ours[key]] = value
    return found


def component(path: Path, data: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    """A component's arguments, if its tag names the class that is meant; {} where the file does not say what it is.

    Raises CheckpointMismatch if it is of another class.

    >>> component(Path("h.yaml"), {"model": {"!": "!new:speechbrain.Xvector"}}, "model", "ECAPA_TDNN")
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.CheckpointMismatch: h.yaml: got model !new:speechbrain.Xvector, expected \
ECAPA_TDNN; the model wants what cannot be had here
    """
    value = data.get(name)
    if not isinstance(value, dict) or "!" not in value:
        return {}
    if not value["!"].endswith(kind):
        raise CheckpointMismatch(
            f"{path}: got {name} {value['!']}, expected {kind}; the model wants what cannot be had here"
        )
    return value


def layer_widths(path: Path, of: str, given: Any) -> dict[str, Any]:
    """What SpeechBrain's lists of five (``channels``, ``kernel_sizes``, ``dilations``, ``groups``) say, as fields here.

    Raises CheckpointMismatch for shapes that are not ECAPA-TDNN's: other than five layers, blocks of unequal width,
    grouped convolutions, a dilated first or last layer, block kernels other than 3.

    >>> layer_widths(Path("c.yaml"), "model", {"channels": [8, 8, 8, 8, 24], "dilations": [1, 3, 4, 5, 1]})
    {'channels': 8, 'mfa_channels': 24, 'dilations': (3, 4, 5)}
    """
    found: dict[str, Any] = {}
    given = given if isinstance(given, Mapping) else {}

    def five(name: str) -> list[int] | None:
        value = given.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 5 or not all(isinstance(v, int) for v in value):
            raise CheckpointMismatch(f"{path}: {of}: got {name}={value!r}, expected five numbers; {_ALONE}")
        return value

    channels, kernels, dilations, groups = map(five, ("channels", "kernel_sizes", "dilations", "groups"))
    if channels:
        if len(set(channels[:4])) != 1:
            raise CheckpointMismatch(
                f"{path}: got channels={channels}, expected four equal ones: blocks of unequal width are not supported"
            )
        found.update(channels=channels[0], mfa_channels=channels[4])
    if kernels:
        expect(path, "kernel_sizes[1:]", kernels[1:], [3, 3, 3, 1])
        found["kernel_size"] = kernels[0]
    if dilations:
        expect(path, "dilations[0] and [4]", [dilations[0], dilations[4]], [1, 1])
        found["dilations"] = tuple(dilations[1:4])
    if groups:
        expect(path, "groups", groups, [1] * 5)
    return found
