"""One HTML page about a scored table: what came out, what a threshold would do, and the pictures behind it.

    tables.py → summary.py (counts and bins)  ┐
              → picks.py (the rows to show)   ├→ page.py (template, styles, scripts) → one file
    shards    → pictures.py (thumbnails)      ┘

`job.py` wires them.
"""
