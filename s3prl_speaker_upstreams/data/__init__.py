"""Speech to train on: lists and folders, manifests, crops, augmentation and the loader."""
