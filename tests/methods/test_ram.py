"""RAM and RAM+ by hand."""

import pytest
import torch

from hf_merge.method import get_method

A = torch.tensor([1.0, 2.0, 0.0, 0.0, -3.0])
B = torch.tensor([3.0, 0.0, 4.0, 0.0, -1.0])


def test_shared_entries_are_averaged_and_lone_ones_kept():
    assert get_method("ram")([A, B]).tolist() == [2, 2, 4, 0, -2]


def test_entries_up_to_epsilon_count_as_unchanged():
    assert get_method("ram")([A, B], epsilon=1.0).tolist() == [3, 2, 4, 0, -3]


def test_lone_entries_are_raised_by_the_ratio_of_shared_ones():
    # A and B: two shared entries, one lone each: ratio 2, cut to alpha
    merged = get_method("ramplus_tl")([A, B], r=0.5, alpha=0.4)
    assert merged.tolist() == pytest.approx([2, 2 * 1.2, 4 * 1.2, 0, -2])
    merged = get_method("ramplus_tl")([A, B], r=0.5, alpha=10.0)
    assert merged.tolist() == pytest.approx([2, 2 * 2.0, 4 * 2.0, 0, -2])


def test_model_without_lone_entries_has_nothing_to_raise():
    assert get_method("ramplus_tl")([A, A]).equal(A)
