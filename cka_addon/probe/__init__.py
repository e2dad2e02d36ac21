"""What each layer knows: linear probes with controls, intervals and verdicts, for any property of speech.

In a notebook:

    import cka_addon as cka
    result = cka.probe(["base=s3prl:wavlm_local ckpt=base.pt"], "wavs/", labels=["labels.tsv:speaker", "phones.ctm"])
    print(result.summary())

The package can be called itself: `cka.probe(...)` is `cka.probe.run.probe(...)` whether or not it was imported before.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cka_addon.probe.result import ProbeResult

_WHERE = {
    "probe": "run",
    "ProbeResult": "result",
    "Settings": "solve",
    "Labels": "labels",
    "Segment": "labels",
    "read_labels": "labels",
    "Material": "made",
    "plot_curves": "plots",
    "plot_map": "plots",
    "write_report": "report",
    "report_section": "report",
    "LabelError": "errors",
    "FoldError": "errors",
    "ProbeError": "errors",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    """Import on first use: the command line should not wait for torch and matplotlib."""
    if name not in _WHERE:
        raise AttributeError(f"module 'cka_addon.probe' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"cka_addon.probe.{_WHERE[name]}"), name)


class _Callable(types.ModuleType):
    """A module that is also the function it is named for."""

    def __call__(self, *args, **kwargs) -> ProbeResult | None:
        from cka_addon.probe.run import probe

        return probe(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
