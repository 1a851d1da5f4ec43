"""Methods without released vectors, against their papers' formulas in numpy and float64, on golden inputs."""

import numpy as np
import pytest

import hf_merge
from tests.test_golden import PAPERS, inputs

pytestmark = pytest.mark.skipif(not PAPERS.is_dir(), reason="no golden data beside the checkout")


def components(matrix):
    """Yield the singular values and the outer products of singular vectors, the largest first."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    for j in range(len(s)):
        yield s[j], np.outer(u[:, j], vh[j])


def star(base, models, eta=0.4):
    """Truncate to the least rank that holds eta of the nuclear norm, rescale to all of it, average (2502.10339)."""
    changes = [model - base for model in models]
    if base.ndim != 2:
        return base + sum(changes) / len(changes)
    total = np.zeros_like(base)
    for change in changes:
        nuclear = sum(s for s, _ in components(change))
        held, kept = 0.0, np.zeros_like(base)
        for s, outer in components(change):
            if nuclear and held < eta * nuclear:
                held, kept = held + s, kept + s * outer
        total += kept * (nuclear / held if held else 0)
    return base + total / len(changes)


def cart(base, models, rank_fraction=0.08, scaling=1.0):
    """Add to the average the first directions of what each model differs by from it (2412.12153)."""
    mean = sum(models) / len(models)
    if base.ndim != 2:
        return mean
    rank = max(1, int(rank_fraction * min(base.shape)))
    added = np.zeros_like(base)
    for model in models:
        for s, outer in list(components(model - mean))[:rank]:
            added += s * outer
    return mean + scaling * added


def svc(base, models, alpha=None):
    """Divide each singular value of the sum by how much its left direction was amplified (2602.05536)."""
    changes = [model - base for model in models]
    merge, count = sum(changes), len(changes)
    if base.ndim != 2 or not merge.any():
        return base + merge
    u, s, vh = np.linalg.svd(merge, full_matrices=False)
    for r in range(len(s)):
        response, amplified = u[:, r] @ merge, 0.0
        for change in changes:
            own = u[:, r] @ change
            projected = response @ own / (own @ own) if own.any() else 0.0
            amplified += max(1 / count if alpha is None else alpha, projected)
        s[r] *= count / amplified
    return base + u @ np.diag(s) @ vh


CASES = {
    "star": (star, {}), "star-most": (star, {"eta": 0.9}), "star-all": (star, {"eta": 1.0}),
    "cart": (cart, {}), "cart-half": (cart, {"rank_fraction": 0.5, "scaling": 0.3}),
    "svc": (svc, {}), "svc-one": (svc, {"alpha": 1.0}), "svc-low": (svc, {"alpha": 0.1}),
}  # fmt: skip


def floats(state):
    return {name: tensor.double().numpy() for name, tensor in state.items() if tensor.is_floating_point()}


def assert_near(merged, expected, tolerance):
    for name, array in expected.items():
        assert np.abs(merged[name].double().numpy() - array).max() <= tolerance, name


@pytest.mark.parametrize("name", ["inputs_clip3", "inputs_hfvit5"])
@pytest.mark.parametrize("case", CASES)
def test_a_spectral_method_is_its_papers_formula(case, name):
    by, words = CASES[case]
    base, models = inputs(name)
    merged = hf_merge.merge_state_dicts(models, method=by.__name__, base_model=base, **words)
    arrays, others = floats(base), [floats(model) for model in models]
    expected = {key: by(one, [other[key] for other in others], **words) for key, one in arrays.items()}
    assert_near(merged, expected, 5e-6)


@pytest.mark.parametrize("name", ["inputs_clip3", "inputs_hfvit5"])
def test_metagpt_has_the_coefficients_of_its_paper(name):
    """Each is a task vector's share of the squared norms of all, over the whole model (2406.11385)."""
    base, models = inputs(name)
    merged = hf_merge.merge_state_dicts(models, method="metagpt", base_model=base)
    start = floats(base)
    changes = [{key: one - start[key] for key, one in floats(model).items()} for model in models]
    energy = np.array([sum(np.sum(one**2) for one in change.values()) for change in changes])
    shares = energy / energy.sum()
    expected = {
        key: one + sum(share * change[key] for share, change in zip(shares, changes, strict=True))
        for key, one in start.items()
    }
    assert_near(merged, expected, 5e-7)
