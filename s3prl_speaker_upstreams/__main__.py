"""``python -m s3prl_speaker_upstreams``: the same as the command ``s3prl-speaker``."""

import sys

from s3prl_speaker_upstreams.cli import main

sys.exit(main())
