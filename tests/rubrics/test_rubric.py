from __future__ import annotations

import pytest

from tests.tiny import RUBRIC
from zscore.errors import RubricError
from zscore.rubrics.rubric import load_rubric, parse_rubric, shipped


def test_the_default_rubric_is_the_papers():
    rubric = load_rubric("z-reward")
    assert rubric.names == ("alignment", "realism", "aesthetics", "plausibility")
    assert rubric.values == (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
    assert [level.token for level in rubric.levels] == list("123456789")


def test_every_shipped_rubric_parses_and_asks_about_each_dimension():
    assert shipped() == ["q-align", "shapes", "z-reward"]
    for name in ("q-align", "z-reward"):
        rubric = load_rubric(name)
        assert rubric.name == name
        for dimension in rubric.dimensions:
            question = rubric.question(dimension)
            assert dimension.title in question
            assert all(meaning in question for _, meaning in dimension.anchors)
            assert "{" not in question


def test_shapes_is_z_reward_in_few_words():
    """A tiny student's sequences are short: it is asked by the dimensions' titles alone."""
    few, many = load_rubric("shapes"), load_rubric("z-reward")
    assert (few.names, few.levels) == (many.names, many.levels)
    assert all(few.question(dimension) == "" for dimension in few.dimensions)


def test_q_align_has_five_words():
    rubric = load_rubric("q-align")
    assert [(level.token, level.value) for level in rubric.levels] == [
        ("bad", 1.0),
        ("poor", 2.0),
        ("fair", 3.0),
        ("good", 4.0),
        ("excellent", 5.0),
    ]


def test_hash_ignores_comments_and_spacing_but_no_word():
    plain = parse_rubric(RUBRIC)
    assert parse_rubric("# a comment\n\n" + RUBRIC).hash == plain.hash
    assert parse_rubric(RUBRIC.replace("value = 4.0", "value = 4.5")).hash != plain.hash
    assert parse_rubric(RUBRIC.replace("1 to 3.", "one to three.")).hash != plain.hash


def test_a_rubric_file_is_read_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RUBRIC)
    assert load_rubric(str(path)).name == "tiny"


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('token = "2"', 'token = "1"', "two levels share a token"),
        ('token = "2"', 'token = ""', "token is empty"),
        ("value = 4.0", "value = 2.0", "must be finite and ascend"),
        ("value = 4.0", "value = inf", "must be finite"),
        ("value = 4.0", "value = nan", "must be finite"),
        ('name = "right"', 'name = "left"', "two dimensions share a name"),
        ('name = "right"', 'name = "Right"', "lower-case identifier"),
        ('name = "right"', 'name = "overall"', "column of its own"),
        ('name = "right"', 'name = "left_std"', "is a column of dimension 'left'"),
        ("{prompt}", "prompt", "0 times; once is wanted"),
        ("P: {prompt}", "P: {prompt}{prompt}", "2 times; once is wanted"),
        ('overall = "mean"', 'overall = "max"', "only 'mean' is known"),
        ('scale = "1 to 3.\\n"', "", "the field 'scale' is missing"),
        ('probe = "Score: "', 'probe = ""', "probe text is empty"),
        ("levels = [", "levels = 3 # [", "rubric:"),
        ('name = "tiny"', "name = ", "not valid TOML"),
    ],
)
def test_a_wrong_field_is_named(before, after, says):
    assert before in RUBRIC
    with pytest.raises(RubricError, match="rubric") as caught:
        parse_rubric(RUBRIC.replace(before, after, 1))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_level_count_limits():
    one = parse_levels(1)
    with pytest.raises(RubricError, match="1 levels; 2 to 64"):
        parse_rubric(one)
    with pytest.raises(RubricError, match="65 levels; 2 to 64"):
        parse_rubric(parse_levels(65))
    assert len(parse_rubric(parse_levels(64)).levels) == 64


def parse_levels(count: int) -> str:
    entries = ", ".join(f'{{token = "t{n}", value = {n}.0}}' for n in range(count))
    lines = [f"levels = [{entries}]" if line.startswith("levels") else line for line in RUBRIC.splitlines()]
    return "\n".join(lines)


def test_unknown_names_get_the_nearest(tmp_path):
    with pytest.raises(RubricError, match="did you mean 'z-reward'"):
        load_rubric("z-rewrad")
    with pytest.raises(RubricError, match="shipped are q-align, shapes, z-reward"):
        load_rubric("nothing-like-it")
    with pytest.raises(RubricError, match="can't read the rubric"):
        load_rubric(str(tmp_path / "none.toml"))
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(RubricError, match="can't read the rubric"):
        load_rubric(str(binary))
