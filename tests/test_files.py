"""Single files of weights: plain PyTorch networks in and a safetensors file out, with names mapped and chosen."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hf_merge


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def recurrent():
    return nn.ModuleDict({"embedding": nn.Embedding(8, 4), "rnn": nn.LSTM(4, 5, num_layers=2), "head": nn.Linear(5, 3)})


def states(make, count=2):
    torch.manual_seed(0)
    return [make().state_dict() for _ in range(count)]


def cli(*arguments, status=0):
    run = subprocess.run([sys.executable, "-m", "hf_merge.cli", *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == status, run.stderr
    return run.stdout + run.stderr


@pytest.mark.parametrize("make", [convolutional, recurrent])
@pytest.mark.parametrize("kinds", [(".pth", ".ckpt"), (".safetensors", ".bin"), (".pt", ".safetensors")])
def test_files_of_every_kind_give_a_safetensors_file(make, kinds, tmp_path):
    files = [tmp_path / f"{i}{kind}" for i, kind in enumerate(kinds)]
    models = states(make)
    for file, state in zip(files, models, strict=True):
        if file.suffix == ".safetensors":
            save_file(state, file)
        else:
            torch.save({"state_dict": state} if file.suffix == ".ckpt" else state, file)
    merged = hf_merge.merge(files, tmp_path / "out.safetensors", method="linear")
    assert merged.path == tmp_path / "out.safetensors" and sorted(tmp_path.iterdir()) == sorted([*files, merged.path])
    written = load_file(merged.path)
    assert written.keys() == models[0].keys()
    for name, tensor in written.items():
        expected = (models[0][name] + models[1][name]) / 2 if tensor.is_floating_point() else models[0][name]
        assert tensor.equal(expected) and tensor.dtype == models[0][name].dtype
    network = make()
    network.load_state_dict(written)
    with safe_open(merged.path, "pt") as file:
        assert "merge_method: linear" in file.metadata()["hf_merge_recipe"]
    with pytest.raises(hf_merge.MergeError, match="single file"):
        _ = merged.card


def test_names_are_remapped_before_they_are_compared(tmp_path):
    models = states(convolutional)
    torch.save(models[0], tmp_path / "a.pth")
    torch.save({f"module.net.{name}": tensor for name, tensor in models[1].items()}, tmp_path / "b.pth")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels: [{tmp_path}/a.pth, {tmp_path}/b.pth]\nkeys: strict\n"
        "remap: {'^module\\.': '', '^net\\.(\\d)': '\\1'}\n"
    )
    cli("merge", recipe, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["0.weight"].equal(
        (models[0]["0.weight"] + models[1]["0.weight"]) / 2
    )


@pytest.mark.parametrize(
    ("remap", "message"),
    [
        ({"(": "x"}, "'remap.*' should be a regular expression"),
        ({"w": r"\9"}, "cannot replace 'w'"),
        ({"weight|bias": "x"}, "would both be called"),
    ],
)
def test_remap_that_cannot_be_meant_is_refused(remap, message):
    with pytest.raises(hf_merge.MergeError, match=message):
        hf_merge.merge_state_dicts(states(convolutional), method="linear", remap=remap)


def merged(keys, method="linear", **words):
    one = {"both": torch.ones(2), "one": torch.ones(3)}
    two = {"both": torch.full((2,), 3.0), "two": torch.full((4,), 5.0)}
    return hf_merge.merge_state_dicts([one, two], method=method, keys=keys, **words)


def test_keys_choose_the_tensors_of_the_output():
    both = torch.full((2,), 2.0)
    common, union = merged("intersection"), merged("union")
    assert list(common) == ["both"] and common["both"].equal(both)
    told = hf_merge.plan([{"x": both, "y": both}, {"x": both}], method="linear", keys="intersection").problems
    assert [(one.severity, one.tensors) for one in told] == [("warning", ("y",))]
    assert list(union) == ["both", "one", "two"] and union["both"].equal(both)
    assert union["one"].equal(torch.ones(3)) and union["two"].equal(torch.full((4,), 5.0))
    three = {"both": torch.zeros(5)}
    told = hf_merge.plan([{"both": both}, three], method="linear", keys="union").errors[0].text
    assert "model 1' has other shapes" in told and "both [5] instead of [2]" in told
    with pytest.raises(hf_merge.PlanError, match=r"has tensors that .* lacks, and keys: strict"):
        merged("strict", missing="skip-model")
    with pytest.raises(hf_merge.PlanError, match="lacks tensors"):
        merged("base")


def test_union_averages_what_the_base_lacks_and_says_so():
    base = {"both": torch.zeros(2)}
    union = merged("union", method="task_arithmetic", base_model=base, weight=2.0)
    assert union["both"].equal(torch.full((2,), 8.0)) and union["two"].equal(torch.full((4,), 5.0))
    made = hf_merge.plan(
        [{"x": torch.ones(2)}, {"x": torch.zeros(2)}], method="ties", base_model={"y": torch.ones(1)}, keys="union"
    )
    (problem,) = made.problems
    assert problem.severity == "warning" and "The base lacks tensors" in problem.message and problem.tensors == ("x",)


def test_existing_file_is_kept_unless_it_is_to_be_overwritten(tmp_path):
    file = tmp_path / "out.safetensors"
    save_file({"old": torch.ones(1)}, file)
    before = file.read_bytes()
    with pytest.raises(hf_merge.OutputExistsError, match="overwrite"):
        hf_merge.merge(states(convolutional), file, method="linear")
    assert file.read_bytes() == before
    hf_merge.merge(states(convolutional), file, method="linear", overwrite=True)
    assert "0.weight" in load_file(file)
    with pytest.raises(hf_merge.OutputError, match="or holds the input"):
        hf_merge.merge([file, file.with_name("out.safetensors")][:1], file, method="passthrough", overwrite=True)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "folder.safetensors" / "notes.txt").write_text("mine")
    with pytest.raises(hf_merge.OutputExistsError):
        hf_merge.merge(states(convolutional), tmp_path / "folder.safetensors", method="linear", overwrite=True)


def test_pickles_are_not_written(tmp_path):
    with pytest.raises(hf_merge.OutputError, match=r"call it 'out\.safetensors'"):
        hf_merge.merge(states(convolutional), tmp_path / "out.pth", method="linear")


def test_failed_merge_leaves_no_file(tmp_path):
    models = states(convolutional)
    models[1]["0.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(hf_merge.ComputeError):
        hf_merge.merge(models, tmp_path / "out.safetensors", method="linear")
    assert not list(tmp_path.iterdir())


def test_check_says_whether_a_recipe_fits(llamas, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: linear\nmodels: [{llamas['a']}, {llamas['b']}]\n")
    said = json.loads(cli("check", recipe, "--json"))
    assert said["verdict"] == "fits" and said["plan"]["tensors"] == 30
    recipe.write_text(f"merge_method: ties\nmodels: [{llamas['a']}, {llamas['b']}]\n")
    assert "'ties' merges task vectors: pass base_model=" in cli("check", recipe, status=1)
    recipe.write_text(f"merge_method: linear\nmodels: [{llamas['a']}, {tmp_path}/nowhere]\n")
    assert "There is no model at" in cli("check", recipe, status=1)
    recipe.write_text("merge_method: linear\nmodels: [a]\nparamters: {}\n")
    assert "line 3: Unknown key 'paramters'. Did you mean 'parameters'?" in cli("check", recipe, status=1)
