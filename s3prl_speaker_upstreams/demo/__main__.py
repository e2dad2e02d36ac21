"""``python -m s3prl_speaker_upstreams.demo``: the speech of the quickstart, and its summary."""

import sys

from s3prl_speaker_upstreams.demo.speech import main

sys.exit(main())
