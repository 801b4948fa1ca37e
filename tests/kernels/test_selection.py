"""The kernels that select blocks, against their definitions in torch and in loops."""

from __future__ import annotations

import pytest
import torch

from diffattn.kernels.selection import best_of_rows, listed, pooled, scores_of_parts
from diffattn.routing.choosing import choose

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def starts_of(lengths: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def means_by_loops(
    x: torch.Tensor, lengths: list[int], counted: torch.Tensor | None
) -> torch.Tensor:
    """The means of blocks in float64; 0 where nothing counts."""
    out, first = [], 0
    for length in lengths:
        samples = []
        for sample in range(len(x)):
            part = x[sample, first : first + length].double()
            if counted is not None:
                part = part[counted[sample, first : first + length]]
            samples.append(part.sum(0) / max(1, len(part)))
        out.append(torch.stack(samples))
        first += length
    return torch.stack(out, 1)


class TestPooled:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("lengths", [[16, 16, 16, 3], [64] * 2, [1, 70, 5, 130], [33]])
    def test_means_of_blocks_of_any_lengths(
        self, lengths: list[int], dtype: torch.dtype, device: str
    ) -> None:
        x = torch.randn(2, sum(lengths), 3, 24).to(device, dtype)
        moved, means = pooled(x, starts_of(lengths, device), max(lengths))
        assert moved is x
        assert means.dtype == torch.float32
        want = means_by_loops(x, lengths, None)
        torch.testing.assert_close(means.double(), want, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("dim", [16, 40, 128])
    def test_tokens_are_moved_bit_by_bit(self, dim: int, device: str) -> None:
        x = torch.randn(2, 2, 90, dim).to(device, torch.bfloat16).transpose(1, 2)
        token = torch.randperm(90).to(device)
        lengths = [32, 32, 26]
        moved, means = pooled(x, starts_of(lengths, device), 32, token=token)
        assert moved.is_contiguous()
        assert torch.equal(moved, x.index_select(1, token))
        want = means_by_loops(moved, lengths, None)
        torch.testing.assert_close(means.double(), want, atol=1e-6, rtol=1e-6)

    def test_places_past_the_last_token_are_zeros(self, device: str) -> None:
        x = torch.randn(1, 10, 1, 16, device=device)
        token = torch.tensor([3, 10, 0, 17, *range(4, 10), 1, 2], device=device)
        counted = (token < 10)[None]
        moved, means = pooled(x, starts_of([4, 8], device), 8, token=token, counted=counted)
        padded = torch.cat([x, x.new_zeros(1, 8, 1, 16)], 1)
        assert torch.equal(moved, padded[:, token])
        torch.testing.assert_close(means[0, 0, 0], (x[0, 3, 0] + x[0, 0, 0]) / 2)

    def test_padding_counts_in_no_mean_and_stays_where_it_is(self, device: str) -> None:
        lengths = [16, 16, 7]
        x = torch.randn(2, 39, 2, 16, device=device)
        counted = torch.rand(2, 39, device=device) < 0.5
        counted[0, :16] = False
        x = x.masked_fill(~counted[:, :, None, None], torch.nan)
        token = torch.arange(39, device=device)
        moved, means = pooled(x, starts_of(lengths, device), 16, token=token, counted=counted)
        assert torch.equal(moved.isnan(), x.isnan())
        want = means_by_loops(x, lengths, counted)
        torch.testing.assert_close(means.double(), want, atol=1e-6, rtol=1e-6)
        assert means[0, 0].count_nonzero() == 0

    def test_samples_of_an_expanded_mask(self, device: str) -> None:
        x = torch.randn(3, 20, 1, 16, device=device)
        counted = (torch.arange(20, device=device) % 3 > 0).expand(3, -1)
        _, means = pooled(x, starts_of([16, 4], device), 16, counted=counted)
        want = means_by_loops(x, [16, 4], counted)
        torch.testing.assert_close(means.double(), want, atol=1e-6, rtol=1e-6)


class TestBestOfRows:
    @pytest.mark.parametrize("columns", [1, 2, 31, 130, 600])
    @pytest.mark.parametrize("count", [0, 1, 7, 700])
    def test_the_entries_that_choose_chooses(self, count: int, columns: int, device: str) -> None:
        scores = torch.randn(2, 2, 5, columns, device=device)
        candidates = torch.rand(2, 1, 5, columns, device=device) < 0.7
        got = best_of_rows(scores, count, candidates)
        assert torch.equal(got, chosen(scores, count, candidates))
        assert torch.equal(best_of_rows(scores, count), chosen(scores, count, None))

    @pytest.mark.parametrize("levels", [1, 2, 5])
    def test_of_equal_scores_the_first(self, levels: int, device: str) -> None:
        scores = torch.randint(levels, (1, 3, 8, 77), device=device).float()
        for count in (1, 20, 76):
            assert torch.equal(best_of_rows(scores, count), chosen(scores, count, None))

    def test_scores_that_round_to_equal_numbers(self, device: str) -> None:
        """Halves too: 24 bits between the lowest and the highest score."""
        points = torch.randint(0, 8, (1, 1, 20, 200), device=device).double() / 2
        points[..., 0], points[..., 1] = 0, (1 << 24) - 1
        scores = points.float()
        for count in (3, 50, 120):
            assert torch.equal(best_of_rows(scores, count), chosen(scores, count, None))

    @pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
    @pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
    def test_scores_of_any_size(self, scale: float, offset: float, device: str) -> None:
        scores = (torch.randn(1, 2, 6, 90, device=device) + offset) * scale
        assert torch.equal(best_of_rows(scores, 13), chosen(scores, 13, None))

    def test_rows_with_numbers_of_their_own(self, device: str) -> None:
        scores = torch.randn(2, 3, 4, 50, device=device)
        counts = torch.tensor([0, 3, 50, 9], dtype=torch.int32, device=device)
        got = best_of_rows(scores, counts)
        assert torch.equal(got.sum(-1), counts.expand(2, 3, -1))
        for row, count in enumerate(counts.tolist()):
            assert torch.equal(got[:, :, row], chosen(scores, count, None)[:, :, row])

    def test_scores_that_rule_out(self, device: str) -> None:
        scores = torch.randn(1, 1, 3, 20, device=device)
        scores[0, 0, 0, ::2] = -torch.inf
        scores[0, 0, 1, 3] = torch.nan
        scores[0, 0, 1, 4] = torch.inf
        scores[0, 0, 2] = torch.nan
        got = best_of_rows(scores, 12, ruled_out=True)
        finite = scores.nan_to_num(0, neginf=0)
        assert torch.equal(got, chosen(finite, 12, scores > -torch.inf))
        assert got[0, 0, 0].sum() == 10
        assert got[0, 0, 1, 4]
        assert not got[0, 0, 2].any()

    def test_nan_and_infinities_are_equal_scores(self, device: str) -> None:
        scores = torch.randn(1, 1, 3, 20, device=device)
        scores[0, 0, 0, 5] = torch.nan
        scores[0, 0, 1, 5] = torch.inf
        scores[0, 0, 2, 5] = -torch.inf
        got = best_of_rows(scores, 4)
        assert torch.equal(got, chosen(scores, 4, None))

    def test_strides_of_a_view(self, device: str) -> None:
        scores = torch.randn(40, 6, 2, 3, device=device).permute(3, 2, 1, 0)
        candidates = (torch.rand(40, 6, device=device) < 0.5).t()[None, None]
        assert torch.equal(best_of_rows(scores, 9, candidates), chosen(scores, 9, candidates))


def chosen(scores: torch.Tensor, count: int, candidates: torch.Tensor | None) -> torch.Tensor:
    """The best entries by sorting."""
    pools = scores.flatten(0, 2)
    ranked = None if candidates is None else candidates.expand(scores.shape).flatten(0, 2)
    none = torch.zeros_like(pools, dtype=torch.bool)
    return choose(pools, none, ranked=ranked, budget=count).view(scores.shape)


class TestListed:
    @pytest.mark.parametrize(("columns", "cap"), [(1, 1), (40, 40), (100, 9), (530, 530)])
    def test_columns_in_ascending_order_and_zeros(
        self, columns: int, cap: int, device: str
    ) -> None:
        chosen = torch.rand(2, 3, 5, columns, device=device) < 0.3
        chosen[0, 0, 0], chosen[0, 0, 1] = False, True
        count, index = listed(chosen, cap)
        assert count.dtype == index.dtype == torch.int32
        assert index.shape == (2, 3, 5, cap)
        for place in ((0, 0, 0), (0, 0, 1), (1, 2, 4), (1, 0, 2)):
            want = chosen[place].nonzero()[:, 0].tolist()
            assert count[place] == len(want)
            found = index[place].tolist()
            assert found[: len(want)] == want[:cap]
            assert not any(found[len(want) :])

    def test_strides_of_a_view(self, device: str) -> None:
        chosen = (torch.rand(30, 4, device=device) < 0.5).t()[None, None].expand(2, 3, -1, -1)
        count, index = listed(chosen, 30)
        want = listed(chosen.contiguous(), 30)
        assert torch.equal(count, want[0])
        assert torch.equal(index, want[1])


class TestScoresOfParts:
    @pytest.mark.parametrize("sizes", [(1, 3, 4, 5, 2, 1, 16), (2, 70, 2, 66, 3, 2, 40)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_mass_of_the_parts_that_there_are(
        self, dtype: torch.dtype, sizes: tuple[int, ...], device: str
    ) -> None:
        batch, rows, parts_q, columns, parts_k, heads, dim = sizes
        of_query = torch.randn(batch, rows, parts_q, heads, dim, device=device)
        of_key = torch.randn(batch, columns, parts_k, heads, dim, device=device)
        has_query = torch.rand(batch, rows, parts_q, device=device) < 0.8
        has_key = torch.rand(batch, columns, parts_k, device=device) < 0.8
        has_query[0, 1] = has_key[0, 2] = False
        of_key[0, 2] = torch.nan  # of a part that is left out
        got = scores_of_parts(of_query, of_key, has_query, has_key, 0.3, dtype)
        pairs = torch.einsum("brphd,bcthd->bhrpct", of_query.double(), of_key.nan_to_num().double())
        there = has_query[:, None, :, :, None, None] & has_key[:, None, None, None]
        pairs = (pairs * 0.3).masked_fill(~there, -torch.inf)
        want = pairs.logsumexp((3, 5))
        assert torch.equal(got.isinf(), want.isinf())
        finite = want.isfinite()
        # A GPU multiplies means of 16-bit tokens as TF32.
        error = 1e-5 if dtype == torch.float32 else 2e-3 * dim**0.5
        torch.testing.assert_close(got.double()[finite], want[finite], atol=error, rtol=0)
        assert (got[0, :, 1] == -torch.inf).all()
        assert (got[0, :, :, 2] == -torch.inf).all()
