"""``s3prl.downstream.ctc.corpus`` for the PyPI package of s3prl, which was built without that folder.

Written from what ``s3prl/downstream/ctc/{data,text,expert}.py`` call and from the corpora's layouts; same class names,
same order of utterances, so that runs agree with those of a checkout.
"""
