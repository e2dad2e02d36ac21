"""The table of stand-ins: what is missing, since when, who in s3prl 0.4.18 needs it, how that is seen, what is given.

Light on purpose: the modules that do the work are imported when a stand-in is put in place.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["STANDINS", "Standin"]


@dataclass(frozen=True)
class Standin:
    """One stand-in.

    modules : looked at when one of these has been imported
    token : what the lines in `used_by` contain (a test looks)
    missing : whether the thing is missing, from the module just imported
    supply : puts the stand-in in place
    lent : in place only while the body of `modules` runs (`missing` and `supply` get None; `supply` returns the undo)
    """

    name: str
    removed_in: str
    used_by: tuple[str, ...]
    token: str
    supplies: str
    modules: tuple[str, ...]
    missing: Callable[[Any], bool]
    supply: Callable[[Any], Any]
    lent: bool = False


def _lacks(*names: str) -> Callable[[ModuleType], bool]:
    return lambda module: any(not hasattr(module, name) for name in names)


def _set(source: str, *names: str) -> Callable[[ModuleType], None]:
    """Set attributes on the module from one of ours, where they are missing."""

    def supply(module: ModuleType) -> None:
        ours = importlib.import_module(f"{__package__}.{source}")
        for name in names:
            setattr(module, name, getattr(ours, name))

    return supply


def _call(source: str, function: str) -> Callable[[ModuleType], Any]:
    return lambda module: getattr(importlib.import_module(f"{__package__}.{source}"), function)(module)


# ------------------------------------------------------------------------------------------------- torchaudio


def _needs_torchcodec(module: ModuleType) -> bool:
    """torchaudio's own reading and writing goes through TorchCodec, and TorchCodec cannot be imported."""
    if hasattr(module, "list_audio_backends") or not hasattr(module, "load_with_torchcodec"):
        return False  # 2.8 has both: TorchCodec on demand, and still its own backends
    if importlib.util.find_spec("torchcodec") is None:
        return True
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError):  # installed without the ffmpeg libraries that it opens
        return True
    return False


def _no_sox(module: ModuleType) -> bool:
    """sox_effects is gone, or there is no libsox for it to open."""
    if importlib.util.find_spec("torchaudio.sox_effects") is None:
        return True
    try:
        return "gain" not in importlib.import_module("torchaudio.sox_effects").effect_names()
    except (ImportError, OSError, RuntimeError, AttributeError):
        return True


def _supply_sox(module: Any) -> None:
    ours = importlib.import_module(f"{__package__}.sox_effects")
    theirs = sys.modules.get("torchaudio.sox_effects")
    if theirs is None:
        sys.modules["torchaudio.sox_effects"] = ours
        module.sox_effects = ours
        return
    for name in ("apply_effects_file", "apply_effects_tensor", "effect_names"):
        setattr(theirs, name, getattr(ours, name))


# ------------------------------------------------------------------------------------------------- other packages


def _no_namespaces(module: ModuleType) -> bool:
    return importlib.import_module(f"{__package__}.torch_load").namespaces_are_refused()


