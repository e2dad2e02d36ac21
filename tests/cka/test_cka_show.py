"""Tables, pictures, the report, layer weights and the command line."""

import argparse
import html.parser
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from cka_toy import Toy

import cka_addon as cka
from cka_addon import layer_weights, plots
from cka_addon.cli import main
from cka_addon.errors import CheckpointError, SpecError, StoreError
from cka_addon.models import Model
from cka_addon.result import CKAResult

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def result(wavs):
    models = [Model(Toy(), "slow"), Model(Toy(160), "fast<script>", layers=[0, 2])]
    return cka.compute(models, wavs, mode="full", permutations=1, progress=False)


def test_saved_and_loaded_is_the_same(result, tmp_path):
    again = CKAResult.load(result.save(tmp_path / "r.json"))
    for what in ("values", "lower", "upper", "baseline", "hsic", "mask"):
        assert np.array_equal(getattr(again, what), getattr(result, what))
    assert again.models == result.models and again.details == json.loads(json.dumps(result.details))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(StoreError, match="not a result"):
        CKAResult.load(tmp_path / "x.json")


def test_tables_hold_every_pair_once_with_interval_and_provenance(result, tmp_path):
    import pandas

    path = result.to_csv(tmp_path / "cka.csv")
    table = pandas.read_csv(path)
    assert len(table) == 5 * 6 // 2
    row = table[(table.layer_a == "layer_0") & (table.layer_b == "layer_2") & (table.model_b == "slow")].iloc[0]
    assert row.cka == pytest.approx(result.values[0, 2]) and row.lower <= row.cka <= row.upper
    assert "HSIC_1" in row.estimator and row.examples == result.details["counts"]["examples"]
    assert not table.drop(columns=["batch_size", "git_revision"]).isna().any().any()
    about = json.loads((tmp_path / "cka.provenance.json").read_text())
    assert about["made_by"][0]["versions"]["torch"] and about["models"][0]["provenance"]["weights_sha256"]
    try:
        import pyarrow.parquet
    except ImportError as error:
        pytest.skip(f"Parquet needs a pyarrow that works with this numpy: {error}")

    stored = pyarrow.parquet.read_table(result.to_parquet(tmp_path / "cka.parquet"))
    assert json.loads(stored.schema.metadata[b"cka_addon"])["estimator"] == about["estimator"]
    assert np.allclose(stored.to_pandas().cka, table.cka)


def test_heatmap_scale_and_orientation(result):
    figure, ax = cka.plot_heatmap(result, "slow", "fast<script>")
    image = ax.images[0]
    assert image.get_clim() == (0, 1) and image.origin == "lower"
    # Columns are the first model, rows the second; layer 0 of both at the bottom left.
    assert np.array_equal(image.get_array(), result.values[3:, :3])
    assert ax.get_ylim()[0] < ax.get_ylim()[1]
    assert figure is ax.figure


def test_grid_and_lines(result):
    _, axes = cka.plot_grid(result)
    assert axes.shape == (2, 2) and np.array_equal(axes[1, 0].images[0].get_array(), result.values[:3, :3])
    _, ax = cka.plot_lines(result, to="slow/0")
    assert np.allclose(ax.lines[0].get_ydata(), result.values[:3, 0]) and len(ax.collections) == 2  # interval bands
    _, ax = cka.plot_adjacent(result, ["slow"])
    assert np.allclose(ax.lines[0].get_ydata(), [result.values[0, 1], result.values[1, 2]])
    with pytest.raises(SpecError, match="expected slow/ and one of layer_0"):
        cka.plot_lines(result, to="slow/layer_9")
    with pytest.raises(SpecError, match="expected one of slow"):
        cka.plot_heatmap(result, "other")


def test_given_axes_are_used(result):
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.add_subplot()
    for draw in (lambda: cka.plot_heatmap(result, "slow", ax=ax), lambda: cka.plot_lines(result, "slow/1", ax=ax)):
        assert draw() == (figure, ax)


