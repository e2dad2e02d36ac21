"""The table itself: true about s3prl, complete in what it says, in place only where something is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from s3prl_speaker_upstreams import compat
from s3prl_speaker_upstreams.compat import standins
from s3prl_speaker_upstreams.compat.standins import STANDINS

pytestmark = pytest.mark.compat

# What s3prl 0.4.18 lacks or says on every stack, so that no stack is without it:
# numpy < 1.24 and huggingface_hub < 0.11 cannot be installed beside any supported torch, and the rest is s3prl itself.
EVERYWHERE = {
    "HfApi.login",
    "HfApi.create_repo(name=)",
    "snapshot_download(repo, revision, use_auth_token=)",
    "numpy.int",
    "numpy.complex",
    "SID cache keyed by corpus",
    "ASV cache keyed by corpus",
    "SID experiment folder for caches",
    "ASV experiment folder for caches",
    "ASV on the device of --device",
    "evaluation with --device cpu beside a GPU",
    "pandas.Series.iteritems",
    "relative -k and -g",
    "the layer of -l by its name",
    "normalisation within the slots of fusion",
}
# what depends on packages or package data that an installation may or may not have
ENVIRONMENT = {
    "catalyst.data.sampler.DistributedSamplerWrapper",
    "sox.Transformer",
    "sed_eval",
    "dcase_util",
    "torchaudio beside a later torch",
    "--local-rank and LOCAL_RANK",
    "s3prl.downstream.ctc.corpus",
    "SE and SS on the device of --device",  # needs asteroid to be imported at all
}
REMOVED = {entry.name for entry in STANDINS} - EVERYWHERE - ENVIRONMENT


def run(code: str, **environment: str) -> str:
    """Last line that a fresh Python writes; our start-up hook is off, so that `code` decides."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "S3PRL_SPEAKER_UPSTREAMS": "0", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def s3prl_folder() -> Path:
    return Path(importlib.util.find_spec("s3prl").origin).parent


@pytest.mark.parametrize("entry", STANDINS, ids=lambda entry: entry.name)
def test_entry_names_lines_that_are_there(entry):
    assert entry.used_by and entry.supplies and entry.removed_in and entry.modules
    for place in entry.used_by:
        name, _, number = place.rpartition(":")
        lines = (s3prl_folder() / name).read_text().splitlines()
        assert entry.token in lines[int(number) - 1], place


def test_names_are_unique():
    assert len({entry.name for entry in STANDINS}) == len(STANDINS)
    assert EVERYWHERE | ENVIRONMENT <= {entry.name for entry in STANDINS}


def test_whole_packages_are_left_alone():
    """Each check on an object that has everything says that nothing is missing."""
    everything = types.SimpleNamespace(set_audio_backend=1, load=1, save=1, info=1, HfFolder=1, Repository=1)
    for entry in STANDINS:
        if entry.modules in (("torchaudio",), ("huggingface_hub",)) and entry.name != "torchaudio.sox_effects":
            assert not entry.missing(everything), entry.name

    class HfApi:
        login = print

        def create_repo(self, token=None, name=None, organization=None, exist_ok=False, private=False): ...

    runner = types.SimpleNamespace(HfApi=HfApi)
    missing = {entry.name: entry.missing for entry in STANDINS}
    assert not missing["HfApi.login"](runner)
    assert not missing["HfApi.create_repo(name=)"](runner)
    assert not missing["numpy.int"](types.SimpleNamespace(np=types.SimpleNamespace(int=int)))
    assert not missing["SID cache keyed by corpus"](types.SimpleNamespace())


PATCHED = """
    import json
    import huggingface_hub, numpy, torch, torchaudio
    names = ("load", "save", "info", "set_audio_backend", "sox_effects")
    def look():
        found = {"torchaudio." + name: id(getattr(torchaudio, name, None)) for name in names}
        for name in ("apply_effects_file", "apply_effects_tensor"):
            found[name] = id(getattr(getattr(torchaudio, "sox_effects", None), name, None))
        found["torch.load"] = id(torch.load)
        for name in ("HfFolder", "Repository", "snapshot_download"):
            found[name] = id(getattr(huggingface_hub, name, None))
        found["numpy"] = [hasattr(numpy, "int"), hasattr(numpy, "complex")]
        return found
    before = look()
    from s3prl_speaker_upstreams import compat
    compat.install()
    report = compat.report(probe=True)
    after = look()
    changed = [name for name in before if before[name] != after[name]]
    print(json.dumps([changed, [entry.name for entry in report if entry.active]]))
"""


@pytest.fixture(scope="module")
def patched():
    """(names of package attributes that changed, stand-ins in place) after everything was imported."""
    return json.loads(run(PATCHED))


def test_only_what_is_missing_is_put_in_place(patched):
    """The groups above; on the legacy stack (torch 2.5, libsox, huggingface_hub < 1) no package is touched."""
    changed, active = patched
    assert set(active) >= EVERYWHERE
    import huggingface_hub
    import torchaudio

    if not hasattr(torchaudio, "list_audio_backends") or not hasattr(huggingface_hub, "Repository"):
        assert changed and set(active) & REMOVED
    elif standins._no_sox(torchaudio):
        pytest.skip("this torchaudio finds no libsox.so to open (apt-get install libsox-dev libsox-fmt-base)")
    else:
        assert changed == [] and not set(active) & REMOVED


