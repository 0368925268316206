from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zscore.errors import ShardNotFoundError, TableError
from zscore.records import ShardRef
from zscore.report.pictures import EDGE, MOST_BYTES, STEPS, Thumbnail, Thumbnails, read_thumbnails, sample_of
from zscore.samples import read_samples
from zscore.shards import expand


def picture(colour: str = "red", size: tuple[int, int] = (64, 48), form: str = "PNG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form, **more)
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, members: list[tuple[str, bytes]], links: dict[str, str] | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if links and name in links:
                info.type, info.linkname = tarfile.SYMTYPE, links[name]
                tar.addfile(info)
                continue
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def wanted(index: int, key: str, data: bytes | None = None, name: str = "a.tar") -> dict[str, Any]:
    return {"shard": name, "index": index, "key": key, "sha256": hashlib.sha256(data).hexdigest() if data else None}


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> Thumbnails:
    return read_thumbnails(rows, expand([str(folder)]), [options])


def colour(made: Thumbnail | str) -> tuple[int, ...]:
    assert isinstance(made, Thumbnail), made
    image = Image.open(io.BytesIO(b64decode(made.url.removeprefix("data:image/webp;base64,"))))
    assert image.format == "WEBP"
    assert image.size == (made.width, made.height)
    return tuple(round(value / 255) for value in image.convert("RGB").getpixel((image.width // 2, image.height // 2)))  # type: ignore[union-attr]


def test_the_wanted_pictures_are_found_among_others(tmp_path: Path) -> None:
    colours = ["red", "lime", "blue", "red", "lime"]
    data = [picture(name) for name in colours]
    members = [(f"k{n}.{suffix}", content) for n in range(5) for suffix, content in (("png", data[n]), ("txt", b"t"))]
    shard(tmp_path / "a.tar", members)
    shard(tmp_path / "b.tar", members[:4])
    found = read(
        tmp_path, wanted(1, "k1", data[1]), wanted(4, "k4", data[4]), wanted(0, "k0", data[0], "b.tar"), wanted(2, "k2")
    )
    assert found.faults == []
    assert {place: colour(made) for place, made in found.by_sample.items()} == {
        ("a.tar", 1): (0, 1, 0),
        ("a.tar", 2): (0, 0, 1),
        ("a.tar", 4): (0, 1, 0),
        ("b.tar", 0): (1, 0, 0),
    }


def test_a_gzipped_shard_is_read_too(tmp_path: Path) -> None:
    shard(tmp_path / "plain", [("k.png", picture("blue")), ("k.txt", b"t")])
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    found = read(tmp_path, wanted(0, "k", name="a.tar.gz"))
    assert colour(found.by_sample["a.tar.gz", 0]) == (0, 0, 1)


def test_neighbours_of_one_key_stay_two_samples(tmp_path: Path) -> None:
    members = [(f"k.{s}", d) for p in ("red", "blue") for s, d in (("png", picture(p)), ("txt", b"t"))]
    shard(tmp_path / "a.tar", members)
    found = read(tmp_path, wanted(0, "k"), wanted(1, "k"))
    assert [colour(found.by_sample["a.tar", n]) for n in (0, 1)] == [(1, 0, 0), (0, 0, 1)]


def test_options_of_the_scoring_run_say_which_picture_it_is(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("k.png", picture("red")), ("k.out.png", picture("blue")), ("k.txt", b"t")])
    assert colour(read(tmp_path, wanted(0, "k")).by_sample["a.tar", 0]) == (1, 0, 0)
    found = read(tmp_path, wanted(0, "k"), image_keys="out.png", engine="vllm")
    assert colour(found.by_sample["a.tar", 0]) == (0, 0, 1)


def test_links_count_as_scoring_counts_them(tmp_path: Path) -> None:
    members = [("a.png", b""), ("b.png", picture("lime")), ("b.txt", b"t")]
    shard(tmp_path / "a.tar", members, {"a.png": "b.png"})
    assert colour(read(tmp_path, wanted(1, "b")).by_sample["a.tar", 1]) == (0, 1, 0)


def test_another_picture_than_the_scored_one_isnt_shown(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("k.png", picture("red")), ("k.txt", b"t")])
    found = read(tmp_path, wanted(0, "k", b"something else"))
    assert found.by_sample["a.tar", 0] == "the shard holds another picture than the one that was scored"
    assert found.faults == ["a.tar, sample 0: the shard holds another picture than the one that was scored"]


def test_a_shard_that_changed_costs_its_own_pictures_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", [("k.png", picture()), ("k.txt", b"t")])
    found = read(tmp_path, wanted(0, "other"), wanted(7, "k", name="b.tar"), wanted(0, "k", name="b.tar"))
    assert list(found.by_sample) == [("b.tar", 0)]
    assert len(found.faults) == 2
    assert "a.tar" in found.faults[0]
    assert "b.tar" in found.faults[1]


def test_a_cut_shard_is_a_fault_and_no_crash(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(data).save(buffer, "PNG")
    shard(tmp_path / "a.tar", [("k.png", buffer.getvalue()), ("k.txt", b"t")])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:4000])
    found = read(tmp_path, wanted(0, "k"))
    assert found.by_sample == {}
    assert len(found.faults) == 1


def test_a_picture_that_cant_be_decoded_says_why(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("k.png", b"no picture"), ("k.txt", b"t")])
    made = read(tmp_path, wanted(0, "k", b"no picture")).by_sample["a.tar", 0]
    assert isinstance(made, str)
    assert "no readable header" in made


