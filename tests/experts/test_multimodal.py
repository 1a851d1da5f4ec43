"""Five checkpoints of a multi-modal model, of different heads and position tables, as plain state dicts."""

import pytest
import torch
from safetensors.torch import save_file

import hf_merge

METHODS = ["emr", "free", "twin", "tall", "tsv_c"]
WIDTH, LAYERS = 16, 2
TABLES = {"vqa": 12, "captioning": 12, "retrieval": 10, "nlvr2": 6, "in1k": 6}
"""Rows of the position table of images, which depend on their size: 480, 480, 384, 224 and 224 pixels."""
HEADS = {
    "vqa": {"beit3.pooler.norm.weight": (WIDTH,), "beit3.pooler.dense.weight": (WIDTH, WIDTH),
            "head.0.weight": (2 * WIDTH, WIDTH), "head.3.weight": (31, 2 * WIDTH)},
    "captioning": {"mlm_head.weight": (20, WIDTH), "mlm_head.bias": (20,)},
    "retrieval": {"language_head.weight": (8, WIDTH), "vision_head.weight": (8, WIDTH), "logit_scale": ()},
    "nlvr2": {"beit3.pooler.norm.weight": (WIDTH,), "beit3.pooler.dense.weight": (WIDTH, WIDTH),
              "head.norm1.weight": (4 * WIDTH,), "head.dense1.weight": (WIDTH, 4 * WIDTH)},
    "in1k": {"fc_norm.weight": (WIDTH,), "head.weight": (10, WIDTH), "head.bias": (10,)},
}  # fmt: skip
"""What each model has beside the encoder; two of them have a pooler."""


def encoder(rows):
    """Return the shapes of the encoder, which has a branch for images (A) and one for text (B)."""
    shapes = {
        "beit3.text_embed.weight": (20, WIDTH),
        "beit3.vision_embed.mask_token": (1, 1, WIDTH),
        "beit3.vision_embed.cls_token": (1, 1, WIDTH),
        "beit3.vision_embed.proj.weight": (WIDTH, 3, 4, 4),
        "beit3.vision_embed.proj.bias": (WIDTH,),
        "beit3.encoder.embed_positions.A.weight": (rows, WIDTH),
        "beit3.encoder.embed_positions.B.weight": (14, WIDTH),
    }
    for layer in range(LAYERS):
        for branch in "AB":
            names = [f"self_attn.{one}_proj.{branch}" for one in "kvq"] + [f"self_attn.out_proj.{branch}"]
            matrices = dict.fromkeys(names, (WIDTH, WIDTH))
            matrices |= {f"ffn.{branch}.fc1": (4 * WIDTH, WIDTH), f"ffn.{branch}.fc2": (WIDTH, 4 * WIDTH)}
            norms = {f"self_attn.inner_attn_ln.{branch}": WIDTH, f"self_attn_layer_norm.{branch}": WIDTH}
            norms |= {f"final_layer_norm.{branch}": WIDTH, f"ffn.{branch}.ffn_layernorm": 4 * WIDTH}
            vectors = {**{name: shape[0] for name, shape in matrices.items()}, **norms}
            before = f"beit3.encoder.layers.{layer}."
            shapes |= {f"{before}{name}.weight": shape for name, shape in matrices.items()}
            shapes |= {f"{before}{name}.weight": (size,) for name, size in norms.items()}
            shapes |= {f"{before}{name}.bias": (size,) for name, size in vectors.items()}
    return shapes


@pytest.fixture(scope="module")
def suite():
    """Return the base, and a fine-tune for each task."""
    generator = torch.Generator().manual_seed(3)

    def drawn(shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator)

    base = {name: drawn(shape) for name, shape in encoder(6).items()}
    base |= {"beit3.encoder.layer_norm.A.weight": drawn((WIDTH,)), "mim_head.weight": drawn((9, WIDTH))}
    models = {}
    for task, rows in TABLES.items():
        common = {name: base[name] + drawn(shape, 0.05) for name, shape in encoder(rows).items()
                  if base[name].shape == shape}  # fmt: skip
        table = {"beit3.encoder.embed_positions.A.weight": drawn((rows, WIDTH))}
        models[task] = {**common, **table, **{name: drawn(shape) for name, shape in HEADS[task].items()}}
    return base, models