def _refuses(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a call with these arguments does not fit the function's signature (nothing is called)."""
    import inspect

    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return True
    return False


def _refuses_old_create_repo(module: ModuleType) -> bool:
    return _refuses(module.HfApi.create_repo, module.HfApi, name="name", organization="organization", token=None)


def _refuses_old_download(module: ModuleType) -> bool:
    import huggingface_hub

    return _refuses(huggingface_hub.snapshot_download, "repo", "revision", use_auth_token=True)


def _supply_download(module: ModuleType) -> None:
    importlib.import_module(f"{__package__}.hub_names").wrap_get_upstream(module.Runner)


def _supply_runner_api(module: Any) -> None:
    module.HfApi = importlib.import_module(f"{__package__}.hub_names").make_runner_api(module.HfApi)


def _supply_login(module: ModuleType) -> None:
    module.HfApi.login = importlib.import_module(f"{__package__}.hub_names").login


def _numpy_lacks(name: str) -> Callable[[ModuleType], bool]:
    def missing(module: ModuleType) -> bool:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return not hasattr(module.np, name)

    return missing


def _supply_numpy(module: Any) -> None:
    module.np = importlib.import_module(f"{__package__}.numpy_names")


def _not_installed(name: str) -> Callable[[Any], bool]:
    return lambda module: name not in sys.modules and importlib.util.find_spec(name) is None


def _lend(source: str, *names: str) -> Callable[[Any], Callable[[], None]]:
    """Let `names` (packages and, last, the module that is used) be imported from one of our modules for a while.

    Taken back afterwards, so that no other code takes a package for installed that is not.
    """

    def supply(module: Any) -> Callable[[], None]:
        parent: ModuleType | None = None
        for name in names:
            current = ModuleType(name)
            if name == names[-1]:
                current = importlib.import_module(f"{__package__}.{source}")
            else:
                current.__path__ = []
            sys.modules[name] = current
            if parent is not None:
                setattr(parent, name.rpartition(".")[2], current)
            parent = current

        def take_back() -> None:
            for name in names:
                sys.modules.pop(name, None)

        return take_back

    return supply


# ------------------------------------------------------------------------------------------------- s3prl itself

_STFT_TASKS = ("enhancement_stft", "separation_stft", "enhancement_stft2", "separation_stft2")
_CORPORA = ("librispeech", "libriphone", "snips", "common_voice")


def _no_corpora(module: ModuleType) -> bool:
    return importlib.util.find_spec("s3prl.downstream.ctc.corpus") is None


def _supply_corpora(module: Any) -> None:
    package = importlib.import_module(f"{__package__}.ctc_corpus")
    module.corpus = sys.modules["s3prl.downstream.ctc.corpus"] = package
    for name in _CORPORA:
        sys.modules[f"s3prl.downstream.ctc.corpus.{name}"] = importlib.import_module(f"{__package__}.ctc_corpus.{name}")


def _is_torchaudio_without_info(module: ModuleType) -> bool:
    """A child process imports plain torchaudio, so this cannot ask whether *this* process has a stand-in."""
    ours = sys.modules.get(f"{__package__}.torchaudio_io")
    return not hasattr(module.torchaudio, "info") or (ours is not None and module.torchaudio.info is ours.info)


def _supply_torchaudio(module: Any) -> None:
    module.torchaudio = importlib.import_module(f"{__package__}.torchaudio_io")


STANDINS: tuple[Standin, ...] = (
    Standin(
        "torchaudio beside a later torch",
        "torch 2.12 (torchaudio ends with 2.11)",
        ("run_downstream.py:8",),
        "import torchaudio",
        "logs that the two were built for different CUDA releases instead of refusing to be imported",
        ("torchaudio._extension.utils",),
        _call("cuda_versions", "checks_the_release"),
        _call("cuda_versions", "warn_instead"),
    ),
    Standin(
        "torchaudio.set_audio_backend",
        "torchaudio 2.9",
        ("run_downstream.py:157", "upstream/byol_s/byol_a/common.py:20", "dataio/dataset/load_audio.py:10"),
        "set_audio_backend",
        "accepts the old names; there is one reader",
        ("torchaudio",),
        _lacks("set_audio_backend"),
        _set("torchaudio_io", "set_audio_backend"),
    ),
    Standin(
        "torchaudio.load without TorchCodec",
        "torchaudio 2.9",
        (
            "downstream/voxceleb1/dataset.py:106",
            "downstream/ctc/data.py:16",
            "downstream/asr/dataset.py:112",
            "downstream/fluent_commands/dataset.py:27",
            "downstream/emotion/dataset.py:29",
            "downstream/emotion/dataset.py:36",
            "downstream/runner.py:514",
        ),
        "torchaudio.load(",
        "reads through soundfile",
        ("torchaudio",),
        _needs_torchcodec,
        _set("torchaudio_io", "load"),
    ),
    Standin(
        "torchaudio.save without TorchCodec",
        "torchaudio 2.9",
        ("util/pseudo_data.py:37",),
        "torchaudio.save(",
        "writes WAV and FLAC through soundfile",
        ("torchaudio",),
        _needs_torchcodec,
        _set("torchaudio_io", "save"),
    ),
    Standin(
        "torchaudio.info",
        "torchaudio 2.9",
        ("util/audio_info.py:51",),
        "torchaudio.info(",
        "reads the header through soundfile",
        ("torchaudio",),
        _lacks("info"),
        _set("torchaudio_io", "info", "AudioMetaData"),
    ),
    Standin(
        "torchaudio.sox_effects",
        "torchaudio 2.9, or no libsox.so",
        (
            "upstream/mos_prediction/expert.py:9",
            "downstream/speech_commands/dataset.py:5",
            "downstream/sv_voxceleb1/dataset.py:19",
            "downstream/quesst14_dtw/dataset.py:5",
        ),
        "sox_effects",
        "channels, rate, gain, silence by the sox program or equal arithmetic; any other effect raises",
        ("torchaudio",),
        _no_sox,
        _supply_sox,
    ),
    Standin(
        "torchaudio in joblib children of util.audio_info",
        "torchaudio 2.9",
        ("util/audio_info.py:50", "util/audio_info.py:51"),
        "torchaudio.",
        "a module that children import by reference",
        ("s3prl.util.audio_info",),
        _is_torchaudio_without_info,
        _supply_torchaudio,
    ),
    Standin(
        "torch.load of experiment checkpoints",
        "torch 2.6",
        ("run_downstream.py:112", "run_downstream.py:171", "downstream/runner.py:91"),
        "torch.load(",
        "allows argparse.Namespace in s3prl's own checkpoints, nothing else",
        ("s3prl.hub", "s3prl.downstream.runner"),
        _no_namespaces,
        lambda module: importlib.import_module(f"{__package__}.torch_load").put_in_place(),
    ),
    Standin(
        "huggingface_hub.HfFolder",
        "huggingface_hub 1.0",
        ("run_downstream.py:17", "downstream/runner.py:27"),
        "HfFolder",
        "gives the stored token; raises for anything else",
        ("huggingface_hub",),
        _lacks("HfFolder"),
        _set("hub_names", "HfFolder"),
    ),
    Standin(
        "huggingface_hub.Repository",
        "huggingface_hub 1.0",
        ("downstream/runner.py:27",),
        "Repository",
        "raises when used",
        ("huggingface_hub",),
        _lacks("Repository"),
        _set("hub_names", "Repository"),
    ),
    Standin(
        "HfApi.login",
        "huggingface_hub 0.13",
        ("run_downstream.py:187",),
        "HfApi().login(",
        "gives the stored token, raises if there is none",
        ("s3prl.downstream.runner",),
        lambda module: not hasattr(module.HfApi, "login"),
        _supply_login,
    ),
    Standin(
        "HfApi.create_repo(name=)",
        "huggingface_hub 0.13",
        ("downstream/runner.py:546",),
        "create_repo(",
        "takes name and organization as before, for the runner only",
        ("s3prl.downstream.runner",),
        _refuses_old_create_repo,
        _supply_runner_api,
    ),
    Standin(
        "snapshot_download(repo, revision, use_auth_token=)",
        "huggingface_hub 0.11 (by position), 1.0 (use_auth_token)",
        ("downstream/runner.py:125",),
        "use_auth_token",
        "takes use_auth_token and a positional revision as before, for the runner only",
        ("s3prl.downstream.runner",),
        _refuses_old_download,
        _supply_download,
    ),
    Standin(
        "numpy.int",
        "numpy 1.24",
        (
            "upstream/wav2vec2/wav2vec2_model.py:2028",
            "upstream/wavlm/WavLM.py:126",
            "upstream/lighthubert/lighthubert/lighthubert.py:121",
        ),
        "np.int,",
        "the built-in int, in those three modules only",
        (
            "s3prl.upstream.wav2vec2.wav2vec2_model",
            "s3prl.upstream.wavlm.WavLM",
            "s3prl.upstream.lighthubert.lighthubert.lighthubert",
        ),
        _numpy_lacks("int"),
        _supply_numpy,
    ),
    Standin(
        "numpy.complex",
        "numpy 1.24",
        ("utility/audio.py:106",),
        "np.complex",
        "the built-in complex, in that module only",
        ("s3prl.utility.audio",),
        _numpy_lacks("complex"),
        _supply_numpy,
    ),
    Standin(
        "catalyst.data.sampler.DistributedSamplerWrapper",
        "not required by s3prl",
        ("downstream/speech_commands/expert.py:12",),
        "DistributedSamplerWrapper",
        "the one class, if catalyst is not installed",
        ("s3prl.downstream.speech_commands.expert",),
        _not_installed("catalyst"),
        _lend("samplers", "catalyst", "catalyst.data", "catalyst.data.sampler"),
        lent=True,
    ),
    Standin(
        "sox.Transformer",
        "not required by s3prl",
        ("downstream/sv_voxceleb1/dataset.py:14",),
        "Transformer",
        "a name that raises when used (s3prl imports it and does not use it)",
        ("s3prl.downstream.sv_voxceleb1.dataset",),
        _not_installed("sox"),
        _lend("placeholders", "sox"),
        lent=True,
    ),
    Standin(
        "sed_eval",
        "not required by s3prl",
        ("task/_hear_score.py:9",),
        "sed_eval",
        "names that raise when used, so that s3prl.problem can be imported",
        ("s3prl.task._hear_score",),
        _not_installed("sed_eval"),
        _lend("event_scores", "sed_eval"),
        lent=True,
    ),
    Standin(
        "dcase_util",
        "not required by s3prl",
        ("task/_hear_score.py:13",),
        "dcase_util",
        "a name that raises when used, so that s3prl.problem can be imported",
        ("s3prl.task._hear_score",),
        _not_installed("dcase_util"),
        _lend("event_scores", "dcase_util", "dcase_util.containers"),
        lent=True,
    ),
    Standin(
        "pandas.Series.iteritems",
        "pandas 2.0",
        ("dataio/corpus/base.py:31",),
        "iteritems",
        "the one function that says it, with items",
        ("s3prl.dataio.corpus.base",),
        _call("pandas_names", "lacks_iteritems"),
        _call("pandas_names", "supply_datapoints"),
    ),
    Standin(
        "s3prl.downstream.ctc.corpus",
        "never in s3prl's PyPI package",
        (
            "downstream/ctc/data.py:51",
            "downstream/ctc/data.py:53",
            "downstream/ctc/data.py:55",
            "downstream/ctc/data.py:57",
        ),
        "from .corpus.",
        "the four corpora, written anew",
        ("s3prl.downstream.ctc",),
        _no_corpora,
        _supply_corpora,
    ),
    Standin(
        "SID cache keyed by corpus",
        "never in s3prl",
        ("downstream/voxceleb1/dataset.py:18",),
        "CACHE_PATH",
        "path lists go to EXPDIR/s3prl_cache/voxceleb1",
        ("s3prl.downstream.voxceleb1.dataset",),
        lambda module: hasattr(module, "CACHE_PATH"),
        _call("recipe_caches", "redirect_path_lists"),
    ),
    Standin(
        "ASV cache keyed by corpus",
        "never in s3prl",
        ("downstream/sv_voxceleb1/dataset.py:40",),
        ".wav_lengths",
        "trimmed lengths go to EXPDIR/s3prl_cache/sv_voxceleb1",
        ("s3prl.downstream.sv_voxceleb1.dataset",),
        lambda module: hasattr(module, "SpeakerVerifi_train"),
        _call("recipe_caches", "redirect_lengths"),
    ),
    Standin(
        "SID experiment folder for caches",
        "never in s3prl",
        ("downstream/voxceleb1/expert.py:43",),
        "expdir",
        "the dataset learns where the experiment is",
        ("s3prl.downstream.voxceleb1.expert",),
        lambda module: hasattr(module, "DownstreamExpert"),
        _call("recipe_caches", "remember_expdir"),
    ),
    Standin(
        "ASV experiment folder for caches",
        "never in s3prl",
        ("downstream/sv_voxceleb1/expert.py:55",),
        "expdir",
        "the dataset learns where the experiment is",
        ("s3prl.downstream.sv_voxceleb1.expert",),
        lambda module: hasattr(module, "DownstreamExpert"),
        _call("recipe_caches", "remember_expdir"),
    ),
    Standin(
        "ASV on the device of --device",
        "never in s3prl",
        ("downstream/sv_voxceleb1/expert.py:216", "downstream/sv_voxceleb1/expert.py:223"),
        ".cuda()",
        "the attention mask goes where the features are",
        ("s3prl.downstream.sv_voxceleb1.expert",),
        lambda module: hasattr(module, "DownstreamExpert"),
        _call("devices", "follow_the_features"),
    ),
    Standin(
        "SE and SS on the device of --device",
        "never in s3prl",
        (
            "downstream/enhancement_stft/expert.py:36",
            "downstream/enhancement_stft/loss.py:16",
            "downstream/separation_stft/expert.py:35",
            "downstream/separation_stft/loss.py:16",
        ),
        'torch.device("cuda:0" if',
        "targets and masks go where --device says, not to cuda:0 wherever there is one",
        tuple(f"s3prl.downstream.{name}.expert" for name in _STFT_TASKS),
        lambda module: hasattr(module, "device"),
        _call("devices", "follow_the_argument"),
    ),
    Standin(
        "evaluation with --device cpu beside a GPU",
        "never in s3prl",
        ("downstream/runner.py:448", "downstream/runner.py:493"),
        "torch.cuda.device(",
        "no CUDA context is entered for a device that is not CUDA",
        ("s3prl.downstream.runner",),
        _call("devices", "cuda_device_refuses_cpu"),
        _call("devices", "evaluate_on_cpu"),
    ),
    Standin(
        "--local-rank and LOCAL_RANK",
        "torch 2.0 (its launcher spelt it --local_rank)",
        ("run_downstream.py:29",),
        "--local_rank",
        "the rank in s3prl's spelling, whichever launcher gave it",
        ("s3prl.hub",),
        _call("arguments", "rank_is_unread"),
        _call("arguments", "spell_local_rank"),
    ),
    Standin(
        "relative -k and -g",
        "never in s3prl",
        ("downstream/runner.py:88", "run_downstream.py:129"),
        "args",
        "experiment checkpoints keep the full paths, so that -e works from any folder",
        ("s3prl.downstream.runner",),
        lambda module: hasattr(module, "Runner"),
        _call("arguments", "keep_full_paths"),
    ),
    Standin(
        "the layer of -l by its name",
        "never in s3prl",
        ("upstream/interfaces.py:213",),
        "self.layer_selection",
        "the log names the layer; a number that does not exist is an error that says so",
        ("s3prl.upstream.interfaces",),
        lambda module: hasattr(module, "Featurizer"),
        _call("arguments", "name_the_layer"),
    ),
    Standin(
        "normalisation within the slots of fusion",
        "never in s3prl",
        ("upstream/interfaces.py:238", "nn/upstream.py:226"),
        "layer_norm",
        "fused layers are normalised over their own width; other upstreams as ever",
        ("s3prl.upstream.interfaces", "s3prl.nn.upstream"),
        lambda module: hasattr(module, "Featurizer"),
        _call("arguments", "normalize_in_slots"),
    ),
)
