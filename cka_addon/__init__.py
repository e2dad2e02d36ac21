"""Layer-wise similarity (linear CKA) of any speech models: s3prl upstreams, transformers models, plain callables.

In a notebook:

    import cka_addon as cka
    result = cka.compute(["base=s3prl:wavlm_local ckpt=base.pt", "fbank"], "wavs/", mode="minibatch", batch_size=256)
    cka.plot_heatmap(result, "base")
    cka.plot_lines(result, to="fbank/0")
    result.to_csv("cka.csv")
"""

from __future__ import annotations

_WHERE = {
    "compute": "run",
    "merge": "run",
    "Options": "options",
    "dump": "store_writer",
    "FeatureStore": "store",
    "merge_stores": "store_writer",
    "open_source": "sources",
    "iterate": "sources",
    "Model": "models",
    "load_model": "models",
    "CKAResult": "result",
    "linear_cka": "hsic",
    "cka_matrix": "hsic",
    "plot_heatmap": "plots",
    "plot_grid": "plots",
    "plot_lines": "plots",
    "plot_adjacent": "plots",
    "plot_layer_weights": "plots",
    "plot_layer_weight_map": "plots",
    "read_layer_weights": "layer_weights",
    "write_report": "report",
    "probe": "probe",
    "ProbeResult": "probe.result",
    "CkaError": "errors",
}
__all__ = [
    "CKAResult",
    "CkaError",
    "FeatureStore",
    "Model",
    "Options",
    "ProbeResult",
    "cka_matrix",
    "compute",
    "dump",
    "iterate",
    "linear_cka",
    "load_model",
    "merge",
    "merge_stores",
    "open_source",
    "plot_adjacent",
    "plot_grid",
    "plot_heatmap",
    "plot_layer_weight_map",
    "plot_layer_weights",
    "plot_lines",
    "probe",
    "read_layer_weights",
    "write_report",
]


def __getattr__(name: str):
    """Import on first use: `cka-addon --help` should not wait for torch and matplotlib."""
    if name not in _WHERE:
        raise AttributeError(f"module 'cka_addon' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"cka_addon.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
