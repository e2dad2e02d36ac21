"""Registration without touching s3prl: in fresh processes, workers, a checkout; switched off; half removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.compat

PACKAGE = Path(__file__).resolve().parents[2] / "s3prl_speaker_upstreams"
SITE = Path(sysconfig.get_paths()["purelib"])
PTH = SITE / "s3prl_speaker_upstreams.pth"


def run(*arguments: str, cwd=None, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=cwd, timeout=300)


def succeed(*arguments: str, **kwargs) -> str:
    done = run(*arguments, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_start_up_file_is_installed():
    assert PTH.is_file(), "install the project (pip install -e .) to test it"


def test_fresh_process_has_the_entries():
    out = succeed(
        "-c",
        "import sys, s3prl.hub as hub\n"
        "from s3prl.nn import S3PRLUpstream\n"
        "names = {f'ecapa_{kind}{end}' for kind in ('tdnn', 'dino') for end in ('', '_local', '_url')}\n"
        "assert names <= set(dir(hub)), 'dir'\n"
        "assert names <= set(hub.options()), 'options'\n"
        "assert names <= set(S3PRLUpstream.available_names()), 'available_names'\n"
        "short = set(hub.options(only_registered_ckpt=True))\n"
        "assert 'ecapa_tdnn' in short and 'ecapa_tdnn_local' not in short\n"
        "assert hub.__loader__ is hub.__spec__.loader\n"
        "print(type(hub.__loader__).__name__, hub.fbank.__name__)",
    )
    assert out.split()[-2:] == ["SourceFileLoader", "fbank"]


def test_help_of_the_stock_runner_lists_the_entries():
    out = succeed("-m", "s3prl.run_downstream", "-h")
    assert "'ecapa_dino'" in out and "'fbank'" in out


def test_checkout_of_s3prl(tmp_path):
    """``cd s3prl/s3prl && python run_downstream.py``: another s3prl than the installed one, run as a script."""
    import s3prl

    shutil.copytree(Path(s3prl.__file__).parent, tmp_path / "s3prl", ignore=shutil.ignore_patterns("__pycache__"))
    out = succeed("run_downstream.py", "-h", cwd=tmp_path / "s3prl", PYTHONPATH=str(tmp_path))
    assert "'ecapa_dino'" in out
    where = succeed("-c", "import s3prl.hub as h; print(h.__file__)", cwd=tmp_path / "s3prl", PYTHONPATH=str(tmp_path))
    assert where.strip().startswith(str(tmp_path))


def test_spawned_worker(tmp_path):
    """A DataLoader worker started by ``spawn`` inherits nothing, and has the entries all the same."""
    script = tmp_path / "script.py"
    script.write_text(
        "from torch.utils.data import DataLoader, Dataset\n"
        "class Names(Dataset):\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, i):\n"
        "        import sys\n"
        "        assert i or 's3prl' not in sys.modules\n"
        "        import s3prl.hub\n"
        "        return int(hasattr(s3prl.hub, 'ecapa_dino'))\n"
        "if __name__ == '__main__':\n"
        "    loader = DataLoader(Names(), num_workers=1, batch_size=1, multiprocessing_context='spawn')\n"
        "    print(sum(int(x) for x in loader))\n"
    )
    assert succeed(str(script)).split()[-1] == "2"


def test_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "import s3prl.hub as hub\n"
        "open(os.path.join(os.environ['OUT'], os.environ['RANK']), 'w').write(str(hasattr(hub, 'ecapa_dino')))\n"
    )
    succeed("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), OUT=str(tmp_path))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]


@pytest.mark.parametrize("value", ["0", "off", "No"])
def test_switch(value):
    out = succeed("-c", "import sys; print([type(f).__name__ for f in sys.meta_path])", S3PRL_SPEAKER_UPSTREAMS=value)
    assert "S3prlFinder" not in out


def test_explicit_registration_with_the_switch_off():
    code = (
        "import s3prl_speaker_upstreams as ours\n"
        "names = ours.register()\n"
        "import s3prl.hub as hub\n"
        "assert names == ours.register() and 'ecapa_dino' in names and 'ecapa_dino' in hub.options()\n"
    )
    succeed("-c", code, S3PRL_SPEAKER_UPSTREAMS="0")
    out = succeed("-m", "s3prl_speaker_upstreams.run_downstream", "-h", S3PRL_SPEAKER_UPSTREAMS="0")
    assert "'ecapa_dino'" in out


def test_an_entry_of_s3prl_is_never_overwritten(tmp_path):
    """A later s3prl that has its own ``ecapa_dino`` keeps it, and the user is told."""
    package = tmp_path / "s3prl"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "hub.py").write_text("def ecapa_dino():\n    return 'of s3prl'\n")
    code = "import s3prl.hub as hub; print(hub.ecapa_dino(), hub.ecapa_tdnn.__name__)"
    done = run("-c", code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "of s3prl ecapa_tdnn"
    assert "already has an entry 'ecapa_dino'" in done.stderr


def copy_of_package(site: Path) -> Path:
    copy = site / "s3prl_speaker_upstreams"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


LINE = (PACKAGE / "s3prl_speaker_upstreams.pth").read_text()


def run_line(site: Path, code: str) -> subprocess.CompletedProcess:
    """Run the start-up line and then ``code`` with ``site`` as the only place where our package can be."""
    script = site / "with_line.py"
    elsewhere = f"sys.path[:] = [p for p in sys.path if p != {str(PACKAGE.parent)!r}] + [{str(SITE)!r}]"
    script.write_text(f"import sys\n{elsewhere}\n{LINE}\n{code}\n")
    return run("-S", str(script), PYTHONPATH=str(site))


def remove_start_up(package: Path) -> None:
    (package / "_startup.py").unlink()


def remove_init(package: Path) -> None:
    (package / "__init__.py").unlink()


def remove_all(package: Path) -> None:
    shutil.rmtree(package)


def leave_empty_folder(package: Path) -> None:
    shutil.rmtree(package)
    package.mkdir()


@pytest.mark.parametrize("damage", [remove_start_up, remove_init, remove_all, leave_empty_folder])
def test_half_removed_package_is_silent_at_start(tmp_path, damage):
    damage(copy_of_package(tmp_path))
    done = run_line(tmp_path, "print('ok')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("gone", ["registration.py", "hubconf.py", "compat"])
def test_half_removed_package_leaves_s3prl_alone(tmp_path, gone):
    """Modules missing behind an intact start-up file: a (stand-in) s3prl imports without a word."""
    package = copy_of_package(tmp_path)
    target = package / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    (tmp_path / "s3prl").mkdir()
    (tmp_path / "s3prl" / "__init__.py").write_text("")
    (tmp_path / "s3prl" / "hub.py").write_text("x = 1\n")
    done = run_line(tmp_path, "import s3prl.hub; print(s3prl.hub.x)")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_wheel_has_the_start_up_file_and_uninstall_removes_it(tmp_path):
    """Built as pip does, unpacked by pip into a folder: the file is there and in RECORD, which pip uninstalls by."""
    root = PACKAGE.parent
    build = tmp_path / "source"
    build.mkdir()
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, build / name)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("s3prl_speaker_upstreams", "cka_addon"):
        shutil.copytree(root / name, build / name, ignore=ignore)
    succeed("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(build))
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "venv"
    succeed("-m", "venv", "--without-pip", str(target))
    python = str(target / "bin" / "python")
    succeed("-m", "pip", "--python", python, "install", "-q", "--no-deps", str(wheel))
    probe = [python, "-c", "import sys; print([type(f).__name__ for f in sys.meta_path])"]
    assert "S3prlFinder" in subprocess.run(probe, capture_output=True, text=True).stdout
    succeed("-m", "pip", "--python", python, "uninstall", "-q", "-y", "s3prl-speaker-upstreams")
    assert not [path.name for path in target.rglob("*") if "s3prl" in path.name]
    gone = subprocess.run(probe, capture_output=True, text=True)
    assert "S3prlFinder" not in gone.stdout and gone.stderr == ""


def test_start_up_cost(tmp_path):
    """The start-up line adds at most 2 ms to ``python -c pass``: processor time in fresh processes, fastest of many."""
    copy_of_package(tmp_path)
    script = tmp_path / "timed.py"
    # site has imported os and sys by the time it reads start-up files
    script.write_text(
        f"import os, sys, time\nbegin = time.process_time()\n{LINE}\nprint(time.process_time() - begin)\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPATH"] = str(tmp_path)

    def seconds() -> float:
        done = subprocess.run([sys.executable, "-S", str(script)], check=True, env=env, capture_output=True, text=True)
        return float(done.stdout)

    seconds()  # writes the bytecode that an installation has
    assert min(seconds() for _ in range(20)) < 0.002
