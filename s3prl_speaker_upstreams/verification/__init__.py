"""Speaker verification of any encoder: trials, scores, EER and minDCF with intervals, and their pictures."""