def test_complete_on_the_current_stack(patched):
    import torchaudio

    if hasattr(torchaudio, "list_audio_backends"):
        pytest.skip(f"torchaudio {torchaudio.__version__} still has what newer ones removed")
    if importlib.util.find_spec("torchcodec"):
        pytest.skip("torchcodec is installed, so reading and writing are torchaudio's own")
    changed, active = patched
    assert set(active) >= REMOVED
    assert "numpy" not in changed and "snapshot_download" not in changed


def test_missing_libsox_is_seen():
    """A torchaudio with sox_effects but no libsox to open gets the stand-in's functions in its own module."""
    import torchaudio

    if not hasattr(torchaudio, "list_audio_backends"):
        pytest.skip(f"torchaudio {torchaudio.__version__} has no sox_effects at all")
    code = """
        import torch
        from s3prl_speaker_upstreams import compat
        load = torch.ops.load_library
        def no_sox(path):
            if "sox" in str(path):
                raise OSError("libsox.so: cannot open shared object file: No such file or directory")
            return load(path)
        torch.ops.load_library = no_sox
        compat.install()
        import torchaudio
        from torchaudio.sox_effects import apply_effects_tensor
        wav, rate = apply_effects_tensor(torch.ones(2, 80) / 2, 16000, [["channels", "1"], ["gain", "-3.0"]])
        print(apply_effects_tensor.__module__, tuple(wav.shape))
    """
    assert run(code) == "s3prl_speaker_upstreams.compat.sox_effects (1, 80)"


def test_switched_off_nothing_happens():
    code = """
        import sys
        from s3prl_speaker_upstreams import compat
        before = list(sys.meta_path)
        compat.install()
        print(sys.meta_path == before, any(entry.active for entry in compat.report()))
    """
    for value in ("0", "off", "False", "no"):
        assert run(code, S3PRL_SPEAKER_UPSTREAMS_COMPAT=value) == "True False"


def test_install_is_light_and_idempotent():
    code = """
        import sys, time
        from s3prl_speaker_upstreams import compat
        heavy = set(sys.modules)
        start = time.perf_counter()
        compat.install(); compat.install(); compat.install()
        took = time.perf_counter() - start
        loaded = {name.partition(".")[0] for name in set(sys.modules) - heavy}
        loaded &= {"torch", "torchaudio", "numpy", "s3prl", "huggingface_hub", "soundfile", "soxr"}
        finders = sum(type(finder).__name__ == "PostImportFinder" for finder in sys.meta_path)
        print(sorted(loaded), finders, took < 0.1)
    """
    assert run(code) == "[] 1 True"


def test_packages_imported_before_are_served_too():
    code = """
        import huggingface_hub, torchaudio
        from s3prl_speaker_upstreams import compat
        compat.install()
        from torchaudio.sox_effects import apply_effects_file
        torchaudio.set_audio_backend("sox_io")
        print(hasattr(huggingface_hub, "Repository"), callable(apply_effects_file), hasattr(torchaudio, "info"))
    """
    assert run(code) == "True True True"


def test_lent_packages_are_not_left_behind():
    pytest.importorskip("tensorboardX")
    code = """
        import importlib.util
        from s3prl_speaker_upstreams import compat
        present = importlib.util.find_spec("catalyst") is not None
        compat.install()
        import s3prl.downstream.speech_commands.expert as expert
        state = {entry.name: entry.active for entry in compat.report()}
        print(
            state["catalyst.data.sampler.DistributedSamplerWrapper"] is not present,
            (importlib.util.find_spec("catalyst") is not None) == present,
            expert.DistributedSamplerWrapper.__name__,
        )
    """
    assert run(code) == "True True DistributedSamplerWrapper"


@pytest.mark.e2e
def test_metadata_in_joblib_children(tmp_path):
    """s3prl.util.audio_info asks torchaudio in child processes that never import s3prl."""
    import numpy as np
    import soundfile

    for name in "ab":
        soundfile.write(tmp_path / f"{name}.flac", np.zeros(1234), 16000)
    code = f"""
        from s3prl_speaker_upstreams import compat
        compat.install()
        from s3prl.util.audio_info import get_audio_info
        paths = [r"{tmp_path}/a.flac", r"{tmp_path}/b.flac"]
        infos = get_audio_info(paths, ["a", "b"], cache_dir=r"{tmp_path}", num_workers=2)
        print([info["num_frames"] for info in infos], infos[0]["encoding"])
    """
    assert run(code) == "[1234, 1234] FLAC"


def test_report_says_where():
    lines = compat.report()
    assert [line.name for line in lines] == [entry.name for entry in STANDINS]
    assert all(
        place.startswith("s3prl/") and place.rpartition(":")[2].isdigit() for line in lines for place in line.used_by
    )


def test_a_checkouts_own_corpora_are_used():
    checkout = Path(os.environ.get("S3PRL_CHECKOUT") or Path(__file__).resolve().parents[3] / "peers" / "s3prl")
    if not (checkout / "s3prl" / "downstream" / "ctc" / "corpus").is_dir():
        pytest.skip(f"no checkout of s3prl: {checkout} does not exist (set S3PRL_CHECKOUT)")
    code = """
        from s3prl_speaker_upstreams import compat
        compat.install()
        from s3prl.downstream.ctc.corpus.snips import SnipsDataset
        active = {entry.name: entry.active for entry in compat.report()}
        print(SnipsDataset.__module__, active["s3prl.downstream.ctc.corpus"])
    """
    assert run(code, PYTHONPATH=str(checkout)) == "s3prl.downstream.ctc.corpus.snips False"


def test_the_page_names_every_standin():
    page = (Path(compat.__file__).parent / "README.md").read_text()
    for standin in STANDINS:
        assert f"| `{standin.name}` | {standin.removed_in} |" in page and standin.supplies in page, standin.name
