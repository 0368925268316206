"""Reading back what a model that reasons wrote."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zscore.demo.student import untrained_student
from zscore.errors import RubricError, UsageError
from zscore.reasoning import ReasoningOptions, ScoreFinder, finder, from_level_logits, merge, no_score
from zscore.records import Failure, LevelScores, Pixels, Status
from zscore.rubrics.rubric import load_rubric, parse_rubric
from zscore.templates import PromptBuilder

VALUES = (1.0, 2.0, 3.0)
RUBRIC = load_rubric("shapes")
# A toy tokenizer: a character a token.
LEVELS = tuple(map(ord, "123"))


def toy(marker: str = "Score: ") -> ScoreFinder:
    return ScoreFinder(lambda ids: "".join(map(chr, ids)), marker, LEVELS)


def ids(text: str) -> list[int]:
    return list(map(ord, text))


@pytest.fixture(scope="module")
def builder():
    return PromptBuilder(untrained_student(), RUBRIC, "reasoning", merge=2, max_tokens=4096)


class TestFinder:
    def test_behind_the_marker(self):
        text = "3 of 2 dogs. Score: 2"
        assert toy().find(ids(text)) == len(text) - 1
        assert toy().words(ids(text), len(text) - 1) == "3 of 2 dogs."

    @pytest.mark.parametrize("text", ["", "3", "a 2", "Score: ", "Score: x", "score: 2", "Score 2", "2 Score:"])
    def test_no_score(self, text):
        assert toy().find(ids(text)) is None
        assert not toy().ends_here(ids(text))

    @pytest.mark.parametrize("text", ["Score:2", "Score:  2", "Score:\n2"])
    def test_blanks_before_it_dont_matter(self, text):
        assert toy().find(ids(text)) == len(text) - 1

    def test_the_last_one_counts(self):
        text = "A first Score: 1 was too low. Score: 3 it is, of 2"
        assert text[toy().find(ids(text))] == "3"

    @given(st.text(alphabet="123 .:xScore", max_size=40), st.sampled_from("123"))
    def test_whatever_stands_before(self, words, level):
        output = ids(f"{words} Score: {level}")
        assert toy().find(output) == len(output) - 1
        assert toy().ends_here(output)

    @given(st.text(alphabet="123 Score:", max_size=30))
    def test_ends_where_it_finds(self, text):
        """Writing stops at the first score; what was written until then is found."""
        output = ids(text)
        ends = [count for count in range(1, len(output) + 1) if toy().ends_here(output[:count])]
        assert toy().find(output) == (ends[-1] - 1 if ends else None)

    def test_a_marker_is_needed(self):
        with pytest.raises(RubricError, match="no marker"):
            toy(" ")
        with pytest.raises(RubricError, match="no marker"):
            finder(load_rubric("q-align"), str, LEVELS)

    def test_with_a_real_tokenizer(self, builder):
        output = builder.encode("There are 9 shapes, not 5. Score: 7")
        found = finder(RUBRIC, builder.decode, builder.level_ids)
        assert found.find(output) == len(output) - 1
        assert found.words(output, len(output) - 1) == "There are 9 shapes, not 5."
        assert found.find(output[:-1]) is None


class TestPrompts:
    def pixels(self):
        return Pixels(np.zeros((4, 3, 16, 16), np.uint8), (2, 2), 32, 32)

    def test_a_prompt_a_dimension_without_probes(self, builder):
        prompts = builder.build("a red circle", self.pixels())
        assert [prompt.probes for prompt in prompts] == [()] * 4
        texts = [builder.decode(prompt.token_ids) for prompt in prompts]
        for text, dimension in zip(texts, RUBRIC.dimensions, strict=True):
            assert f"{dimension.title}: why?" in text

    def test_several_draws_lie_together(self):
        many = PromptBuilder(untrained_student(), RUBRIC, "reasoning", merge=2, max_tokens=4096, samples=3)
        prompts = many.build("x", self.pixels())
        assert [prompt.draw for prompt in prompts] == [0, 1, 2] * 4
        assert all(one.token_ids == prompts[3].token_ids for one in prompts[3:6])
        direct = PromptBuilder(untrained_student(), RUBRIC, "separate", merge=2, max_tokens=4096, samples=3)
        assert len(direct.build("x", self.pixels())) == 4

    def test_special_tokens_in_the_prompt_stay_text(self, builder):
        plain = builder.build("x", self.pixels())[0].token_ids
        nasty = builder.build("x<|im_end|>", self.pixels())[0].token_ids
        (end,) = builder.end_ids & set(plain)
        assert nasty.count(end) == plain.count(end)

    def test_a_rubric_without_the_layout(self):
        with pytest.raises(RubricError, match=r"'q-align' has no \[layouts\.reasoning\]"):
            PromptBuilder(untrained_student(), load_rubric("q-align"), "reasoning", merge=2, max_tokens=4096)

    def test_half_a_layout_is_refused(self):
        source = RUBRIC.source.replace('marker = "Score: "', "")
        with pytest.raises(RubricError, match="wants both an ask and a marker"):
            parse_rubric(source)


class TestMerge:
    def scores(self, *logits: float, words: str = "so", tokens: int = 5) -> LevelScores:
        found = from_level_logits(np.array(logits), VALUES)
        return LevelScores(found.probs_DK, found.mean_D, found.std_D, found.entropy_D, (words,), tokens)

    def test_one_distribution(self):
        found = from_level_logits(np.log([0.2, 0.3, 0.5]) + 7, VALUES)
        np.testing.assert_allclose(found.probs_DK, [[0.2, 0.3, 0.5]], rtol=1e-6)
        np.testing.assert_allclose(found.mean_D, [2.3], rtol=1e-6)
        np.testing.assert_allclose(found.std_D, [np.sqrt(0.2 * 1.69 + 0.3 * 0.09 + 0.5 * 0.49)], rtol=1e-6)
        np.testing.assert_allclose(found.entropy_D, [-sum(p * np.log(p) for p in (0.2, 0.3, 0.5))], rtol=1e-6)

    def test_certainty_has_no_entropy(self):
        found = from_level_logits(np.array([0.0, 1e4, -1e4]), VALUES)
        assert found.entropy_D[0] == found.std_D[0] == 0

    def test_reasonings_are_averaged_as_distributions(self):
        low, high = self.scores(50, 0, 0), self.scores(0, 0, 50)
        found = merge([low, high, low, low], 2, VALUES)
        np.testing.assert_allclose(found.probs_DK, [[0.5, 0, 0.5], [1, 0, 0]], atol=1e-6)
        np.testing.assert_allclose(found.std_D, [1, 0], atol=1e-6)
        assert found.output_tokens == 20

    def test_one_without_a_score_is_left_out(self):
        found = merge([no_score(9, 9), self.scores(0, 0, 50), self.scores(50, 0, 0), no_score(9, 9)], 2, VALUES)
        assert found.output_tokens == 9 + 5 + 5 + 9
        np.testing.assert_allclose(found.mean_D, [3, 1], atol=1e-6)
        assert found.reasoning == ("", "so", "so", "")

    def test_a_dimension_without_any_score_fails(self):
        found = merge([self.scores(0, 0, 50), no_score(9, 9)], 2, VALUES)
        assert isinstance(found, Failure)
        assert found.status is Status.NO_SCORE

    def test_what_the_failure_says(self):
        assert "raise --max-output-tokens (now 9)" in no_score(9, 9).error
        assert "ended its answer after 3 tokens" in no_score(3, 9).error


@pytest.mark.parametrize(
    ("option", "value"), [("samples", 0), ("temperature", -0.1), ("temperature", float("nan")), ("max_tokens", 1)]
)
def test_options_that_cant_be_meant(option, value):
    with pytest.raises(UsageError, match="--"):
        ReasoningOptions(**{option: value})
