"""Whether compiled loops can be had here."""

import warnings

import pytest

from hf_merge.ops import loops

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that they cannot be is no error of a test
    needs_loops = pytest.mark.skipif(not loops.is_available(), reason="needs numba, with the bits of torch")
