"""Methods of papers on merging vision models, each on a case computed by hand."""

import math

import pytest
import torch

import hf_merge
from hf_merge.method import get_method


def t(*values):
    return torch.tensor(values)


def diag(*values):
    return torch.tensor(values).diag()


def call(name, *models, **parameters):
    return get_method(name)([*models], **parameters)


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-6, atol=atol)


ROTATED = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])


class TestTaskArithmetic:
    def test_negation_takes_a_task_away(self):
        merged = hf_merge.merge_state_dicts(
            [{"w": t(3.0, 1.0)}], method="task_arithmetic", base_model={"w": t(1.0, 1.0)}, weight=-0.5
        )
        assert merged["w"].tolist() == [0.0, 1.0]

    def test_an_analogy_is_a_sum_with_a_negative_weight(self):
        base, a, b, c = ({"w": t(*values)} for values in ((1.0, 1.0), (2.0, 1.0), (2.0, 4.0), (1.0, 2.0)))
        words = {"method": "task_arithmetic", "base_model": base, "weight": [-1.0, 1.0, 1.0]}
        merged = hf_merge.merge_state_dicts([a, b, c], **words)
        assert merged["w"].tolist() == [1.0, 5.0]  # base + (c + b - a)


class TestMagMax:
    def test_the_largest_change_counts_and_of_equal_ones_the_last(self):
        assert call("magmax", t(1.0, -3.0, 2.0, 0.0), t(-2.0, 1.0, -2.0, 0.0)).tolist() == [-2.0, -3.0, -2.0, 0.0]
        assert call("magmax", t(1.0), t(-1.0), t(0.5)).tolist() == [-1.0]


class TestConsensus:
    def test_what_one_task_alone_needs_goes(self):
        deltas = t(1.0, 1.0, 0.0), t(1.0, 0.0, 0.0), t(1.0, 0.0, 0.1)
        assert call("consensus_ta", *deltas).tolist() == [3.0, 0.0, 0.0]
        close(call("consensus_ta", *deltas, k=1), [3.0, 1.0, 0.1])

    def test_each_task_has_its_own_share(self):
        deltas = t(1.0), t(2.0)  # 1 > share * 2 and 2 > share * 1
        assert call("consensus_ta", *deltas, tall_mask_lambda=0.5).tolist() == [0.0]
        assert call("consensus_ta", *deltas, tall_mask_lambda=[0.4, 1.9]).tolist() == [3.0]
        assert call("consensus_ta", *deltas, tall_mask_lambda=[0.4, 2.0]).tolist() == [0.0]


class TestTies:
    DELTAS = (t(3.0, -1.0, 0.5, 2.0), t(1.0, 2.0, -0.5, -2.0))

    @pytest.mark.parametrize(
        ("consensus", "expected"),
        [("mean", [2.0, 2.0, 0.5, 2.0]), ("sum", [4.0, 2.0, 0.5, 2.0]), ("max", [3.0, 2.0, 0.5, 2.0])],
    )
    def test_consensus(self, consensus, expected):
        assert call("ties", *self.DELTAS, consensus=consensus).tolist() == expected

    def test_globally_a_draw_takes_the_sign_of_the_majority(self):
        assert call("ties", *self.DELTAS, scope="global").tolist() == [2.0, 2.0, 0.5, 2.0]
        assert call("ties", *(-d for d in self.DELTAS), scope="global").tolist() == [-2.0, -2.0, -0.5, -2.0]
        assert call("ties", *(-d for d in self.DELTAS)).tolist() == [-2.0, -2.0, 0.5, 2.0]

    def test_globally_one_more_is_kept_and_all_that_equal_it(self):
        delta = t(4.0, -3.0, 3.0, 2.0, 1.0)
        assert call("ties", delta, scope="global", density=0.2).tolist() == [4.0, -3.0, 3.0, 0.0, 0.0]
        assert call("ties", delta, density=0.2).tolist() == [4.0, 0.0, 0.0, 0.0, 0.0]
        assert call("ties", delta, scope="global", density=0.0).tolist() == [0.0] * 5


