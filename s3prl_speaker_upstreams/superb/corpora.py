"""``python -m s3prl_speaker_upstreams.superb.corpora``: the former name of ``s3prl_speaker_upstreams.demo.corpora``."""

from __future__ import annotations

from s3prl_speaker_upstreams.demo.corpora import GENERATORS, SPEECH, generate, lay_out_speech, main

__all__ = ["GENERATORS", "SPEECH", "generate", "lay_out_speech", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
