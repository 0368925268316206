"""Good/same/bad votes in every wording."""

from __future__ import annotations

import pytest

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
