"""Files appear whole or not at all; a lock keeps a second process out and goes with the first."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import pytest

from s3prl_speaker_upstreams.common.config import add_arguments, build, option, values_of
from s3prl_speaker_upstreams.common.files import locked, write_text, write_whole
from s3prl_speaker_upstreams.errors import Busy, ConfigError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")

    def half(beside):
        beside.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_modes_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "plain").write_text("")
    whole = write_text(tmp_path / "whole", "")
    assert whole.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_lock_goes_with_the_process_that_held_it(tmp_path):
    code = (
        "import sys, time\nfrom s3prl_speaker_upstreams.common.files import locked\n"
        "with locked(sys.argv[1], 'it'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "l")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Busy), locked(tmp_path / "l", "it"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    start = time.monotonic()
    with locked(tmp_path / "l", "it", timeout=10):
        assert time.monotonic() - start < 5


@dataclass
class Options:
    mode: Literal["full", "minibatch"] = option("full", help="estimator")
    share: float | None = option(None, help="5% of it")
    sizes: list[int] = option([1, 2], help="sizes")
    progress: bool = option(True, help="bars")
    hidden: int = 3


def test_options_come_from_the_dataclass():
    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    assert "(default: full)" in parser.format_help() and "hidden" not in parser.format_help()
    assert build(Options, values_of(parser.parse_args([]), Options)) == Options()
    words = ["--share", "1e-3", "--sizes", "3", "4", "--no-progress", "--mode", "minibatch"]
    found = build(Options, values_of(parser.parse_args(words), Options))
    assert found == Options(mode="minibatch", share=1e-3, sizes=[3, 4], progress=False)
    with pytest.raises(ConfigError, match=r"sizes\[0\]"):
        build(Options, values_of(parser.parse_args(["--sizes", "many"]), Options))
