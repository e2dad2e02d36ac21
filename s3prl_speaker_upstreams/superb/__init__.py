"""SUPERB with s3prl's own runner: what stands behind ``recipes/superb``.

``python -m s3prl_speaker_upstreams.superb --help`` is the command line. Nothing here takes part in training or
evaluation, which are ``python -m s3prl.run_downstream`` in processes of their own. This package checks corpora
(:mod:`.checks`), writes what lies beside them (:mod:`.prepare`), starts and resumes the runs (:mod:`.stages`), scores
SD and QbE (:mod:`.scoring`), collects tables (:mod:`.collect`), and makes small corpora (:mod:`.corpora`,
:mod:`.voxceleb`, :mod:`.espeak`).
"""
