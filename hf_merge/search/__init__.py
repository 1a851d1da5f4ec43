"""Coefficients found by running models on data: AdaMerging, greedy soups. What is left is a recipe."""

from hf_merge.search.learning import Learnt, adamerging
from hf_merge.search.soups import Soup, accuracy, greedy_soup

__all__ = ["Learnt", "Soup", "accuracy", "adamerging", "greedy_soup"]
