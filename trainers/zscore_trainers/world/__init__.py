"""The rubric world: drawn scenes whose true scores are known, to train and to prove the trainers on.

prompt (scenes.py) → faults → Scene → render.py → a picture; scenes.py → its true scores; raters.py → ratings
shards.py writes all of it as ordinary webdataset shards
"""
