"""Demonstration corpora: generated voices, eSpeak NG, VoxCeleb1's layout of any speech, and speech of the quickstart.

``python -m s3prl_speaker_upstreams.demo --help`` is the quickstart's command (:mod:`.speech`);
``python -m s3prl_speaker_upstreams.demo.corpora --help`` writes a small corpus in the layout of one SUPERB task.
"""
