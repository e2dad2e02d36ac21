"""The floor: files that appear whole, digests, provenance, hints, configuration and audio, for every other part."""
