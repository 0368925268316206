"""The rubric world: drawn scenes whose true scores are known, to train and to prove the trainers on.

prompt (scenes.py) → faults → Scene → render.py → a picture; scenes.py → its true scores; raters.py → ratings
judge.py gives the true scores of a picture from the parameters that draw it
shards.py writes all of it as ordinary webdataset shards
"""
