from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scores_factory import blank, random_rows, read_rows, row, without, write_scores
from zscore.records import ScoreRow
from zscore.report.cards import MOST_FAULT, MOST_PROMPT, Album, Picture, draw, make_card
from zscore.report.columns import columns_of
from zscore.report.picks import GROUP_SIZE, Gallery, GroupStats, choose_galleries, group_stats, read_groups
from zscore.report.pictures import Thumbnail, Thumbnails
from zscore.report.summary import Grid, read_numbers
from zscore.tables import ROW, Scores, open_scores

GRID = Grid.over(1, 5)


def opened(folder: Path, rows: list[ScoreRow]) -> Scores:
    return open_scores(str(write_scores(folder / "scores.parquet", rows)))


def galleries(scores: Scores, top: int) -> dict[str, Gallery]:
    columns = columns_of(scores)
    return {made.title: made for made in choose_galleries(scores, columns, read_numbers(scores, columns), top)}


def places(gallery: Gallery) -> list[int]:
    return [made[ROW] for made in gallery.rows]


def naive(rows: list[dict[str, Any]], key: Any, top: int) -> list[int]:
    """Positions of the first rows by key, a picture once."""
    found: dict[str, int] = {}
    scored = [(key(made), at) for at, made in enumerate(rows) if made["status"] == "ok"]
    for _, at in sorted(scored):
        found.setdefault(rows[at]["sha256"], at)
    return list(found.values())[:top]


@pytest.mark.parametrize("seed", range(4))
def test_galleries_are_what_a_sort_gives(tmp_path: Path, seed: int) -> None:
    scores = opened(tmp_path, random_rows(seed, rows=120))
    rows = read_rows(tmp_path / "scores.parquet")
    made = galleries(scores, 10)
    names = scores.dimensions
    assert places(made["Best"]) == naive(rows, lambda r: -r["overall"], 10)
    assert places(made["Worst"]) == naive(rows, lambda r: r["overall"], 10)

    def width(found: dict[str, Any]) -> float:
        return -float(np.mean([found[f"{name}_std"] for name in names]))

    assert places(made["Most uncertain"]) == naive(rows, width, 10)


def test_ties_go_by_the_order_of_the_table(tmp_path: Path) -> None:
    scores = opened(tmp_path, [row(n, means=3) for n in range(9)])
    made = galleries(scores, 3)
    assert (places(made["Best"]), places(made["Worst"])) == ([0, 1, 2], [3, 4, 5])
    assert places(made["Most uncertain"]) == [0, 1, 2]


def test_a_picture_is_shown_once_a_gallery(tmp_path: Path) -> None:
    same = hashlib.sha256(b"same").hexdigest()
    rows = [row(n, means=5, sha256=same) for n in range(5)] + [row(n, means=4 - n / 10) for n in range(5, 12)]
    assert places(galleries(opened(tmp_path, rows), 4)["Best"]) == [0, 5, 6, 7]


@pytest.mark.parametrize("copies", [200, 950, 1000])
def test_however_often_a_picture_occurs_the_gallery_is_full(tmp_path: Path, copies: int) -> None:
    same = hashlib.sha256(b"same").hexdigest()
    rows = [row(n, means=5 - n / 1000, **({"sha256": same} if n < copies else {})) for n in range(1000)]
    scores = opened(tmp_path, rows)
    expected = [0, *range(copies, 1000)][:12]
    assert places(galleries(scores, 12)["Best"]) == expected
    assert "Worst" not in galleries(scores, 12) if copies == 1000 else len(galleries(scores, 12)["Worst"].rows) == 12