class TestPcb:
    def test_a_task_alone_keeps_its_winners(self):
        delta = torch.arange(1.0, 101.0)
        merged = call("pcb", delta, ratio=0.5, coefficient=1.0)
        clipped = delta.clamp(2.0, 99.0)  # sorted magnitudes at places 1 and 98
        assert merged[:51].count_nonzero() == 0
        close(merged[51:], clipped[51:])

    def test_against_the_formula_with_sorts(self):
        deltas = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)).double()
        magnitude = deltas.abs()
        ordered = magnitude.sort(1).values
        clipped = magnitude.clamp(ordered[:, 40:41], ordered[:, 3959:3960])
        low, high = ordered[:, 40:41], ordered[:, 3959:3960]
        share = (clipped - low) / (high - low)
        score = (3 * share**2).exp() * (deltas * (deltas.sign() * share).sum(0)).tanh()
        least = score.sort(1).values[:, 3800:3801]
        wins = (score.clamp(min=least) - least) / (score.amax(1, keepdim=True) - least)
        expected = (1.2 * deltas.sign() * clipped * wins).sum(0) / wins.sum(0).clamp(min=1e-12)
        close(call("pcb", *deltas), expected, atol=1e-9)
        close(call("pcb", *deltas.float()), expected.float(), atol=1e-5)


class TestTsvM:
    def test_orthogonal_tasks_are_added_up(self):
        a, b = torch.zeros(4, 6), torch.zeros(4, 6)
        a[:2, :3] = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, -1.0]])
        b[2:, 3:] = torch.tensor([[0.5, 0.0, 3.0], [1.0, 1.0, 1.0]])
        close(call("tsv_m", a, b), a + b)

    def test_directions_that_two_tasks_share_are_moved_apart(self):
        first, second = diag(2.0, 0.0), ROTATED @ diag(3.0, 0.0)
        merged = call("tsv_m", first, second)
        # left vectors at angles 0 and 0.5 go to 0.25 -+ pi/4; both right vectors are e_1, of which each keeps 1/sqrt(2)
        lean = 0.25 - math.pi / 4
        expected = torch.tensor([[2 * math.cos(lean) - 3 * math.sin(lean)], [2 * math.sin(lean) + 3 * math.cos(lean)]])
        close(merged, torch.cat([expected / math.sqrt(2), torch.zeros(2, 1)], 1))

    def test_vectors_are_averaged(self):
        assert call("tsv_m", t(1.0, 2.0), t(3.0, 2.0)).tolist() == [2.0, 2.0]


