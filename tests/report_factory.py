"""Tables that try to break a page: markup in every text, and names that no rubric would give."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.scores_factory import metadata_in, random_rows, row, write_scores
from tests.tiny import png, write_shards, write_tar
from zscore.records import ScoreRow

HOSTILE = (
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1">',
    '"><svg onload=window.pwned=1>',
    "' onmouseover='window.pwned=1' x='",
    "</title></style></textarea></details></pre><script>window.pwned=1</script>",
    "<!--<script>window.pwned=1</script>-->",
    "]]><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "{{ 7 * 191 }}{% raw %}",
    "line\u2028paragraph\u2029separators",
    "&lt;b&gt; stays as it is &amp; is not bold",
    "\u202eright to left\u202c and a bell \x07",
    '<a href="javascript:window.pwned=1" autofocus onfocus="window.pwned=1">x</a>',
    "<meta http-equiv=refresh content='0;url=https://example.com'><base href=https://example.com>",
    "<link rel=stylesheet href=https://example.com/x.css><style>*{display:none}</style>",
)


def hostile_rows() -> list[ScoreRow]:
    """A row for every text, in each column that holds text."""
    rows = []
    for n, text in enumerate(HOSTILE):
        words = {"prompt": text, "key": text, "shard": text, "group": text}
        rows += [row(2 * n, means=1 + n / 4, **words), row(2 * n + 1, means=1 + n / 5, **words)]
    rows.append(row(99, status="bad_image", error=HOSTILE[0], shard=HOSTILE[1], prompt=HOSTILE[2]))
    return rows


def write_hostile(path: Path) -> Path:
    """Hostile rows, metadata, status and names of dimensions."""
    write_scores(
        path,
        hostile_rows(),
        model={"id": HOSTILE[0], "weights": HOSTILE[1], "trained": HOSTILE[2]},
        engine={"name": HOSTILE[0], "version": HOSTILE[3], "dtype": HOSTILE[4]},
        layout=HOSTILE[1],
        template=HOSTILE[0],
        created=HOSTILE[0],
        finished=HOSTILE[2],
        options={HOSTILE[0]: HOSTILE[1]},
        derived=[{"command": HOSTILE[0], "criteria": {HOSTILE[1]: HOSTILE[2]}, "counts": {}}],
    )
    table, metadata = pq.read_table(path), metadata_in(path)
    renamed = {"alignment": HOSTILE[0], "realism": HOSTILE[4]}
    names = [
        next((new + name[len(old) :] for old, new in renamed.items() if name.startswith(old)), name)
        for name in table.column_names
    ]
    dimensions = [renamed.get(name, name) for name in metadata["rubric"]["dimensions"]]
    metadata["rubric"] |= {"dimensions": dimensions, "name": HOSTILE[1], "source": "\n".join(HOSTILE)}
    status = [HOSTILE[2] if value == "bad_image" else value for value in table["status"].to_pylist()]
    table = table.rename_columns(names).set_column(table.column_names.index("status"), "status", pa.array(status))
    pq.write_table(table.replace_schema_metadata({b"zscore": json.dumps(metadata).encode()}), path)
    return path


def write_noise(folder: Path, pictures: int) -> tuple[Path, Path]:
    """A table of pictures that no codec makes small, and their shard."""
    members, rows = [], []
    for n in range(pictures):
        buffer = io.BytesIO()
        values = np.random.default_rng(n).integers(0, 256, (320, 320, 3), np.uint8)
        Image.fromarray(values).save(buffer, "PNG", compress_level=0)
        data = buffer.getvalue()
        members += [(f"k{n:05d}.png", data), (f"k{n:05d}.txt", b"p")]
        digest = hashlib.sha256(data).hexdigest()
        rows.append(row(n, shard="n.tar", means=1 + 4 * n / pictures, group=f"g{n // 8}", sha256=digest))
    write_tar(folder / "noise" / "n.tar", members)
    return write_scores(folder / "noise.parquet", rows), folder / "noise"


def write_with_pictures(folder: Path, samples: int = 12) -> tuple[Path, Path]:
    """A table of two shards, and the shards."""
    write_shards(folder / "shards", 2, samples)
    rows: list[ScoreRow] = []
    for made in random_rows(5, rows=2 * samples, groups=5, failed=0):
        shard, index = divmod(len(rows), samples)
        number = len(rows)
        fields: dict[str, Any] = {
            "shard": f"t-{shard:04d}.tar",
            "key": f"s{number:04d}",
            "prompt": f"prompt {number}",
            "group": made.group,
            "sha256": hashlib.sha256(png(number)).hexdigest(),
        }
        assert made.scores is not None
        rows.append(row(index, probs=made.scores.probs_DK, **fields))
    return write_scores(folder / "scores.parquet", rows), folder / "shards"
