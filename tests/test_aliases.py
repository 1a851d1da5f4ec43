"""Names of parameters in other code: told where they are unknown, and never taken for the parameter."""

import pytest
import torch

import hf_merge
from hf_merge.aliases import _CALLED, told_alias
from hf_merge.errors import ParameterError
from hf_merge.method import get_method, list_methods

CASES = [
    ("task_arithmetic", "scaling_coef", "'lambda'"), ("ties", "scaling_factor", "'lambda'"),
    ("task_arithmetic", "scaling", "'lambda'"), ("magmax", "alpha", "'lambda'"),
    ("ties", "K", "'density' here (as a fraction: 20 percent are 0.2)"), ("ties", "topk", "'density'"),
    ("breadcrumbs", "threshold", "'density'"), ("dare_linear", "mask_rate", "1 - mask_rate"),
    ("ties", "merge_func", "'consensus' here (one of mean, sum and max)"), ("fr", "high_ratio", "'filter_ratio'"),
    ("consensus_ta", "prun_thre_k", "'k'"), ("pcb", "pcb_ratio", "'ratio'"), ("wudi", "iter_num", "'iterations'"),
    ("fisher", "minimal_fisher_weight", "'floor'"), ("regmean", "reduce_non_diagonal_ratio", "'scaling'"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "said"), CASES, ids=lambda part: str(part).split()[0])
def test_the_name_of_other_code_is_refused_and_the_right_one_told(method, name, said):
    base, *models = [{"w": torch.zeros(2)} for _ in range(3)]
    with pytest.raises(ParameterError) as caught:
        hf_merge.merge_state_dicts(models, method=method, base_model=base, **{name: 0.3})
    assert f"'{method}' has no parameter '{name}'" in str(caught.value)
    assert f"What other code calls '{name}' is " in str(caught.value) and said in str(caught.value)


def test_a_recipe_is_told_the_line_or_warned():
    text = "merge_method: task_arithmetic\nbase_model: org/b\nmodels: [org/a]\nparameters: {scaling_coef: 0.3}\n"
    with pytest.raises(ParameterError, match=r"^line 4: .* is 'lambda' here"):
        hf_merge.Recipe.from_yaml(text)
    base, model = {"w": torch.zeros(2)}, {"w": torch.zeros(2)}
    words = {"method": "task_arithmetic", "base_model": base, "parameters": {"scaling": 0.3}}
    (problem,) = hf_merge.plan([model], **words).problems  # `cart` has one of this name, which may be left over
    assert "'scaling' has no effect" in str(problem) and "is 'lambda' here" in str(problem)


def test_a_name_that_nobody_uses_is_still_compared_with_those_that_are_near():
    with pytest.raises(ParameterError, match="Did you mean 'density'"):
        get_method("ties").settings(1, {"densty": 0.5})


def test_every_name_that_is_told_is_a_parameter_of_some_method():
    parameters = {name for method in list_methods() for name in get_method(method).parameters}
    for own, _, others in _CALLED:
        assert own in parameters and own not in others.split()
    assert told_alias("K", ["weight"]) == ""
