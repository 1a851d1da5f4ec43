"""The benchmark command runs at a tiny size; nothing is timed here but what it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from warnings import catch_warnings

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import adapters, caches, extraction, loading, many, peers, processes, rows, sharing, small
from benchmarks.__main__ import main
from benchmarks.cases import COPY, LOOP, MERGEKIT, OURS, TORCH, Case, Goal, Way
from benchmarks.checkpoints import checkpoints, moe_config, moe_shapes, vit_config, vit_shapes
from benchmarks.goals import verdicts
from benchmarks.large import Merge, recipe_of
from benchmarks.loops import LOOPS
from benchmarks.options import QUICK, Options, Sizes, llama_folders
from benchmarks.processes import Run
from benchmarks.tables import COLUMNS, case_table
from hf_merge.planning import default_workers

PAGE = "# Speed\n\n<!-- table -->\nold\n<!-- /table -->\n\nmore\n"


def read_table(markdown: str) -> list[dict[str, str]]:
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def tables_in(report: str) -> list[list[dict[str, str]]]:
    return [read_table(part) for part in report.split("\n\n") if part.startswith("|")]


def run_here(command, environment=None) -> Run:
    """Run a measured snippet without a process of its own: what it does is tested, not what it takes."""
    python, option, code, *arguments = command
    assert (python, option) == (sys.executable, "-c")
    said, begin, before = StringIO(), time.perf_counter(), sys.argv
    sys.argv = ["-c", *arguments]
    try:
        with redirect_stdout(said), catch_warnings(action="ignore"):  # a process only prints them
            exec(compile(code, "measured", "exec"), {"__name__": "measured"})
    except SystemExit as end:
        assert not end.code, said.getvalue()
    finally:
        sys.argv = before
    return Run(time.perf_counter() - begin, 0.1, 1e6, said.getvalue())


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Options:
    monkeypatch.setattr("benchmarks.processes.measure", run_here)
    monkeypatch.setattr("benchmarks.cases.measure", run_here)
    return Options(tmp_path / "models", QUICK, runs=1)


@pytest.fixture
def scratch(tmp_path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def test_the_command_measures_fresh_processes_and_writes_markdown_json_and_the_page(tmp_path):
    page, runs = tmp_path / "page.md", tmp_path / "runs.json"
    page.write_text(PAGE)
    words = ["--quick", "--only", "large,start", "--methods", "nuslerp", "--cold"]
    words += ["--folder", str(tmp_path / "models"), "--json", str(runs), "--write", str(page)]
    command = [sys.executable, "-m", "benchmarks", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-2000:]
    starting, large = tables_in(done.stdout)
    assert list(large[0]) == list(COLUMNS)
    assert [(row["case"], row["by"]) for row in starting] == [
        (f"hf-merge {case}, cold", by)
        for case in ("--help", "plan of local shards")
        for by in ("hf_merge", "import torch")
    ]
    assert [row["case"] for row in large] == ["nuslerp, 2 models, cold"] * 2
    assert [row["by"] for row in large] == ["hf_merge", "plain copy"]
    assert all(float(row["wall s"]) > 0 for row in (*starting, *large))
    assert float(large[0]["memory MB"]) > 1 and re.match(r"met: \d+ MB, at most 150", large[0]["goal"])
    assert float(large[1]["wall / ours"]) < 1 and re.match(r"(met|missed): -?[\d.]+ x \+ torch", large[1]["goal"])
    content = json.loads(runs.read_text())
    assert content["versions"]["torch"] == torch.__version__ and content["cores"] == os.cpu_count()
    assert content["cache"] == "cold" and [section["title"] for section in content["sections"]] == [
        "Starting", "Large models"
    ]  # fmt: skip
    (case,) = content["sections"][1]["cases"]
    assert case["runs"].keys() == {TORCH, COPY, OURS} and case["runs"][COPY][0]["wall"] > 0
    assert [goal["goal"] for goal in case["goals"]] == [{"beside": COPY, "bound": 2}, {"beside": OURS, "bound": 150}]
    begin, _, end = PAGE.partition("\nold\n")
    assert page.read_text() == f"{begin}\n\n{done.stdout.strip()}\n\n{end}"
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["llama-64x1"]


def test_help_says_what_the_groups_measure_without_importing_torch():
    code = "import sys, benchmarks.__main__ as b\ntry: b.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *said, imported = done.stdout.strip().splitlines()
    assert imported == "False"
    assert "  large     Merges of one large checkpoint, by method." in said


@pytest.mark.parametrize(
    "words, told",
    [
        (["--only", "huge"], "there is no group 'huge': choose from start, large, small"),
        (["--methods", "ties,tie"], "there is no method 'tie': choose from linear"),
        (["--runs", "0"], "'0' is not a number of runs"),
        (["--write", "nowhere.md"], "'nowhere.md' has no place for the report: put a line <!-- table --> there"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_measured(words, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert told in capsys.readouterr().err


def test_tiny_tensors_are_merged_beside_peers_and_timed_each(quick, scratch):
    (section,) = small.small(quick, scratch)
    cases, slope = map(read_table, section.tables)
    assert [row["case"] for row in cases] == ["48 tiny tensors"] * 3 + ["4 layers of 2 experts"] * 3
    assert [row["by"] for row in cases[:3]] == [OURS, COPY, LOOP] and list(slope[0]) == list(small.SLOPE_COLUMNS)
    assert [row["tensors"] for row in slope] == ["12", "21", "48", "4.00", "18", "33", "63", "3.50"]
    assert slope[3]["time per tensor"] == "tiny tensors: last / first"
    assert all(float(row["plan us / tensor"]) > 0 and float(row["merge us / tensor"]) > 0 for row in slope)


def test_the_mixture_of_tiny_experts_is_one_that_transformers_loads_whole(tmp_path):
    from transformers import AutoModelForCausalLM

    base = checkpoints(tmp_path, moe_shapes(2, 4), 0, moe_config(2, 4))[0]
    _, told = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_adapters_are_compared_with_peft_and_with_dense_matrices(quick, scratch):
    (section,) = adapters.adapter(quick, scratch)
    into_base, core, sums = map(read_table, section.tables)
    assert [row["by"] for row in into_base] == ["hf_merge", "plain copy", "PEFT"]
    exact = [row for row in sums if row["relative error of"].startswith("hf_merge")]
    assert len(exact) == 2 and all(float(row[case]) < 1e-5 for row in exact for case in adapters.SUM_COLUMNS[1:])
    assert len(sums) == 6 and float(core[0]["difference"]) < 1e-3 and float(core[0]["dense / core"]) > 0


def test_many_models_are_merged_beside_a_loop(quick, scratch):
    found = read_table(many.many(quick, scratch)[0].tables[0])
    assert list(found[0]) == list(many.COLUMNS)
    assert [row["many models"] for row in found] == ["fr, hf_merge", "fr, loop"]
    assert float(found[0]["wall / loop"]) > 0


@pytest.mark.parametrize(
    "group, columns, first",
    [
        (loading.load, loading.COLUMNS, list(loading._WAYS)),
        (extraction.extract, extraction.COLUMNS, ["the model, copied", "rank 4, sketches", "rank 4, exact"]),
        (rows.rows, rows.COLUMNS, ["500 x 896"]),
    ],
    ids=["load", "extract", "rows"],
)
def test_every_other_group_prints_its_table(group, columns, first, quick, scratch):
    found = read_table(group(quick, scratch)[0].tables[0])
    assert list(found[0]) == list(columns) and [row[columns[0]] for row in found] == first
    assert all(float(row[columns[1]]) > 0 for row in found)


def test_processes_share_threads_and_a_merge(quick, scratch, monkeypatch):
    asked = []

    def merge(*words: str, threads: int) -> Run:
        asked.append((int(words[words.index("--processes") + 1]), threads, Path(words[2 + words.index("--base")]).name))
        (scratch / "shared").mkdir()
        return Run(float(len(asked)), 0.1, 1e6, "")

    monkeypatch.setattr(sharing, "run_command", merge)
    found = read_table(sharing.processes(quick, scratch)[0].tables[0])
    assert [(row["processes"], row["threads each"]) for row in found] == [("1", "2"), ("1", "1"), ("2", "1")]
    assert asked == [(1, 2, "model-1")] * 2 + [(1, 1, "model-1")] * 2 + [(2, 2, "model-1")] * 2
    assert [row["wall / 1 process"] for row in found] == ["1.00", "3.00", "5.00"]


def test_a_command_gets_its_threads_and_its_words(quick):
    base, *models = map(str, llama_folders(quick.folder, 64, 1))
    output, threads = quick.folder / "merged", torch.get_num_threads()
    words = ["--method", "ties", "--base", base, *models, str(output), "--processes", "1", "-p", "density=0.5"]
    assert processes.run_command("merge", *words, threads=threads).wall > 0
    assert (output / "config.json").is_file() and torch.get_num_threads() == threads


def test_goals_are_judged_by_ratios_of_runs_that_followed_each_other(monkeypatch):
    def run(wall: float, memory: float = 0.0) -> Run:
        return Run(wall, wall, memory, "")

    monkeypatch.setattr("benchmarks.cases.measure", lambda command: run(1, 10e6))
    ways = [Way(name, lambda: run(0), ready=("imports",) * (name == OURS)) for name in (TORCH, COPY, OURS, MERGEKIT)]
    goals = [Goal(MERGEKIT, 10), Goal(COPY, 1.5), Goal(OURS, 100), Goal("PEFT", 5)]
    case = Case("linear", ways, goals)
    case.runs = {
        TORCH: [run(1), run(2), run(9)],
        COPY: [run(1), run(2), run(3)],
        OURS: [run(2, 90e6), run(6, 100e6), run(12, 110e6)],
        MERGEKIT: [run(30)],
    }
    told = {verdict.goal.beside: str(verdict) for verdict in verdicts(case)}
    assert told == {
        MERGEKIT: "met: 15.0 x, at least 10",  # 30 / 2, though 30 / median(ours) is 5
        COPY: "met: 1.00 x + torch, at most 1.5",  # median of 1, 2 and 1
        OURS: "met: 90 MB, at most 100",
    }
    case.runs[COPY] = [run(0.5), run(1), run(1)]
    case.goals = [Goal(MERGEKIT, 16), Goal(COPY, 1.5), Goal(OURS, 89)]
    assert [(one.found, one.met) for one in verdicts(case)] == [(15, False), (3, False), (90, False)]
    assert [row["by"] for row in read_table(case_table([case], cold=False))] == [OURS, COPY, MERGEKIT]


def test_a_cold_run_does_not_find_its_inputs_in_the_page_cache(tmp_path):
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("this system cannot tell what is in its page cache")
    (tmp_path / "weights").write_bytes(os.urandom(1 << 22))

    def is_cached() -> bool:
        with (tmp_path / "weights").open("rb") as file:
            try:
                return os.preadv(file.fileno(), [bytearray(4096)], 1 << 20, os.RWF_NOWAIT) == 4096
            except BlockingIOError:
                return False
            except OSError as error:
                pytest.skip(f"this file system cannot tell what is in the page cache: {error}")

    assert is_cached()
    caches.drop([tmp_path])
    assert not is_cached()
    caches.warm([tmp_path])
    assert is_cached()


def fake_mergekit(venv: Path, version: str, script: str) -> Path:
    """Make what looks like a virtual environment with MergeKit in it."""
    (venv / "bin").mkdir(parents=True)
    (venv / "lib" / "python3" / "site-packages" / f"mergekit-{version}.dist-info").mkdir(parents=True)
    for name, text in {"mergekit-yaml": script, "python": "exit 0"}.items():
        (venv / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (venv / "bin" / name).chmod(0o755)
    return venv


def test_mergekit_gets_the_recipe_by_its_command_line_and_an_environment_that_is_there_is_used(tmp_path, scratch):
    folders = llama_folders(tmp_path / "models", 64, 1)
    script = f'echo "$3 $PYTHONPATH" >> {tmp_path}/said; cp "$1" {tmp_path}/recipe.yml; mkdir "$2"'
    venv = fake_mergekit(tmp_path / "venv", "0.1.5", script)
    peers.prepare_mergekit(venv)
    assert peers.installed_mergekit(venv) == "0.1.5"
    recipe = scratch / "recipe.yml"
    recipe.write_text(json.dumps(recipe_of(Merge("ties", density=0.5), folders)))
    way = peers.mergekit_way(recipe, venv, scratch)
    assert way.slow and way.run().wall > 0 and sorted(path.name for path in scratch.iterdir()) == ["recipe.yml"]
    assert (tmp_path / "said").read_text() == "--no-copy-tokenizer \n"
    told = json.loads((tmp_path / "recipe.yml").read_text())
    assert told["merge_method"] == "ties" and told["base_model"] == str(folders[0])
    assert [one["parameters"] for one in told["models"]] == [{"weight": 0.5, "density": 0.5}] * 2


def test_a_peer_that_fails_is_told_in_its_row_and_ends_nothing(quick, tmp_path, capsys):
    from benchmarks.cases import measure_cases

    venv = fake_mergekit(tmp_path / "venv", "0.1.5", "echo out of memory >&2; exit 9")
    ways = [Way(OURS, lambda: Run(1, 1, 1, "")), peers.mergekit_way(tmp_path / "no.yml", venv, tmp_path)]
    case = Case("linear", ways, [Goal(MERGEKIT, 10)])
    measure_cases([case], Options(tmp_path, QUICK, runs=2, peer_runs=2))
    ours, theirs = read_table(case_table([case], cold=False))
    assert (ours["wall s"], theirs["wall s"], theirs["goal"]) == ("1.00", "-", "failed")
    assert "out of memory" in case.failed[MERGEKIT] and len(case.runs[OURS]) == 2
    assert capsys.readouterr().err.count("MergeKit is left out") == 1


def test_mergekit_is_not_installed_into_a_folder_of_something_else(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="is no virtual environment: name an empty folder"):
        main(["--quick", "--mergekit", str(tmp_path), "--folder", str(tmp_path / "models")])


def test_a_measured_process_that_fails_says_its_last_words():
    with pytest.raises(RuntimeError, match="no such weights"):
        processes.run_python("raise OSError('no such weights')")


def test_the_benchmark_of_a_device_says_where_there_is_none_and_runs_anywhere(capsys):
    from benchmarks import device

    if device._first_accelerator() is None:
        assert device.main([]) == "There is no GPU."
    text = device.main(["--device", "cpu", "--hidden", "64", "--layers", "2", "--runs", "1"])
    found = read_table(text)
    assert list(found[0]) == list(device.COLUMNS) and [row["case"].split(",")[0] for row in found] == [
        "linear", "ties", "slerp"
    ]  # fmt: skip
    assert [row["case"].split(",")[1] for row in found] == [" 2 models", " 3 models", " 2 models"]
    assert all(float(row["wall s"]) > 0 for row in found)
    assert text in capsys.readouterr().out


def test_each_further_model_takes_the_memory_of_its_matrices_in_flight_alone(tmp_path, scratch, freed_at_once):
    paths = checkpoints(tmp_path / "vit", vit_shapes(256, 4), 10, vit_config(256, 4))
    options = Options(tmp_path, Sizes(llama=(64, 1), many=(2, 10)), runs=1)
    found, _ = many.measure_many("tsv_m", paths, options, scratch, loop=False)
    told = many.many_rows("tsv_m", found, 0.0)
    assert [(name, count) for name, count, *_ in told] == [("tsv_m, hf_merge", "2"), ("tsv_m, hf_merge", "10")]
    in_flight = default_workers() * 1024 * 256 * 4e-6  # MB: the largest matrix in float32, for every thread
    assert float(told[1][many.COLUMNS.index("MB / further model")]) < 2 * in_flight


@pytest.mark.parametrize("method", ["ties", "fr", "tsv_m"])
def test_the_loop_beside_which_many_models_are_merged_gives_the_same(method, tmp_path):
    """Else its time and its memory would be those of something else."""
    paths = [str(path) for path in checkpoints(tmp_path / "vit", vit_shapes(64, 1), 5, vit_config(64, 1))]
    for way, code in many.WAYS.items():
        words = json.dumps([method, many.METHODS[method], str(tmp_path / way), *paths])
        run_here([sys.executable, "-c", many._READY + code, words])
    assert near(*(weights(tmp_path / way) for way in many.WAYS)) > 0.9995  # rounded sums may be 0 in one alone


@pytest.mark.parametrize("method", LOOPS)
def test_the_naive_loop_gives_the_same(method, tmp_path):
    import hf_merge

    folders = llama_folders(tmp_path / "models", 64, 1)
    merge = Merge(method, (0, 1) if method == "slerp" else (1, 2), has_base=method != "linear")
    hf_merge.merge(recipe_of(merge, folders), tmp_path / "ours")
    read = {"linear": folders[1:], "slerp": folders[:2], "task_arithmetic": folders}[method]
    run_here([sys.executable, "-c", LOOPS[method], str(tmp_path / "loop"), *map(str, read)])
    assert near(weights(tmp_path / "ours"), weights(tmp_path / "loop")) > 0.9995


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def near(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the share of entries that are equal but for the rounding of one of them."""
    assert ours.keys() == other.keys()
    found, expected = (torch.cat([one[name].float().flatten() for name in other]) for one in (ours, other))
    close = (found - expected).abs() <= 2**-7 * expected.abs() + 1e-6
    return float(close.float().mean())
