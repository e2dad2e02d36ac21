"""Real upstreams: s3prl's FBANK and WavLM (real checkpoint format), transformers models, real speech, the recipe."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cka_addon import audio
from cka_addon.models import load_model
from cka_addon.result import CKAResult
from cka_addon.run import compute

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "cka"


@pytest.mark.parametrize("kind", ["WavLM", "Hubert", "Wav2Vec2"])
def test_transformers_models(kind, wavs, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**small)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "model")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "model")
    model = load_model(f"m=hf:{tmp_path / 'model'}")
    assert model.info.dims == (32,) * 3 and model.info.provenance["normalize"] is True
    assert (model.info.clock.shift, round(model.info.clock.first_center, 6)) == (0.02, 0.0125)
    wav = audio.load(audio.find_recordings(wavs)[0])[0]
    # Normalised: the level of the recording does not matter.
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(model(wav), model(wav * 0.3), strict=True))


@pytest.mark.e2e
@pytest.mark.compat
def test_wavlm_in_its_real_format_against_fbank_on_real_speech(speech, tmp_path):
    """wavlm_local with checkpoints {"cfg", "model"}, within and across, against s3prl's FBANK, on one pass."""
    pytest.importorskip("s3prl")
    for kind in ("base", "large"):
        subprocess.run([sys.executable, str(RECIPE / "make_wavlm.py"), kind, str(tmp_path / f"{kind}.pt")], check=True)
    specs = [f"{k}=s3prl:wavlm_local ckpt={tmp_path / f'{k}.pt'} layers=0,1,6,-1" for k in ("base", "large")]
    result = compute(
        [*specs, "fbank"], speech / "keywords" / "alexa", limit=20, batch_size=128, blocks=5, progress=False
    )
    assert result.names == ["base", "large", "fbank"] and result.values.shape == (9, 9)
    assert result.layers("large") == ("layer_0", "layer_1", "layer_6", "layer_24")
    assert np.isfinite(result.values).all() and result.details["alignment"]["reference_shift_ms"] == 20
    fbank = next(m for m in result.models if m.name == "fbank")
    assert fbank.clock.shift == 0.01 and fbank.clock.first_center == pytest.approx(0.0125, abs=1e-4)
    assert result.models[0].provenance["ckpt_sha256"]
    # Depth matters: neighbours are more alike than the ends.
    assert result.values[0, 1] > result.values[0, 3]


@pytest.mark.e2e
def test_recipe_from_speech_to_report(speech, tmp_path):
    pytest.importorskip("s3prl")
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "SMOKE": "1",
        "LIMIT": "12",
        "AUDIO": str(speech / "digits" / "theo"),
    }
    env |= {"EXP": str(tmp_path / "exp"), "BATCH": "32", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    env["OPTIONS"] = "--mix 2 --blocks 6"
    subprocess.run([str(RECIPE / "run.sh")], check=True, env=env, timeout=540)
    result = CKAResult.load(tmp_path / "exp" / "cka.json")
    assert result.names == ["wavlm_base", "wavlm_base_plus", "wavlm_large", "ecapa_dino", "ecapa_tdnn"]
    assert [len(m.layers) for m in result.models] == [13, 13, 25, 4, 4]
    assert result.layers("ecapa_dino")[0] == "block_1" and np.isfinite(result.values).all()
    assert len(list((tmp_path / "exp" / "figures").glob("*.png"))) >= 15 + 2
    before = (tmp_path / "exp" / "cka.json").stat().st_mtime_ns
    subprocess.run([str(RECIPE / "run.sh")], check=True, env=env, timeout=60)  # all is done: nothing runs again
    assert (tmp_path / "exp" / "cka.json").stat().st_mtime_ns == before
