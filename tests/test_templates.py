from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import RUBRIC, pixels
from zscore.demo.student import untrained_student
from zscore.errors import ModelError, RubricError
from zscore.records import Failure, Status
from zscore.rubrics.rubric import load_rubric, parse_rubric
from zscore.templates import PromptBuilder, TextTokenizer


@pytest.fixture(scope="module")
def folder():
    return untrained_student()


@pytest.fixture(scope="module")
def text(folder):
    return TextTokenizer(folder)


def build(folder, layout="joint", rubric=None, max_tokens=4096):
    return PromptBuilder(folder, rubric or load_rubric("z-reward"), layout, merge=2, max_tokens=max_tokens)


def added_tokens(folder) -> list[str]:
    return [entry["content"] for entry in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]]


def test_every_special_token_in_a_prompt_stays_text(folder, text):
    """The number of tokens that carry meaning never depends on what the user writes."""
    builder = build(folder)
    plain = builder.build("a cat", pixels())[0].token_ids
    meaning = set(text.added.values())
    names = added_tokens(folder)
    assert "<|im_end|>" in names
    assert "<think>" in names
    for name in [*names, "".join(names), f"<|im_start|>{names[0]}\n<|im_end|>"]:
        for prompt in (name, f"a {name} b", name * 3):
            ids = builder.build(prompt, pixels())[0].token_ids
            assert [i for i in ids if i in meaning] == [i for i in plain if i in meaning], name


def test_the_prompts_own_text_survives_as_it_was_written(folder, text):
    import tokenizers

    reader = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for prompt in ("<|im_end|>", "a\tb\n\nc", "ünïcödé 🦊 日本", "<|image_pad|><|vision_end|>"):
        assert reader.decode(text.encode(prompt), skip_special_tokens=False) == prompt


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_ordinary_tokens_only(text, prompt):
    assert set(text.encode(prompt)).isdisjoint(text.added.values())


def test_joint_reads_each_dimension_just_before_its_score(folder, text):
    rubric = load_rubric("z-reward")
    (prompt,) = build(folder).build("a cat", pixels())
    assert len(prompt.probes) == 4
    assert list(prompt.probes) == sorted(prompt.probes)
    assert prompt.probes[-1] == len(prompt.token_ids) - 1
    for dimension, probe in zip(rubric.dimensions, prompt.probes, strict=True):
        wanted = text.encode(f"{dimension.title}: ")
        assert list(prompt.token_ids[probe + 1 - len(wanted) : probe + 1]) == wanted


def test_separate_has_a_prompt_a_dimension_with_a_shared_prefix(folder):
    prompts = build(folder, "separate").build("a cat", pixels())
    assert len(prompts) == 4
    assert all(prompt.probes == (len(prompt.token_ids) - 1,) for prompt in prompts)
    image = sum(token == build(folder)._image for token in prompts[0].token_ids)
    first = prompts[0].token_ids
    shared = next(
        i for i, tokens in enumerate(zip(*(p.token_ids for p in prompts), strict=False)) if len(set(tokens)) > 1
    )
    assert shared > image + 10
    assert len({prompt.token_ids for prompt in prompts}) == 4
    assert first[:shared] == prompts[1].token_ids[:shared]


def test_image_placeholders_match_the_merged_grid(folder):
    builder = build(folder)
    for grid in ((2, 2), (4, 6), (10, 2)):
        (prompt,) = builder.build("a", pixels(grid=grid))
        assert prompt.token_ids.count(builder._image) == grid[0] * grid[1] // 4


def test_too_long_is_a_failure_with_the_numbers(folder):
    builder = build(folder, max_tokens=900)
    assert not isinstance(builder.build("short", pixels()), Failure)
    failure = builder.build("word " * 400, pixels())
    assert isinstance(failure, Failure)
    assert failure.status is Status.PROMPT_TOO_LONG
    assert "the limit is 900" in failure.error
    edge = 900 - builder.overhead - 4
    one = next(c for c in "abcdefgh" if len(build(folder)._text.encode(c * 2)) == 2)
    assert not isinstance(builder.build(one * 2, pixels()), Failure)
    assert edge > 2


def test_hash_tells_templates_apart(folder):
    rubric = parse_rubric(RUBRIC)
    hashes = {
        build(folder).hash,
        build(folder, "separate").hash,
        build(folder, rubric=rubric).hash,
        build(folder, rubric=parse_rubric(RUBRIC.replace("Score: ", "Mark: "))).hash,
        build(folder, "separate", parse_rubric(RUBRIC.replace("Score: ", "Mark: "))).hash,
    }
    assert len(hashes) == 4  # the joint layout doesn't see the separate probe
    assert build(folder).hash == build(folder).hash


def test_a_level_of_two_tokens_is_refused_by_name(folder):
    rubric = parse_rubric(RUBRIC.replace('token = "2"', 'token = "22"'))
    with pytest.raises(RubricError, match="level '22' is 2 tokens") as caught:
        build(folder, rubric=rubric)
    assert "rubric 'tiny'" in str(caught.value)


def test_a_level_that_is_a_special_token_is_text_and_refused(folder):
    with pytest.raises(RubricError, match="<think>"):
        build(folder, rubric=parse_rubric(RUBRIC.replace('token = "2"', 'token = "<think>"')))


def test_a_tokenizer_that_spells_special_tokens_is_refused(folder, tmp_path):
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": vocabulary["a"], "content": "<bad>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ModelError, match="spells the special token '<bad>'"):
        TextTokenizer(tmp_path).encode("a")


def test_missing_or_broken_tokenizer_files_are_named(folder, tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json can't be read"):
        TextTokenizer(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if entry["content"] != "<|image_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ModelError, match="neither Qwen's chat tokens nor a chat template"):
        build(tmp_path)
