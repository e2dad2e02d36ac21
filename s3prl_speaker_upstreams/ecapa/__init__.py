"""The ECAPA-TDNN family: one front-end and one model whose differences are named configuration fields."""