def test_shards_that_arent_there_are_an_error(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("k.png", picture()), ("k.txt", b"t")])
    with pytest.raises(TableError, match="z.tar"):
        read(tmp_path, wanted(0, "k", name="z.tar"))
    with pytest.raises(ShardNotFoundError):
        read(tmp_path / "nothing", wanted(0, "k"))
    assert read(tmp_path).by_sample == {}


@pytest.mark.parametrize(
    ("size", "expected"), [((1000, 500), (EDGE, EDGE // 2)), ((40, 30), (40, 30)), ((1, 900), (1, EDGE))]
)
def test_thumbnails_keep_their_shape_and_arent_enlarged(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    shard(tmp_path / "a.tar", [("k.png", picture(size=size)), ("k.txt", b"t")])
    made = read(tmp_path, wanted(0, "k")).by_sample["a.tar", 0]
    assert isinstance(made, Thumbnail)
    assert (made.width, made.height) == expected


def test_thumbnails_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    shard(tmp_path / "a.tar", [("k.jpg", picture(size=(60, 20), form="JPEG", exif=exif)), ("k.txt", b"t")])
    made = read(tmp_path, wanted(0, "k")).by_sample["a.tar", 0]
    assert isinstance(made, Thumbnail)
    assert (made.width, made.height) == (20, 60)


@pytest.mark.parametrize("most", [MOST_BYTES, 9000, 2000, 600])
@pytest.mark.parametrize("size", [(320, 320), (200, 320), (1000, 500)])
def test_even_noise_makes_a_small_thumbnail(tmp_path: Path, size: tuple[int, int], most: int) -> None:
    shard(tmp_path / "a.tar", [("k.png", noise(0, size)), ("k.txt", b"t")])
    found = read_thumbnails([wanted(0, "k")], expand([str(tmp_path)]), [], most)
    made = found.by_sample["a.tar", 0]
    assert isinstance(made, Thumbnail)
    assert len(b64decode(made.url.partition(",")[2])) <= most
    assert max(made.width, made.height) >= STEPS[-1][0]
    assert made.width / made.height == pytest.approx(size[0] / size[1], rel=0.1)


def test_no_room_makes_the_smallest_thumbnail(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("k.png", noise(0, (320, 320))), ("k.txt", b"t")])
    made = read_thumbnails([wanted(0, "k")], expand([str(tmp_path)]), [], -5).by_sample["a.tar", 0]
    assert isinstance(made, Thumbnail)
    assert (made.width, made.height) == (STEPS[-1][0], STEPS[-1][0])


def test_of_several_options_those_are_right_that_give_the_scored_picture(tmp_path: Path) -> None:
    data = {name: picture(name) for name in ("red", "blue", "lime", "black")}
    for name, (one, other) in {"a": ("red", "blue"), "b": ("lime", "black")}.items():
        shard(tmp_path / f"{name}.tar", [("k.png", data[one]), ("k.out.png", data[other]), ("k.txt", b"t")])
    rows = [wanted(0, "k", data["red"], "a.tar"), wanted(0, "k", data["black"], "b.tar")]
    options = [{"image_keys": "png"}, {"image_keys": "out.png", "max_text_bytes": 5}, {"image_keys": "png"}]
    for order in (options, options[::-1]):
        found = read_thumbnails(rows, expand([str(tmp_path)]), order)
        assert found.faults == []
        assert [colour(found.by_sample[f"{name}.tar", 0]) for name in "ab"] == [(1, 0, 0), (0, 0, 0)]


def test_without_a_digest_the_first_options_count(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("k.png", picture("red")), ("k.out.png", picture("blue")), ("k.txt", b"t")])
    options = [{"image_keys": "out.png"}, {"image_keys": "png"}]
    found = read_thumbnails([wanted(0, "k")], expand([str(tmp_path)]), options)
    assert colour(found.by_sample["a.tar", 0]) == (0, 0, 1)


def test_where_no_options_fit_it_is_said_once(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("k.png", picture("red")), ("k.txt", b"t")])
    options = [{"image_keys": "png"}, {"image_keys": "jpg"}]
    found = read_thumbnails([wanted(0, "k", b"another")], expand([str(tmp_path)]), options)
    assert found.faults == ["a.tar, sample 0: the shard holds another picture than the one that was scored"]


@pytest.mark.parametrize("options", [{"image_keys": 5}, {"max_text_bytes": None}, {"group_key": ["x"]}])
def test_options_of_a_wrong_type_are_as_good_as_none(tmp_path: Path, options: dict[str, Any]) -> None:
    shard(tmp_path / "a.tar", [("k.png", picture("red")), ("k.txt", b"t")])
    assert colour(read(tmp_path, wanted(0, "k"), **options).by_sample["a.tar", 0]) == (1, 0, 0)


def test_a_row_that_names_no_sample_has_no_picture(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("k.png", picture("red")), ("k.txt", b"t")])
    rows = [wanted(0, "k"), {**wanted(0, "k"), "index": None}, {**wanted(0, "k"), "shard": None}, wanted(-1, "k")]
    assert [sample_of(made) for made in rows] == [("a.tar", 0), None, None, None]
    assert list(read(tmp_path, *rows).by_sample) == [("a.tar", 0)]
    assert read(tmp_path, *rows[1:]).by_sample == {}