@pytest.mark.parametrize("method", METHODS)
def test_five_models_merge_where_all_have_one_shape_and_come_back_whole(suite, method):
    base, models = suite
    merged = hf_merge.merge_state_dicts(models, method=method, base_model=base)
    table = "beit3.encoder.embed_positions.A.weight"
    common = encoder(6).keys() - {table}
    assert merged.tasks == list(models)
    assert merged.backbone.keys() == base.keys()
    for name in base.keys() - common:
        assert merged.backbone[name].equal(base[name]), name
    for i, (task, model) in enumerate(models.items()):
        assert merged.experts[i].fields.keys() == common
        assert merged.experts[i].own.keys() == {table, *HEADS[task]}
        found = merged.reconstruct(task)
        assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in model.items()}
        for name in (table, *HEADS[task]):
            assert found[name].equal(model[name]), name
        assert all(not found[name].equal(base[name]) for name in common)
        again = merged.reconstruct(i)
        assert all(again[name].equal(weight) for name, weight in found.items())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_common_merges_as_if_there_were_nothing_else(suite, method):
    base, models = suite
    common = encoder(6).keys() - {"beit3.encoder.embed_positions.A.weight"}
    whole = hf_merge.merge_state_dicts(models, method=method, base_model=base)
    alone = hf_merge.merge_state_dicts(
        [{name: model[name] for name in common} for model in models.values()],
        method=method, base_model={name: base[name] for name in common},
    )  # fmt: skip
    for i in range(len(models)):
        found, expected = whole.reconstruct(i), alone.reconstruct(i)
        assert expected.keys() == common
        assert all(found[name].equal(expected[name]) for name in common)


def test_heads_of_one_shape_are_merged_but_where_they_are_named(suite):
    base, models = suite
    base = {**base, "score.weight": torch.zeros(3, WIDTH)}
    models = {task: {**model, "score.weight": torch.full((3, WIDTH), float(i))}
              for i, (task, model) in enumerate(models.items())}  # fmt: skip
    merged = hf_merge.merge_state_dicts(models, method="emr", base_model=base)
    assert "score.weight" in merged.experts[0].fields
    apart = hf_merge.merge_state_dicts(models, method="emr", base_model=base, heads=["score.*"])
    for i, task in enumerate(models):
        assert "score.weight" in apart.experts[i].own
        assert apart.reconstruct(task)["score.weight"].equal(models[task]["score.weight"])
    assert apart.backbone["score.weight"].equal(base["score.weight"])


def test_a_tensor_of_all_models_that_the_base_lacks_is_each_models_own(suite):
    base, models = suite
    models = {task: {**model, "new": torch.full((2,), float(i))} for i, (task, model) in enumerate(models.items())}
    merged = hf_merge.merge_state_dicts(models, method="twin", base_model=base)
    assert "new" not in merged.backbone
    assert all(merged.reconstruct(task)["new"].equal(models[task]["new"]) for task in models)


def test_a_rule_that_names_models_leaves_the_others_the_backbone(tmp_path):
    names, taking = ("base", "a", "b", "c"), ("a", "c")
    states = {name: {"w": torch.randn(6, 5), "v": torch.randn(5)} for name in names}
    files = {name: str(tmp_path / f"{name}.safetensors") for name in names}
    for name, state in states.items():
        save_file(state, files[name])
    rules = [{"pattern": "w", "models": [files[name] for name in taking]}]
    for method in METHODS:
        merged = hf_merge.merge_state_dicts(
            [files[name] for name in "abc"], method=method, base_model=files["base"], rules=rules, tasks=list("abc")
        )
        two = hf_merge.merge_state_dicts(
            [{"w": states[name]["w"]} for name in taking], method=method, base_model={"w": states["base"]["w"]}
        )
        for task in "abc":
            expected = two.reconstruct(taking.index(task)) if task in taking else two.backbone
            assert merged.reconstruct(task)["w"].equal(expected["w"]), (method, task)
