"""How a model is written as one argument: "[NAME=]KIND:TARGET [option=value ...]"."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cka_addon.errors import SpecError

KINDS = ("s3prl", "hf", "py")
SPEC_HELP = """\
A model is written as one quoted argument: "[NAME=]KIND:TARGET [option=value ...]".
  s3prl:NAME       an upstream of s3prl's hub; options ckpt=FILE and model_config=FILE are handed on
  hf:PATH_OR_NAME  a model of the transformers library (WavLM, HuBERT, Wav2Vec2, ...)
  py:MODULE:NAME   a callable wavs -> {"hidden_states": [...]}; with options it is called with them first to build it
Without KIND it is an s3prl upstream. Options for every kind:
  keys=hidden_states,embedding   what to take of the model's output (default hidden_states)
  layers=0-4,8,-1 or block_1,mfa which layers to keep (default all), by position or name
  shift=0.02 first_center=0.0125 the clock in seconds, where it should not be measured
Examples: "fbank"   "base=s3prl:wavlm_local ckpt=/ckpt/WavLM-Base.pt"   "h=hf:/models/hubert layers=0-12"
"""


@dataclass(frozen=True)
class Spec:
    """A parsed model specification."""

    name: str
    kind: str
    target: str
    options: dict[str, str]


def parse_spec(text: str) -> Spec:
    """Parse "[NAME=]KIND:TARGET [option=value ...]".

    >>> parse_spec("base=s3prl:wavlm_local ckpt=/x/y.pt layers=0-3")
    Spec(name='base', kind='s3prl', target='wavlm_local', options={'ckpt': '/x/y.pt', 'layers': '0-3'})
    >>> parse_spec("fbank")
    Spec(name='fbank', kind='s3prl', target='fbank', options={})
    """
    words = shlex.split(text)
    if not words:
        raise SpecError(f"got an empty model specification.\n{SPEC_HELP}")
    head = words[0]
    match = re.match(r"^([A-Za-z0-9_.+-]+)=(.+)$", head)
    name, rest = (match.group(1), match.group(2)) if match else (None, head)
    kind, colon, target = rest.partition(":")
    if not colon:
        kind, target = "s3prl", rest
    if kind not in KINDS or not target:
        raise SpecError(f"got model '{text}': kind '{kind}'; expected one of {', '.join(KINDS)}.\n{SPEC_HELP}")
    options = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise SpecError(f"got '{word}' in model '{text}'; expected option=value.\n{SPEC_HELP}")
        options[key] = value
    name = name or re.sub(r"[^A-Za-z0-9_.+-]+", "_", Path(target).name if kind == "hf" else target.split(":")[-1])
    return Spec(name, kind, target, options)