class TestIso:
    def test_the_spectrum_of_iso_c_is_flat(self):
        a, b = (torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
        before, after = torch.linalg.svdvals(a + b), torch.linalg.svdvals(call("iso_c", a, b))
        close(after, before.mean().expand(4))

    def test_iso_c_of_a_diagonal(self):
        close(call("iso_c", diag(4.0, 1.0), diag(1.0, 0.0)), diag(3.0, 3.0))
        close(call("iso_c", diag(4.0, 0.0)), diag(2.0, 0.0))

    def test_without_room_for_the_tasks_iso_cts_is_iso_c(self):
        a, b = (torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
        close(call("iso_cts", a, b, common_space_fraction=1.0), call("iso_c", a, b))

    def test_iso_cts_takes_directions_of_the_tasks(self):
        common, own = diag(4.0, 0.0, 0.0), diag(0.0, 1.0, 0.0)
        merged = call("iso_cts", common + own, common + diag(0.0, 0.0, 2.0), common_space_fraction=0.34)
        close(merged, diag(11 / 3, 11 / 3, 11 / 3))  # singular values 8, 1 and 2


class TestWudi:
    def test_the_closed_form_is_the_limit_of_the_steps(self):
        tasks = [torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        steps = call("wudi", *tasks, iterations=5000, learning_rate=1e-2)
        close(steps, call("wudi", *tasks, solution="closed_form"), atol=1e-4)

    def test_tasks_with_inputs_of_their_own_are_added_up_at_once(self):
        a, b = torch.zeros(3, 4), torch.zeros(3, 4)
        a[:, :2], b[:, 2:] = 1.5, torch.arange(6.0).view(3, 2)
        for solution in ("iterative", "closed_form"):
            close(call("wudi", a, b, solution=solution), a + b)


class TestFr:
    def test_a_constant_matrix_is_all_low_frequency(self):
        ones = torch.ones(16, 16)
        assert float(call("fr", ones).abs().max()) < 1e-6
        assert float(call("fr", ones, variant="reference", filter_ratio=0.7).abs().max()) < 1e-6
        close(call("fr", ones, cut=0.0), ones)

    def test_the_papers_coefficients_are_shares_of_the_mean_magnitude(self):
        merged = call("fr", t(1.0, -1.0), t(3.0, 3.0), variant="paper")
        close(merged, [0.25 + 2.25, -0.25 + 2.25])

    def test_the_papers_coefficients_are_of_the_whole_model(self):
        base = {"a": torch.zeros(2), "b": torch.zeros(6)}
        models = [{"a": torch.ones(2), "b": torch.zeros(6)}, {"a": torch.ones(2), "b": torch.full((6,), -1.0)}]
        merged = hf_merge.merge_state_dicts(models, method="fr", base_model=base, variant="paper")
        close(merged["a"], [1.0, 1.0])
        close(merged["b"], [-0.8] * 6)

    def test_the_released_code_leaves_vectors_and_can_align_tasks(self):
        assert call("fr", t(1.0, 2.0), variant="reference").tolist() == [0.0, 0.0]
        waves = torch.tensor([1.0, -1.0]).repeat(8, 4)
        close(call("fr", waves, 3 * waves, variant="reference"), 4 * waves)
        close(call("fr", waves, 3 * waves, variant="reference", with_align=True), 6 * waves)

    def test_blocks_are_filtered_apart(self):
        blocks = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        apart = torch.cat([call("fr", block, variant="reference") for block in blocks])
        whole = torch.cat(blocks)
        close(call("fr", whole, variant="reference", split=3), apart)
        assert not call("fr", whole, variant="reference").allclose(apart)


class TestStar:
    def test_weak_directions_go_and_the_nuclear_norm_stays(self):
        close(call("star", diag(4.0, 3.0, 1.0), diag(0.0, 0.0, 6.0), eta=0.5), diag(4.0, 0.0, 3.0))
        close(call("star", diag(4.0, 3.0, 1.0), eta=1.0), diag(4.0, 3.0, 1.0))


class TestCart:
    def test_main_directions_are_added_to_the_average(self):
        a, b = diag(9.0, 1.0), diag(1.0, 3.0)  # average 5, 2; differences +-4, -+1
        close(call("cart", a, b, rank_fraction=0.5, scaling=1.0), diag(5.0, 2.0))
        c = diag(1.0, 1.0)
        mean = (a + b + c) / 3
        rests = [torch.linalg.svd(one - mean) for one in (a, b, c)]
        expected = mean + 0.5 * sum(u[:, :1] * s[:1] @ vh[:1] for u, s, vh in rests)
        close(call("cart", a, b, c, rank_fraction=0.5, scaling=0.5), expected)

    def test_a_base_has_no_part(self):
        states = [{"w": torch.randn(4, 4, generator=torch.Generator().manual_seed(i))} for i in range(3)]
        without = hf_merge.merge_state_dicts(states[1:], method="cart")
        assert hf_merge.merge_state_dicts(states[1:], method="cart", base_model=states[0])["w"].equal(without["w"])


class TestSvc:
    def test_a_shared_direction_is_lowered(self):
        # merge diag(2, 1, 1): the first direction was amplified twice by both tasks, the others by one of them
        a, b = diag(1.0, 1.0, 0.0), diag(1.0, 0.0, 1.0)
        close(call("svc", a, b, alpha=1.0), diag(1.0, 1.0, 1.0))
        close(call("svc", a, b), diag(1.0, 4 / 3, 4 / 3))

    def test_a_merge_of_another_method_is_calibrated(self):
        a, b, merge = diag(1.0, 1.0, 0.0), diag(1.0, 0.0, 1.0), diag(4.0, 0.5, 0.0)
        found = call("svc", merge, a, b, merged=[True, False, False], alpha=1.0)
        close(found, diag(1.0, 0.5, 0.0))
        assert call("svc", t(5.0), t(1.0), t(2.0), merged=[True, False, False]).tolist() == [5.0]


class TestMetaGpt:
    def test_coefficients_are_shares_of_the_squared_norms_of_the_whole_model(self):
        base = {"a": torch.zeros(1), "b": torch.zeros(2)}
        models = [{"a": t(1.0), "b": t(0.0, 0.0)}, {"a": t(1.0), "b": t(1.0, -1.0)}]
        merged = hf_merge.merge_state_dicts(models, method="metagpt", base_model=base)
        close(merged["a"], [1.0])
        close(merged["b"], [0.75, -0.75])