def test_files_are_png_and_pdf(result, tmp_path):
    png, pdf = plots.save(cka.plot_heatmap(result, "slow")[0], tmp_path / "a.b")
    assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:4] == b"%PDF"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b.pdf", "a.b.png"]


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells, self.links, self.text, self.open = [], [], {}, None

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "rect" and "data-i" in attrs:
            self.cells.append((int(attrs["data-i"]), int(attrs["data-j"]), attrs["fill"], float(attrs["y"])))
        self.links += [v for k, v in attrs.items() if k in ("src", "href")]
        self.open = attrs.get("id") if tag == "script" else None

    def handle_data(self, data):
        if self.open:
            self.text[self.open] = self.text.get(self.open, "") + data


def test_report_is_one_file_with_every_value(result, tmp_path):
    weights = [layer_weights.LayerWeights("<b>pr", "toy", np.array([0.2, 0.5, 0.3]))]
    path = cka.write_report(result, tmp_path / "r.html", weights=weights)
    text = path.read_text()
    page = _Page()
    page.feed(text)
    assert page.links == [] and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert len(page.cells) == 9 + 6 + 4
    data = json.loads(page.text["data"])
    assert np.allclose(data["values"], result.values, atol=1e-6) and len(data["labels"]) == 5
    assert "<b>pr" not in text and "&lt;b&gt;pr" in text and "fast<script>" not in text
    low = next(c for c in page.cells if c[:2] == (0, 0))
    high = next(c for c in page.cells if c[:2] == (2, 0))
    assert low[3] > high[3]  # layer 0 at the bottom


def test_report_script_is_valid(result, tmp_path):
    import shutil

    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the script's syntax is not checked")
    text = cka.write_report(result, tmp_path / "r.html").read_text()
    (tmp_path / "s.js").write_text(text.split("<script>")[1].split("</script>")[0])
    assert subprocess.run([node, "--check", str(tmp_path / "s.js")]).returncode == 0


def checkpoint(path, weights, **args):
    values = {"upstream": "toy", "downstream": "ctc", "downstream_variant": None, **args}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "Featurizer": {"weights": torch.tensor(weights)},
            "Args": argparse.Namespace(**values),
            "Step": 5,
            "Config": {},
        },
        path,
    )
    return path


def test_layer_weights(wavs, tmp_path):
    raw = [0.0, 1.0, -1.0]
    a = checkpoint(tmp_path / "pr" / "states-100.ckpt", raw)
    checkpoint(tmp_path / "pr" / "states-20.ckpt", [0.0, 0.0, 0.0])
    checkpoint(
        tmp_path / "sid" / "dev-best.ckpt", [1.0, 0.0, 0.0], downstream="voxceleb1", upstream_feature_normalize=True
    )
    first, second = layer_weights.read_many([tmp_path / "pr", f"SID={tmp_path / 'sid'}"])
    assert first.details["checkpoint"] == str(a) and (first.task, second.task) == ("ctc", "SID")
    assert np.allclose(first.weights, np.exp(raw) / np.exp(raw).sum())
    layers, norms, how = layer_weights.measure_norms(Model(Toy(), "toy"), wavs, limit=5, progress=False)
    assert how["utterances"] == 5
    layer_weights.correct(first, layers, norms, how)
    layer_weights.correct(second, layers, norms, how)
    want = first.weights * norms / (first.weights * norms).sum()
    assert np.allclose(first.corrected, want) and not np.allclose(want, first.weights)
    assert np.allclose(second.corrected, second.weights)  # a normalised run has equal norms by construction
    assert len(layer_weights.table([first, second])) == 6
    _, ax = cka.plot_layer_weight_map([first, second], corrected=True)
    assert np.allclose(ax.images[0].get_array(), [first.corrected, second.corrected])
    _, axes = cka.plot_layer_weights([first, second])
    assert np.allclose([b.get_height() for b in axes[0].patches[:3]], first.weights)


