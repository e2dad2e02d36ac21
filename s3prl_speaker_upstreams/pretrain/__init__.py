"""Training speaker models: objectives, presets, a run that goes on after any stop, and what comes out of it."""