@pytest.mark.parametrize("pictures", [2, 3, 14])
def test_no_picture_is_best_and_worst(tmp_path: Path, pictures: int) -> None:
    rows = [
        row(n, means=1 + (n * 37 % 480) / 120, sha256=hashlib.sha256(bytes([n % pictures])).hexdigest())
        for n in range(480)
    ]
    made = galleries(opened(tmp_path, rows), 12)
    best, worst = ({shown["sha256"] for shown in made[title].rows} for title in ("Best", "Worst"))
    assert not best & worst
    assert (len(best), len(worst)) == ((pictures + 1) // 2, pictures // 2)
    assert len(made["Most uncertain"].rows) == min(12, pictures)


def test_pictures_without_a_digest_are_all_different(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", [row(n, means=1 + n / 100, sha256=None) for n in range(300)])
    scores = open_scores(str(path))
    assert places(galleries(scores, 4)["Best"]) == [299, 298, 297, 296]
    assert places(galleries(without(scores, "sha256"), 4)["Best"]) == [299, 298, 297, 296]


def test_few_rows_are_best_or_worst_and_not_both(tmp_path: Path) -> None:
    made = galleries(opened(tmp_path, [row(n, means=1 + n) for n in range(4)]), 12)
    assert (places(made["Best"]), places(made["Worst"])) == ([3, 2], [0, 1])
    assert len(made["Most uncertain"].rows) == 4


def test_a_card_shows_its_row(tmp_path: Path) -> None:
    scores = opened(tmp_path, [row(0, means=[1.5, 4.25, 3, 5], prompt="a cat"), row(1, means=1)])
    (best,) = galleries(scores, 1)["Best"].rows
    card = make_card(best, columns_of(scores), scores.values, None)
    assert (card.place, card.key, card.prompt, card.size, card.fault) == (
        "s-0000.tar, sample 0",
        "k00000",
        "a cat",
        "64 × 48",
        "",
    )
    assert card.score == pytest.approx(3.4375)
    assert [(mark.name, mark.mean) for mark in card.marks] == [
        ("alignment", 1.5),
        ("realism", 4.25),
        ("aesthetics", 3.0),
        ("plausibility", 5.0),
    ]
    assert card.marks[0].drawing is not None
    assert card.marks[0].drawing.label == "1.5: 100%"
    assert card.width == pytest.approx(0.25 / 4, abs=1e-3)


def test_a_card_says_that_its_picture_is_missing(tmp_path: Path) -> None:
    scores = opened(tmp_path, [row(0)])
    (best,) = galleries(scores, 1)["Best"].rows
    columns = columns_of(scores)
    unread = make_card(best, columns, scores.values, Album(Thumbnails({("s-0000.tar", 0): "broken" * 99}, [])))
    assert unread.picture is None
    assert unread.fault.startswith("brokenbroken")
    assert len(unread.fault) == MOST_FAULT
    assert make_card(best, columns, scores.values, Album(Thumbnails())).fault == "the picture couldn't be read"


@pytest.mark.parametrize(
    ("changes", "place"),
    [({"index": None}, "s-0000.tar"), ({"shard": None}, "sample 0"), ({"shard": None, "index": None}, "")],
)
def test_a_card_of_a_row_that_names_no_sample(tmp_path: Path, changes: dict[str, Any], place: str) -> None:
    scores = opened(tmp_path, [row(0)])
    (best,) = galleries(scores, 1)["Best"].rows
    card = make_card({**best, **changes}, columns_of(scores), scores.values, Album(Thumbnails()))
    assert (card.place, card.picture, card.fault) == (place, None, "the row doesn't say which sample it is")
    assert make_card({**best, **changes}, columns_of(scores), scores.values, None).fault == ""


def test_an_album_holds_the_bytes_of_a_picture_once() -> None:
    red, blue = Thumbnail("data:red", 4, 3), Thumbnail("data:blue", 4, 3)
    album = Album(Thumbnails({("a", 0): red, ("a", 1): blue, ("b", 7): Thumbnail("data:red", 4, 3)}))
    taken = [album.take({"shard": shard, "index": n}) for shard, n in (("a", 0), ("a", 1), ("a", 0), ("b", 7))]
    assert all(isinstance(one, Picture) for one in taken)
    assert [(one.number, one.is_first) for one in taken if isinstance(one, Picture)] == [
        (1, True),
        (2, True),
        (1, False),
        (1, False),
    ]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    scores = opened(tmp_path, [row(0, prompt="p" * 100_000, key="k" * 1000)])
    (best,) = galleries(scores, 1)["Best"].rows
    card = make_card(best, columns_of(scores), scores.values, None)
    assert len(card.prompt) == MOST_PROMPT
    assert len(card.key) < 200


def test_bars_are_as_high_as_their_share() -> None:
    drawn = draw([0.5, 0.25, 0.0, 0.25], [1, 2, 3, 4], 2.0)
    assert drawn.bars == "M1 24v-24h8v24zM11 24v-12h8v12zM31 24v-12h8v12z"
    assert drawn.mean == "M15.0 0v24"
    assert drawn.width == 40
    assert drawn.label == "1: 50%, 2: 25%, 4: 25%"


def test_the_line_stands_between_levels_of_any_distance() -> None:
    assert draw([0.5, 0.0, 0.5], [1, 2, 4], 3.0).mean == "M20.0 0v24"


@pytest.mark.parametrize("probs", [[math.nan, 1.0], [None, 1.0], [0.0, 0.0]])
def test_distributions_that_are_none_are_drawn_as_nothing(probs: list[Any]) -> None:
    drawn = draw(probs, [1, 2], math.nan)
    assert "nan" not in drawn.bars + drawn.mean + drawn.label
    assert drawn.mean == ""


def test_without_levels_bars_are_numbered() -> None:
    drawn = draw([0.25, 0.75], [], 1.75)
    assert (drawn.label, drawn.mean) == ("1: 25%, 2: 75%", "")


def stats_of(scores: Scores, count: int = 3) -> GroupStats:
    found = group_stats(scores, columns_of(scores), GRID, count)
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(4))
def test_group_statistics_are_those_of_a_loop(tmp_path: Path, seed: int) -> None:
    scores = opened(tmp_path, random_rows(seed, rows=150, groups=60))
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for made in read_rows(tmp_path / "scores.parquet"):
        if made["status"] == "ok":
            groups[made["group"]].append(made)
    found = stats_of(scores)
    several = {name: [float(r["overall"]) for r in rows] for name, rows in groups.items() if len(rows) > 1}
    assert (found.groups, found.several) == (len(groups), len(several))
    sizes = sorted(map(len, several.values()))
    assert found.sizes == (sizes[0], int(np.median(sizes)), sizes[-1])
    assert found.mean == pytest.approx(np.mean([np.mean(values) for values in several.values()]))
    assert found.best == pytest.approx(np.mean([max(values) for values in several.values()]))
    widest = sorted(several, key=lambda name: (min(several[name]) - max(several[name]), name))
    assert found.chosen == widest[:3]
    for s, name in enumerate(("overall", *scores.dimensions)):
        best = np.asarray([max(r[name] for r in rows) for rows in groups.values()], np.float32)
        for i in (0, 30, 50):
            assert sum(found.covered[s][i + 1 :]) == (best >= np.float32(GRID.stops[i])).sum()


def test_candidates_come_best_first(tmp_path: Path) -> None:
    means = [2, 4, 3, 4, 1]
    scores = opened(tmp_path, [row(n, means=mean, group="g", prompt="one") for n, mean in enumerate(means)])
    (group,) = read_groups(scores, columns_of(scores), ["g"])
    assert [made[ROW] for made in group.rows] == [1, 3, 2, 0, 4]
    assert (group.size, group.prompt, group.gain) == (5, "one", pytest.approx(4 - 2.8))


def test_of_large_groups_both_ends_are_shown(tmp_path: Path) -> None:
    scores = opened(tmp_path, [row(n, means=1 + n / 10, group="g") for n in range(20)])
    (group,) = read_groups(scores, columns_of(scores), ["g"])
    assert [made[ROW] for made in group.rows] == [19, 18, 17, 16, 3, 2, 1, 0]
    assert (group.size, len(group.rows)) == (20, GROUP_SIZE)


def test_groups_across_shards_belong_together(tmp_path: Path) -> None:
    rows = [row(n, shard=f"{n}.tar", index=0, means=1 + n, group=f"g{n % 2}") for n in range(4)]
    made = read_groups(scores := opened(tmp_path, rows), columns_of(scores), ["g1", "g0"])
    assert [(group.name, [r["shard"] for r in group.rows]) for group in made] == [
        ("g1", ["3.tar", "1.tar"]),
        ("g0", ["2.tar", "0.tar"]),
    ]


def test_groups_of_one_are_counted_and_not_chosen(tmp_path: Path) -> None:
    found = stats_of(opened(tmp_path, [row(n, group=f"g{n}") for n in range(3)]))
    assert (found.groups, found.several, found.sizes, found.chosen) == (3, 0, (0, 0, 0), [])


def test_failed_candidates_count_for_nothing(tmp_path: Path) -> None:
    rows = [row(0, group="g", means=2), row(1, group="g", status="bad_image"), row(2, group="h", status="bad_image")]
    found = stats_of(opened(tmp_path, rows))
    assert (found.groups, found.several) == (1, 0)


def test_a_row_without_a_group_is_in_none(tmp_path: Path) -> None:
    rows = [row(n, means=1 + n / 2, group=f"g{n // 3}") for n in range(6)]
    path = blank(write_scores(tmp_path / "s.parquet", rows), "group", [0, 5])
    scores = open_scores(str(path))
    found = stats_of(scores)
    assert (found.groups, found.several, found.sizes) == (2, 2, (2, 2, 2))
    assert [sum(bins) for bins in found.covered] == [2] * 5
    made = read_groups(scores, columns_of(scores), found.chosen)
    assert [(group.name, [r[ROW] for r in group.rows]) for group in made] == [("g0", [2, 1]), ("g1", [4, 3])]


def test_where_no_row_has_a_group_there_are_none(tmp_path: Path) -> None:
    path = blank(write_scores(tmp_path / "s.parquet", [row(n) for n in range(3)]), "group", range(3))
    scores = open_scores(str(path))
    assert group_stats(scores, columns_of(scores), GRID, 3) is None


def test_no_group_column_means_no_groups(tmp_path: Path) -> None:
    full = opened(tmp_path, [row(0)])
    scores = without(full, "group")
    assert group_stats(scores, columns_of(scores), GRID, 3) is None
    assert read_groups(scores, columns_of(scores), []) == []
