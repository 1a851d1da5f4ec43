"""Backbones with task experts and routers on the Hub: one repository, loaded and routed in a process of its own."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

import hf_merge
from hf_merge import demo
from hf_merge.study.training import calm
from tests.experts import families
from tests.hub.conftest import Account

pytestmark = pytest.mark.e2e

METHODS = {"free": {"density": 0.2}, "twin": {}}

# Code that runs a mixed batch by the router and says how many are right among the classes of their own task.
ROUTED = """
import torch
from hf_merge import demo
def routed_accuracy(model, images, labels, tasks):
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=some).logits for some in images.split(25)])
    spans = [demo._span(list(demo.TASKS)[task]) for task in tasks.tolist()]
    right = [int(row[span].argmax()) + span.start == label
             for row, span, label in zip(logits, spans, labels.tolist(), strict=True)]
    return sum(right) / len(right)
"""


@pytest.fixture
def trained(demo_run):
    """The demo's three fine-tunes and their base; one thread is best for models this small."""
    with calm():
        yield demo_run / "models"


def drawn(count, seed):
    """Images of all tasks, shuffled: (images, labels among all classes, tasks)."""
    parts = [demo._images(task, count, torch.Generator().manual_seed(seed + i)) for i, task in enumerate(demo.TASKS)]
    order = torch.randperm(count * len(parts), generator=torch.Generator().manual_seed(seed))
    tasks = torch.arange(len(parts)).repeat_interleave(count)
    return tuple(
        torch.cat(part)[order] for part in ([x for x, _ in parts], [y for _, y in parts], [*tasks.split(count)])
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_routed_model_from_the_hub_is_as_accurate_as_the_one_that_was_saved(
    account: Account, trained, tmp_path, method
):
    models = [trained / task for task in demo.TASKS]
    folder = tmp_path / method
    hf_merge.merge(models, folder, method=method, base_model=trained / "base", tasks=[*demo.TASKS], **METHODS[method])
    images, _, tasks = drawn(250, 900)
    unlabelled = {task: [images[tasks == place]] for place, task in enumerate(demo.TASKS)}
    config = hf_merge.train_router(folder, unlabelled).config
    assert config.accuracy > 0.9 and config.soft == (method == "twin")
    here = {}
    exec(ROUTED, here)
    images, labels, tasks = drawn(60, 100)
    model = hf_merge.load_experts(folder)
    stored = here["routed_accuracy"](model, images, labels, tasks)
    assert model.task is None and len({*model(images[:20]).tasks}) == 3
    model.use_router(None)
    backbone = here["routed_accuracy"](model, images, labels, tasks)
    assert stored > backbone + 0.1
    save_file({"images": images, "labels": labels, "tasks": tasks}, tmp_path / "batch.safetensors")
    account.python(
        "import hf_merge\nresult = hf_merge.push_to_hub(folder, f'{org}/routed').oid",
        token=account.write, folder=str(folder),
    )  # fmt: skip
    found, kind, soft, accuracy = account.python(
        ROUTED + "import hf_merge\nfrom safetensors.torch import load_file\n"
        "model = hf_merge.load_experts(f'{org}/routed')\n"
        "result = [routed_accuracy(model, **load_file(batch)), model.router.config.kind, model.soft,\n"
        "          model.router.config.accuracy]",
        token=account.read, batch=str(tmp_path / "batch.safetensors"),
    )  # fmt: skip
    assert (found, kind, soft, accuracy) == (stored, "trained", method == "twin", config.accuracy)
    files = account.hub.store.repos[f"{account.name}/routed"].commit("main").files
    card = files["README.md"].content.decode()
    assert (
        f"It knew the task of {100 * config.accuracy:.1f} %" in card
        and f'load_experts("{account.name}/routed")' in card
    )


def test_it_is_merged_straight_into_the_hub_and_pushed_on_with_another_router(account: Account, tmp_path):
    family = families.vit(tmp_path / "vit")
    pushed = account.python(
        "import hf_merge\n"
        "words = {'base_model': base, 'tasks': tasks, 'push_to_hub': f'{org}/m', 'private': True}\n"
        "made = hf_merge.merge(models, method='emr', **words)\n"
        "model = made.load()\n"
        "result = [made.repo_id, made.commit, model.tasks, str(made.path), model.folder is None]",
        token=account.write, models=[str(one) for one in family.models.values()], base=str(family.base),
        tasks=[*family.models],
    )  # fmt: skip
    repo = account.hub.store.repos[f"{account.name}/m"]
    assert pushed == [f"{account.name}/m", repo.commit("main").sha, [*family.models], "None", True] and repo.private
    files = repo.commit("main").files
    for task in ("shared", *family.models):
        config = json.loads(files[f"experts/{task}/adapter_config.json"].content)
        assert config["base_model_name_or_path"] == f"{account.name}/m"
    assert str(tmp_path).encode() not in b"".join(blob.content for blob in files.values())
    assert yaml.safe_load(files["hf_merge_recipe.yaml"].content)["tasks"] == [*family.models]
    said, kind, is_same, routed = account.python(
        "import hf_merge, torch\n"
        "model = hf_merge.load_experts(f'{org}/m')\n"
        "data = {task: [torch.randn(9, 3, 16, 16) + 3 * i] for i, task in enumerate(model.tasks)}\n"
        "try:\n    hf_merge.train_router(model, data)\n"
        "except hf_merge.ParameterError as error:\n    said = str(error)\n"
        "hf_merge.train_router(model, data, kind='prototypes', save=False)\n"
        "model.push_to_hub(f'{org}/routed')\n"
        "again = hf_merge.load_experts(f'{org}/routed')\n"
        "hf_merge.load_experts(f'{org}/routed', router=None).push_to_hub(f'{org}/bare')\n"
        "batch = torch.cat([one[0] for one in data.values()])\n"
        "result = [said, again.router.config.kind, again.route(batch) == model.route(batch), again.route(batch)]",
        token=account.write,
    )
    assert "was loaded from the Hub" in said and "save=False" in said
    assert kind == "prototypes" and is_same and {*routed} == {*family.models}
    assert not [path for path in repo.commit("main").files if path.startswith("router")]
    routed_files = account.hub.store.repos[f"{account.name}/routed"].commit("main").files
    assert {"router/router.json", "router/router.safetensors"} < routed_files.keys()
    bare = account.hub.store.repos[f"{account.name}/bare"].commit("main").files
    assert bare.keys() == routed_files.keys() - {"router/router.json", "router/router.safetensors"}
    assert b"## Router" not in bare["README.md"].content
    named = json.loads(routed_files["experts/cars/adapter_config.json"].content)["base_model_name_or_path"]
    assert named == f"{account.name}/routed" and b"## Router" in routed_files["README.md"].content


def test_what_the_hub_has_not_is_named(account: Account):
    kind, said = account.python(
        "import hf_merge\n"
        "try:\n    hf_merge.load_experts(f'{org}/nothing')\n"
        "except hf_merge.MergeError as error:\n    result = [type(error).__name__, str(error)]",
        token=account.read,
    )
    assert kind == "SourceError" and f"{account.name}/nothing" in said
