"""DELLA in distribution: who is kept how often, by rank, and what makes up for the rest."""

import pytest
import torch

import hf_merge
from hf_merge.errors import ParameterError
from hf_merge.method import get_method
from hf_merge.ops.dropping import rank_probabilities

della, della_linear = get_method("della"), get_method("della_linear")
DRAWS = 4000


def shuffled(shape, seed=0):
    """Distinct magnitudes in every row, with mixed signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def share_kept(delta, **settings):
    """How often each entry of a small task vector is kept."""
    kept = torch.zeros(delta.shape)
    for seed in range(DRAWS):
        kept += della_linear([delta], seed=seed, rescale="none", **settings) != 0
    return kept / DRAWS


def by_ranks(delta, density, epsilon):
    """The probability of every entry, counted rank by rank along dim 1 (a vector is one row)."""
    rows = delta[None] if delta.dim() == 1 else delta
    found = torch.full(rows.shape, density)
    if rows.shape[1] > 1:
        ranks = (rows.abs().unsqueeze(1) < rows.abs().unsqueeze(2)).sum(2)
        found = density - epsilon + 2 * epsilon * ranks / (rows.shape[1] - 1)
    return found.view(delta.shape)


@pytest.mark.parametrize("shape", [(1,), (2,), (9,), (5, 8), (6, 1), (1, 6), (4, 3, 6), (2, 5, 3, 2)])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.29), (0.8, 0.0)])
def test_probabilities_rise_with_the_rank_along_dim_1(shape, density, epsilon):
    delta = shuffled(shape)
    torch.testing.assert_close(
        rank_probabilities(delta, density, epsilon), by_ranks(delta, density, epsilon), rtol=0, atol=1e-6
    )


def test_equal_magnitudes_are_ranked_by_their_index():
    found = rank_probabilities(torch.tensor([1.0, -1.0, 0.0, 1.0]), 0.5, 0.3)
    assert found.tolist() == pytest.approx([0.4, 0.6, 0.2, 0.8])


@pytest.mark.parametrize("shape", [(5,), (2, 4), (2, 3, 2)])
def test_entries_are_kept_with_their_probability(shape):
    delta = shuffled(shape)
    expected = by_ranks(delta, 0.5, 0.3)
    assert ((share_kept(delta, density=0.5, epsilon=0.3) - expected).abs() < 5 * 0.5 / DRAWS**0.5).all()


def test_rows_of_one_are_kept_with_the_density():
    assert (share_kept(shuffled((3, 1)), density=0.3) - 0.3).abs().max() < 5 * 0.46 / DRAWS**0.5


@pytest.mark.parametrize("method", [della, della_linear])
@pytest.mark.parametrize("shape", [(60_000,), (300, 200), (3, 100, 200)])
def test_l1_rescale_keeps_the_sum_of_magnitudes(method, shape):
    delta = shuffled(shape)
    kept, raw = (method([delta], density=0.4, rescale=word) for word in ("l1", "none"))
    assert float(kept.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)
    factor = delta.abs().sum() / raw.abs().sum()
    torch.testing.assert_close(kept, raw * factor, rtol=1e-5, atol=0)
    assert raw[raw != 0].equal(delta[raw != 0])
    assert float((raw != 0).float().mean()) == pytest.approx(0.4, abs=0.01)


def test_rescale_by_probability_is_unbiased():
    delta = torch.tensor([1.0, -2.0, 3.0, 0.5])
    total = sum(della_linear([delta], density=0.5, epsilon=0.3, rescale="density", seed=s) for s in range(DRAWS))
    spread = delta.abs() * ((1 - by_ranks(delta, 0.5, 0.3)) / by_ranks(delta, 0.5, 0.3)).sqrt()
    assert ((total / DRAWS - delta).abs() <= 5 * spread / DRAWS**0.5).all()


def test_masks_do_not_depend_on_the_other_rows():
    delta = shuffled((4, 1000))
    whole = della_linear([delta], density=0.5, rescale="none", seed=7)
    other = delta.clone()
    other[2:] *= 3
    assert della_linear([other], density=0.5, rescale="none", seed=7)[:2].equal(whole[:2])


def test_density_0_drops_all_and_1_keeps_all_whatever_epsilon_says():
    delta = shuffled((3, 4))
    assert della_linear([delta], density=0.0, epsilon=0.5).count_nonzero() == 0
    assert della_linear([delta], density=1.0, epsilon=0.5).equal(delta)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.15, 0.15), (0.85, 0.15), (0.9, 0.15), (0.5, 0.5)])
@pytest.mark.parametrize("method", [della, della_linear])
def test_probabilities_outside_of_their_range_are_refused_before_the_merge(method, density, epsilon):
    with pytest.raises(ParameterError, match=rf"'{method.name}': density {density:g} with epsilon {epsilon:g}.*below"):
        method([torch.ones(3)], density=density, epsilon=epsilon)
    one, base = {"w": torch.ones(3)}, {"w": torch.zeros(3)}
    with pytest.raises(ParameterError, match="set epsilon below"):
        hf_merge.merge_state_dicts([one], method=method.name, base_model=base, density=density, epsilon=epsilon)


def test_consensus_and_sum_of_what_was_kept():
    a, b = shuffled((50, 40), 1), shuffled((50, 40), 2)
    settings = {"density": 0.5, "seed": [1, 2]}
    kept = [della_linear([d], density=0.5, seed=[s]) for d, s in ((a, 1), (b, 2))]
    weight = [0.5, 2.0]
    torch.testing.assert_close(della_linear([a, b], weight=weight, **settings), 0.5 * kept[0] + 2 * kept[1])
    expected = get_method("ties")(kept, weight=weight)
    torch.testing.assert_close(della([a, b], weight=weight, **settings), expected)