def test_a_row_without_a_key_takes_what_is_there(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("k.png", picture("red")), ("k.txt", b"t")])
    found = read(tmp_path, {**wanted(0, "k"), "key": None})
    assert (colour(found.by_sample["a.tar", 0]), found.faults) == ((1, 0, 0), [])


def test_nothing_is_called_kept_that_is_only_shown(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        shard(tmp_path / f"{name}.tar", [("k.png", picture()), ("k.txt", b"t")])
    (tmp_path / "c.tar").write_bytes(b"x" * 2048)
    found = read(tmp_path, wanted(0, "other"), wanted(7, "k", name="b.tar"), wanted(0, "k", name="c.tar"))
    with pytest.raises(TableError) as error:
        read(tmp_path, wanted(0, "k", name="z.tar"))
    texts = [*found.faults, str(error.value)]
    assert len(texts) == 4
    assert not any("kept" in text or "copied" in text for text in texts)


def test_real_pictures_are_shown(shared_data: Path) -> None:
    rows = []
    for path in sorted((shared_data / "avt-shards").glob("*.tar"))[:2]:
        samples = list(read_samples(ShardRef(str(path), path.name, -1, "")))
        rows += [wanted(n, samples[n].key, samples[n].image, path.name) for n in (0, len(samples) - 1)]
    found = read_thumbnails(rows, expand([str(shared_data / "avt-shards")]), [])
    assert found.faults == []
    assert all(
        isinstance(made, Thumbnail) and max(made.width, made.height) == EDGE for made in found.by_sample.values()
    )
    assert len(found.by_sample) == 4
