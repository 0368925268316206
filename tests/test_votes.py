"""Good/same/bad votes in every wording."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tars import FUZZ
from zscore.agreement import Bootstrap
from zscore.errors import TableError
from zscore.votes import gsb, read_votes


class TestGsb:
    @pytest.mark.parametrize(
        ("text", "counts"),
        [
            ("vote\ngood\nGood\n same \nbad\n", (2, 1, 1)),
            ("prompt_id,vote\n1,G\n1,S\n2,B\n", (1, 1, 1)),
            ("prompt,GSB\np,1\np,0\nq,-1\nq,-1\n", (1, 1, 2)),
            ("good,same,bad\n3,2,1\n0,0,4\n", (3, 2, 5)),
            ("vote_type\nleftvote\nrightvote\ntievote\nbothbad_vote\n", (1, 2, 1)),
        ],
    )
    def test_counts(self, tmp_path, text, counts):
        path = tmp_path / "votes.csv"
        path.write_text(text)
        result = gsb(read_votes(str(path)), Bootstrap(replicates=100))
        assert (result.good, result.same, result.bad) == counts
        assert result.gsb.value == pytest.approx((counts[0] - counts[2]) / sum(counts))

    def test_interval_is_over_prompts(self, tmp_path):
        path = tmp_path / "votes.csv"
        # 20 votes on 2 prompts that disagree: as if there were two votes.
        path.write_text("prompt,vote\n" + "a,good\n" * 10 + "b,bad\n" * 10)
        result = gsb(read_votes(str(path)), Bootstrap())
        assert (result.prompts, result.gsb.low, result.gsb.high) == (2, -1, 1)

    @pytest.mark.parametrize("rows", [",good\n,bad\n", '"",good\n" ",bad\n'])
    def test_votes_that_name_no_prompt_are_on_one_each(self, tmp_path, rows):
        path = tmp_path / "votes.csv"
        path.write_text("prompt_id,vote\n" + rows * 20 + "a,good\n" * 3)
        result = gsb(read_votes(str(path)), Bootstrap())
        assert (result.prompts, result.good, result.bad) == (41, 23, 20)
        (tmp_path / "none.csv").write_text("vote\n" + "good\nbad\n" * 20)
        without = gsb(read_votes(str(tmp_path / "none.csv")), Bootstrap())
        path.write_text("prompt_id,vote\n" + rows * 20)
        assert gsb(read_votes(str(path)), Bootstrap()) == without

    @settings(FUZZ, max_examples=60)
    @given(
        st.lists(st.tuples(st.sampled_from(["", "a", "b", " c"]), st.sampled_from(["good", "S", "-1"])), max_size=12),
        st.integers(0, 1000),
    )
    def test_like_a_loop(self, tmp_path_factory, votes, seed):
        """Equation 21 and its replicates, vote by vote."""
        path = tmp_path_factory.mktemp("votes") / "votes.csv"
        path.write_text("prompt,vote\n" + "".join(f"{prompt},{vote}\n" for prompt, vote in votes))
        draws = Bootstrap(replicates=25, seed=seed)
        found = gsb(read_votes(str(path)), draws)
        worth = {"good": 1, "S": 0, "-1": -1}
        prompts: dict[object, list[int]] = {}
        for number, (prompt, vote) in enumerate(votes):
            prompts.setdefault(prompt or number, []).append(worth[vote])
        assert found.prompts == len(prompts)
        if not votes:
            assert found.gsb.value is None
            return
        values = list(itertools.chain(*prompts.values()))
        assert [found.good, found.same, found.bad] == [values.count(worth) for worth in (1, 0, -1)]
        assert found.gsb.value == pytest.approx(sum(values) / len(values))
        if len(prompts) > 1:
            again = []
            for W_G in np.concatenate(list(draws.blocks(len(prompts), len(prompts)))).astype(int):
                drawn = [value for times, own in zip(W_G, prompts.values(), strict=True) for value in own * times]
                again.append(sum(drawn) / len(drawn))
            assert (found.gsb.low, found.gsb.high) == pytest.approx(tuple(np.quantile(again, [0.025, 0.975])))

    def test_no_votes(self, tmp_path):
        path = tmp_path / "votes.csv"
        path.write_text("vote\n")
        assert gsb(read_votes(str(path)), Bootstrap()).gsb.undefined == "no votes"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("vote\ngood\nfine\n", "1 votes are neither good, same nor bad; the first: 'fine'"),
            ("good,bad\n1,2\n", "neither a 'vote' column nor"),
            ("good,same,bad\n1,x,2\n", "1 rows whose counts"),
            ("good,same,bad\n1,-1,2\n", "1 rows whose counts"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, text, message):
        path = tmp_path / "votes.csv"
        path.write_text(text)
        with pytest.raises(TableError, match=message):
            read_votes(str(path))
