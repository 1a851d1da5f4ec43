"""Recipes in the forms that MergeKit's users publish, unchanged but for the names of models, with small stand-ins."""

import re

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_merge
from tests.conftest import save_llamas

RECIPES = {
    "slerp with gradients by filter": """
slices:
  - sources:
      - {model: org/a, layer_range: [0, 8]}
      - {model: org/b, layer_range: [0, 8]}
merge_method: slerp
base_model: org/a
parameters:
  t:
    - filter: lm_head
      value: [0.55]
    - filter: embed_tokens
      value: [0.7]
    - filter: self_attn
      value: [0.65, 0.35]
    - filter: mlp
      value: [0.35, 0.65]
    - filter: layernorm
      value: [0.4, 0.6]
    - filter: modelnorm
      value: [0.6]
    - value: 0.5
dtype: bfloat16
""",
    "overlapping layers of one model": """
dtype: bfloat16
merge_method: passthrough
slices:
- sources:
  - layer_range: [0, 4]
    model: org/a
- sources:
  - layer_range: [2, 6]
    model: org/a
- sources:
  - layer_range: [4, 8]
    model: org/a
""",
    "block expansion by zeroed projections": """
slices:
  - sources: [{model: org/a, layer_range: [0, 6]}]
  - sources:
      - model: org/a
        layer_range: [5, 6]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - value: 1.0
  - sources: [{model: org/a, layer_range: [6, 8]}]
merge_method: passthrough
dtype: bfloat16
""",
    "halves of two models, then their mean": """
merge_method: linear
slices:
  - sources:
      - {model: org/a, layer_range: [0, 4], parameters: {weight: 0.5}}
      - {model: org/a, layer_range: [4, 8], parameters: {weight: 0.5}}
dtype: float16
""",
    "weighted average with the tokenizer of all": """
models:
  - model: org/a
    parameters: {weight: 1.0}
  - model: org/b
    parameters: {weight: 0.3}
  - model: org/c
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
tokenizer_source: union
""",
    "ties with gradients": """
models:
  - model: org/a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: org/b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: org/c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "dare_ties with a base that is listed": """
models:
  - model: org/base
    # no parameters necessary for base model
  - model: org/a
    parameters: {density: 0.53, weight: 0.4}
  - model: org/b
    parameters: {density: 0.53, weight: 0.3}
  - model: org/c
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: org/base
parameters:
  int8_mask: true
dtype: bfloat16
""",
    "model stock with leftovers of other methods": """
models:
  - model: org/a
  - model: org/b
  - model: org/c
merge_method: model_stock
base_model: org/base
parameters:
  filter_wise: false
  normalize: true
  int8_mask: true
dtype: bfloat16
tokenizer_source: base
chat_template: chatml
""",
    "della": """
merge_method: della
base_model: org/base
models:
  - {model: org/a, parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}}
  - {model: org/b, parameters: {weight: 0.5, density: 0.6}}
parameters: {lambda: 1.0, normalize: true}
dtype: bfloat16
tokenizer: {source: base}
""",
    "nuslerp without a base": """
merge_method: nuslerp
models:
  - {model: org/a, parameters: {weight: [0.2, 0.8]}}
  - {model: org/b, parameters: {weight: [0.8, 0.2]}}
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
dtype: bfloat16
""",
    "arcee_fusion with leftovers": """
models:
  - model: org/a
merge_method: arcee_fusion
base_model: org/base
parameters: {normalize: true, int8_mask: true, rescale: false}
dtype: float16
out_dtype: float16
tokenizer_source: base
""",
    "sce": """
models: [{model: org/a}, {model: org/b}, {model: org/c}]
merge_method: sce
base_model: org/base
parameters: {select_topk: 0.3}
dtype: bfloat16
""",
    "karcher": """
models: [{model: org/a}, {model: org/b}, {model: org/c}]
merge_method: karcher
parameters: {max_iter: 100, tol: 1e-5}
dtype: float16
""",
    "task arithmetic with a negative weight, by revision": """
merge_method: task_arithmetic
base_model: {model: {path: org/base}}
models:
  - model: {model: {path: org/a}}
    parameters: {weight: -0.5}
parameters: {lambda: 0.8}
dtype: torch.bfloat16
""",
    "stages": """
slices:
  - sources: [{model: org/a, layer_range: [0, 6]}]
  - sources: [{model: org/b, layer_range: [4, 8]}]
merge_method: passthrough
dtype: bfloat16
name: tall
---
models:
  - {model: tall, parameters: {weight: 0.5}}
  - {model: taller, parameters: {weight: 0.5}}
merge_method: linear
dtype: bfloat16
---
slices:
  - sources: [{model: org/b, layer_range: [0, 6]}]
  - sources: [{model: org/a, layer_range: [4, 8]}]
merge_method: passthrough
dtype: bfloat16
name: taller
""",
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A base with eight layers and three fine-tunes."""
    root = tmp_path_factory.mktemp("stand_ins")
    save_llamas(root, ("a", "b", "c"), num_hidden_layers=8)
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_unchanged(name, stand_ins, tmp_path):
    text = re.sub(r"\borg/(\w+)", rf"{stand_ins}/\1", RECIPES[name])
    (tmp_path / "recipe.yaml").write_text(text)
    merged = hf_merge.merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert not merged.plan.errors
    model, info = LlamaForCausalLM.from_pretrained(merged.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    asked = re.findall(r"(?:out_)?dtype: (?:torch\.)?(\w+)", text)[-1]
    assert model.dtype == getattr(torch, asked)
    assert model(input_ids=torch.arange(12)[None]).logits.isfinite().all()
    left_over = [problem.message for problem in merged.plan.problems if "has no effect" in problem.message]
    assert bool(left_over) == ("leftovers" in name)
