"""The studies, as `hf-merge study` runs them, on models and images of their own."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification, CLIPConfig, CLIPModel, CLIPVisionModel

from hf_merge.errors import DataError, OutputExistsError, ParameterError, RecipeError, SourceError
from hf_merge.study.images import DRAWN
from hf_merge.study.protocol import Outcome
from hf_merge.study.report import lines_of, markdown, picture
from hf_merge.study.spec import MethodEntry, Study, spread
from hf_merge.study.story import run_study
from hf_merge.study.suite import Suite
from hf_merge.study.tasks import GENERIC, THIRTY, examples

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMAND = [sys.executable, "-m", "hf_merge.cli", "study", "vision8", "--quick", "--tasks", "4", "--format", "human"]
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def study(output, cache):
    call = [*COMMAND, "--cache-dir", str(cache), str(output)]
    done = subprocess.run(call, capture_output=True, text=True, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    start = time.perf_counter()
    text = study(place / "out", place / "cache")
    return place, text, time.perf_counter() - start


def table(folder):
    with open(folder / "table.csv", encoding="utf-8", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.e2e
def test_methods_stand_in_the_order_of_the_field(built):
    place, text, seconds = built
    normalised = {name: float(row["normalised"]) for name, row in table(place / "out").items()}
    assert normalised["individual"] == 1
    assert normalised["tsv_c"] >= 0.95 and normalised["emr"] >= 0.8
    assert normalised["tsv_c"] > normalised["tsv_m"] > normalised["average"] > normalised["zero-shot"] + 0.02
    assert normalised["task_arithmetic"] > normalised["average"]
    assert "tsv_c" in text and str(place / "out") in text
    assert seconds < 240 or os.getloadavg()[0] > 2, "the small suite should be built and measured in four minutes"


@pytest.mark.slow
@pytest.mark.e2e
def test_second_run_takes_the_models_and_gives_the_same_numbers(built, tmp_path):
    """The first has written down what it did: from that, a mean, a random method, one by steps, and experts."""
    place, _, _ = built
    weights = next((place / "cache").glob("vision8-*/base/model.safetensors"))
    before, first = weights.stat().st_mtime_ns, table(place / "out")
    said = yaml.safe_load((place / "out" / "study.yaml").read_text())
    kept = {"average", "dare_linear", "wudi", "emr", "tsv_c"}
    said["methods"] = [each for each in said["methods"] if each.get("name") in kept or each["method"] in kept]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said))
    Suite.of("vision8", count=4, quick=True, cache_dir=place / "cache").build()
    run_study(tmp_path / "study.yaml", tmp_path / "again")
    again = table(tmp_path / "again")
    assert weights.stat().st_mtime_ns == before and kept < again.keys()
    told = {"seconds": "", "rank": ""}  # a rank depends on what else there is
    assert all({**first[name], **told} == {**row, **told} for name, row in again.items())


@pytest.mark.slow
@pytest.mark.e2e
def test_models_are_ordinary_folders_with_the_frozen_head_of_the_base(built):
    place, _, _ = built
    folder = next((place / "cache").glob("vision8-*"))
    base, digits = (AutoModelForImageClassification.from_pretrained(folder / name) for name in ("base", "digits"))
    assert digits.config.id2label[3] == "3" and base.config.id2label[3] == "digits/3"
    assert torch.equal(base.classifier.weight[:10], digits.classifier.weight)
    norm = "vit.layernorm.weight"
    assert torch.equal(base.state_dict()[norm], digits.state_dict()[norm])
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "base",
        "digits",
        "runes",
        "textures",
        "counts",
    }


@pytest.mark.slow
@pytest.mark.e2e
def test_file_with_folders_of_images_gives_the_accuracies_of_its_images(built, tmp_path):
    place, _, _ = built
    image = pytest.importorskip("PIL.Image")
    suite = Suite.of("vision8", count=4, quick=True, cache_dir=place / "cache")
    expected = {}
    for task in ("digits", "counts"):
        images, labels = examples(task, "test", 60, 0)
        names = suite.tasks[task].classes
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            folder = tmp_path / task / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            data = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            image.fromarray(data).save(folder / f"{number:03}.png")
        model = AutoModelForImageClassification.from_pretrained(suite.folder / task)
        expected[task] = (model(images).logits.argmax(1) == labels).double().mean().item()
    said = {
        "base": str(suite.folder / "base"),
        "tasks": [{"name": t, "model": str(suite.folder / t), "dataset": str(tmp_path / t)} for t in expected],
        "methods": [{"method": "linear"}, {"method": "task_arithmetic", "grid": {"lambda": [0.0, 0.5]}}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said))
    done = run_study(tmp_path / "study.yaml", tmp_path / "out")
    individual = next(line.outcome for line in done.lines if line.outcome.kind == "individual")
    for task, accuracy in expected.items():
        assert len(individual.right[task]) == 48  # every fifth is for choosing coefficients
        assert abs(individual.accuracy(task) - accuracy) < 0.15
    assert Study.load(tmp_path / "out" / "study.yaml") == Study.load(tmp_path / "study.yaml")


def test_vision_towers_are_judged_by_the_names_of_their_classes(tmp_path):
    """The fine-tunes are the base, changed where it does not matter: all accuracies are those of CLIP itself."""
    save_clip(tmp_path)
    from PIL import Image

    for task in ("a", "b"):
        for name in ("cat", "dog"):
            (tmp_path / task / name).mkdir(parents=True)
            for number in range(5):
                colour = (40 * number, 200 if name == "cat" else 20, 90)
                Image.new("RGB", (16, 16), colour).save(tmp_path / task / name / f"{number}.png")
    head = {"model": str(tmp_path / "clip"), "classes": ["cat", "dog"]}
    said = {
        "base": str(tmp_path / "clip"),
        "tasks": [
            {"name": t, "model": str(tmp_path / "tower"), "dataset": str(tmp_path / t), "head": head} for t in "ab"
        ],
        "methods": [{"method": "linear"}, {"method": "emr"}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said))
    lines = run_study(tmp_path / "study.yaml", tmp_path / "out").lines
    assert [line.rank for line in lines] == [1] * 4 and {len(one) for one in lines[0].outcome.right.values()} == {8}
    assert "1=" in (tmp_path / "out" / "table.md").read_text()


def save_clip(folder):
    from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

    from tests.tiny_tokenizers import word_level

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 16, "max_position_embeddings": 12, "eos_token_id": 1},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPVisionModel.from_pretrained(folder / "clip").save_pretrained(folder / "tower")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level(["a", "photo", "of", "cat", "dog", "."]), eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "clip")


@pytest.mark.e2e
def test_interrupted_build_leaves_no_model(tmp_path):
    call = [*COMMAND, "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "out")]
    process = subprocess.Popen(call, env=OFFLINE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if list(tmp_path.glob("cache/vision8-*/.lock")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not list(tmp_path.rglob("config.json")) and not (tmp_path / "out").exists()


def test_every_task_draws_the_same_pictures_for_a_seed_and_others_in_its_own_style():
    for name, task in THIRTY.items():
        one, again, plain = (
            task.images(24, torch.Generator().manual_seed(3), style) for style in (None, None, GENERIC)
        )
        assert torch.equal(one[0], again[0]) and torch.equal(one[1], plain[1]), name
        assert one[0].shape == (24, 3, 32, 32) and bool((one[0].abs() <= 1).all()), name
        assert not torch.equal(one[0], plain[0]), name
        inside = task.draw(torch.arange(len(task.classes)), torch.Generator().manual_seed(1))
        assert bool((inside > 0).flatten(1).any(1).all()), f"{name} has a class without a picture"


def outcome(name, kind, right):
    return Outcome(name, kind, {"t": torch.tensor(right, dtype=torch.bool)})


def test_lines_that_differ_by_less_than_their_error_share_a_rank():
    own = outcome("individual", "individual", [1] * 98 + [0] * 2)
    near = outcome("near", "static", [1] * 50 + [0] * 50)
    other = outcome("other", "static", [0] * 3 + [1] * 46 + [0] * 51)  # four fewer, and no other
    far = outcome("far", "static", [1] * 20 + [0] * 80)
    lines = lines_of([far, other, own, near])
    assert [(line.outcome.name, line.rank) for line in lines] == [
        ("individual", 1), ("near", 2), ("other", 3), ("far", 4),
    ]  # fmt: skip
    swapped = outcome("swapped", "static", [0] * 9 + [1] * 49 + [0] * 42)
    ranks = {line.outcome.name: line.rank for line in lines_of([far, swapped, own, near])}
    assert ranks["near"] == ranks["swapped"] == 2 and ranks["far"] == 4
    assert "| 2= | near |" in markdown(lines_of([far, swapped, own, near]))


def test_the_picture_has_a_bar_for_every_line(tmp_path):
    pytest.importorskip("matplotlib")
    picture(lines_of([outcome("individual", "individual", [1] * 9), outcome("emr", "experts", [1, 0] * 4 + [1])]),
            tmp_path / "table.png", "two lines")  # fmt: skip
    with pytest.importorskip("PIL.Image").open(tmp_path / "table.png") as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 200
        colours = {tuple(colour[:3]) for _, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert len(colours) > 4, "axes and two bars of different colours"


def test_examples_can_be_read_and_the_first_names_the_methods_that_are_the_default():
    eight, thirty = (Study.load(EXAMPLES / f"{name}.yaml") for name in ("vision8", "vision30"))
    assert len(eight.tasks) == 8 and len(thirty.tasks) == 30
    assert eight.methods == thirty.methods
    assert spread(range(8), 4) == [0, 2, 4, 6] and [task.name for task in thirty.part(2).tasks] == ["mnist", "stl10"]


TASKS = [{"name": name, "model": name, "dataset": "images"} for name in "ab"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"tasks": TASKS}, "base"),
        ({"base": "x", "tasks": TASKS[:1]}, "tasks"),
        ({"base": "x", "tasks": [TASKS[0], TASKS[0]]}, "more than one task called a"),
        ({"base": "x", "tasks": TASKS, "methods": [{"method": "tsv"}]}, "tsv"),
        ({"base": "x", "tasks": TASKS, "methods": [{"method": "ties", "grid": {"density": []}}]}, "grid.density"),
        ({"base": "x", "tasks": [TASKS[0], {**TASKS[1], "dataset": {"drawn": "digit"}}]}, "mean 'digits'"),
        ({"base": "x", "tasks": [TASKS[0], {"name": "b", "model": "b", "dataset": {}}]}, "one of path and drawn"),
    ],
)
def test_study_that_cannot_be_meant(said, told):
    with pytest.raises(RecipeError, match=told):
        Study.load(said)


def test_what_is_wrong_is_said_before_anything_is_built(tmp_path):
    with pytest.raises(ParameterError, match="between 2 and 8"):
        run_study("vision8", tmp_path / "out", tasks=9, cache_dir=tmp_path / "cache")
    with pytest.raises(ParameterError, match="seed"):
        run_study("vision8", tmp_path / "out", seed=-1, cache_dir=tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="holds no study"):
        run_study("vision8", tmp_path / "mine", cache_dir=tmp_path / "cache")
    with pytest.raises(RecipeError, match="cannot be read"):
        run_study(tmp_path / "none.yaml", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_method_tries_all_its_settings():
    entry = MethodEntry(method="ties", parameters={"density": 0.2}, grid={"lambda": [1, 2], "consensus": ["sum"]})
    assert entry.settings() == [
        {"density": 0.2, "lambda": 1, "consensus": "sum"},
        {"density": 0.2, "lambda": 2, "consensus": "sum"},
    ]


def test_images_or_models_that_cannot_be_used(tmp_path):
    said = {"base": str(tmp_path / "base"), "tasks": [{**task, "model": str(tmp_path / "x")} for task in TASKS]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(DataError, match="dataset of task a"):
        run_study(tmp_path / "study.yaml", tmp_path / "out", local_files_only=True)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").touch()
    for task in said["tasks"]:
        task["dataset"] = str(tmp_path / "images")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(SourceError, match="cannot be loaded"):
        run_study(tmp_path / "study.yaml", tmp_path / "out", local_files_only=True)
    assert not (tmp_path / "out").exists()


def test_drawn_images_of_a_split_are_others():
    one, two = (examples("digits", split, 40, 0)[0] for split in DRAWN)
    assert not torch.equal(one, two)