def test_norms_are_the_mean_norm_of_a_frame(wavs):
    model = Model(Toy(), "toy")
    _, norms, _ = layer_weights.measure_norms(model, wavs, limit=None, progress=False)
    from cka_addon import audio

    frames = [model(audio.load(r)[0])[1] for r in audio.find_recordings(wavs)]
    assert norms[1] == pytest.approx(float(torch.cat(frames).norm(dim=1).mean()), rel=1e-6)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_checkpoints_are_read_safely(tmp_path, capsys):
    path = tmp_path / "evil.ckpt"
    torch.save({"Featurizer": {"weights": torch.zeros(2)}, "Args": Evil()}, path)
    with pytest.raises(CheckpointError, match="not read for safety"):
        layer_weights.read_layer_weights(path)
    assert "must not run" not in capsys.readouterr().out
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="got model; expected an s3prl downstream checkpoint"):
        layer_weights.read_layer_weights(path)
    torch.save({"Featurizer": {}, "Args": argparse.Namespace(upstream_feature_selection="fbank")}, path)
    with pytest.raises(CheckpointError, match="the task took one layer"):
        layer_weights.read_layer_weights(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError):
        layer_weights.read_layer_weights(path)


def test_commands_from_audio_to_report(wavs, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    toy, fast = "toy=py:cka_toy:Toy", "fast=py:cka_toy:build hop=160 layers=0,2"
    # A class that is called with no options builds the model only through the factory form.
    toy = "toy=py:cka_toy:build hop=320"
    store, out = str(tmp_path / "store"), tmp_path
    assert main(["-q", "dump", "-m", toy, "-m", fast, "-a", str(wavs), "-o", store, "--dry-run"]) == 0
    assert not (tmp_path / "store").exists()
    assert main(["dump", "-q", "-m", toy, "-m", fast, "-a", str(wavs), "-o", store]) == 0
    assert main(["-q", "verify", store]) == 0 and main(["-q", "info", store, "--json"]) == 0
    common = ["--store", store, "--mode", "full", "--blocks", "6"]
    assert main(["-q", "compute", *common, "-o", str(out / "r.json"), "--permutations", "1"]) == 0
    parts = []
    for i in (1, 2):
        part = str(out / f"p{i}.safetensors")
        assert main(["-q", "compute", *common, "-o", part, "--shard", f"{i}/2", "--permutations", "1"]) == 0
        parts.append(part)
    assert main(["-q", "info", parts[0]]) == 0
    assert main(["-q", "merge", *parts, "-o", str(out / "m.json")]) == 0
    a, b = CKAResult.load(out / "r.json"), CKAResult.load(out / "m.json")
    assert np.abs(a.values - b.values).max() < 1e-12 and (out / "m.csv").exists()
    assert main(["-q", "plot", str(out / "m.json"), "-o", str(out / "fig"), "--to", "fast/0", "--formats", "png"]) == 0
    names = {p.name for p in (out / "fig").iterdir()}
    assert {
        "heatmap_toy.png",
        "heatmap_toy_fast.png",
        "grid.png",
        "adjacent.png",
        "lines_fast_0.png",
        "cka.csv",
    } <= names
    ckpt = checkpoint(tmp_path / "sid" / "states-4.ckpt", [0.1, 0.2, 0.3])
    weights = ["-q", "layer-weights", f"SID={ckpt}", "-o", str(out / "lw"), "--formats", "png"]
    assert main([*weights, "--store", store, "--store-model", "toy", "--other-model"]) == 0
    assert {"layer_weights.csv", "layer_weights.png", "layer_weight_map_corrected.png"} <= {
        p.name for p in (out / "lw").iterdir()
    }
    assert main(["-q", "report", str(out / "m.json"), "-o", str(out / "r.html"), "--weights", f"SID={ckpt}"]) == 0


def test_named_problems_end_with_one_line_and_status_one(tmp_path, caplog):
    assert main(["compute", "--store", str(tmp_path / "none"), "-o", str(tmp_path / "r.json")]) == 1
    assert "no store.json; expected a feature store" in caplog.text and "Traceback" not in caplog.text


def test_help_is_quick_and_needs_no_torch():
    code = "import sys\nfrom cka_addon.cli import main\ntry:\n    main(['--help'])\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "first steps" in done.stdout, done.stderr


def test_never_imports_the_speaker_package():
    """Held by reading the sources: no import, not even a lazy one."""
    import ast
    from pathlib import Path

    for path in Path(cka.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "s3prl_speaker_upstreams" for n in names), path
