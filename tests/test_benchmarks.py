"""The benchmark command runs at a tiny size; nothing is timed here but what it prints."""

from __future__ import annotations

import json

from benchmarks.__main__ import COLUMNS, PROCESS_COLUMNS, SLOPE_COLUMNS, main


def test_the_benchmark_prints_its_tables_with_positive_ratios(tmp_path, capsys):
    numbers = ["--hidden", "64", "--layers", "1", "--models", "2", "--runs", "1", "--tiny-tensors", "12"]
    numbers += ["--moe-layers", "4", "--experts", "2", "--rows", "500", "--rank", "4"]
    places = ["--folder", str(tmp_path), "--json", str(tmp_path / "runs.json")]
    text = main([*numbers, *places, "--methods", ""])
    assert capsys.readouterr().out.strip() == text
    table, slope, shared, rows, loading, extraction = (read_table(part) for part in text.split("\n\n"))
    assert list(table[0]) == list(COLUMNS) and list(slope[0]) == list(SLOPE_COLUMNS)
    assert [row["case"] for row in table] == ["import torch", "import hf_merge.api", "12 tiny tensors, 2"]
    assert all(float(row["wall / floor"]) > 0 for row in table[2:])
    assert [row["tensors"] for row in slope] == ["3", "6", "12", "4.00", "6", "12", "24", "4.00"]
    assert [row["time per tensor"] for row in slope[3:5]] == ["tiny tensors: last / first", "layers of 2 experts"]
    assert all(float(row["plan us / tensor"]) > 0 and float(row["merge us / tensor"]) > 0 for row in slope)
    assert list(shared[0]) == list(PROCESS_COLUMNS) and float(shared[2]["wall / 1 process"]) > 0
    assert [(row["processes"], row["threads each"]) for row in shared] == [("1", "2"), ("1", "1"), ("2", "1")]
    assert [row["rows"] for row in rows] == ["500 x 896"] and float(rows[0]["gather / index_select"]) > 0
    assert [row["extraction"] for row in extraction] == ["the model, copied", "rank 4, sketches", "rank 4, exact"]
    assert float(extraction[2]["exact / sketch"]) > 0 and float(extraction[1]["wall / copy"]) > 0
    assert len(loading) == 4 and all(float(row["wall s"]) > 0 for row in loading)
    assert [case["case"] for case in json.loads((tmp_path / "runs.json").read_text())["cases"]] == [
        r["case"] for r in table
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "experts2-1",
        "experts2-2",
        "experts2-4",
        "llama-64x1",
        "runs.json",
        "tiny-12",
        "tiny-3",
        "tiny-6",
    ]


def read_table(markdown: str) -> list[dict[str, str]]:
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_benchmark_of_a_device_says_where_there_is_none_and_runs_anywhere(capsys):
    from benchmarks import device

    if device._first_accelerator() is None:
        assert device.main([]) == "There is no GPU."
    text = device.main(["--device", "cpu", "--hidden", "64", "--layers", "2", "--runs", "1"])
    rows = read_table(text)
    assert list(rows[0]) == list(device.COLUMNS) and [row["case"].split(",")[0] for row in rows] == [
        "linear", "ties", "slerp"
    ]  # fmt: skip
    assert [row["case"].split(",")[1] for row in rows] == [" 2 models", " 3 models", " 2 models"]
    assert all(float(row["wall s"]) > 0 for row in rows)
    assert text in capsys.readouterr().out


def test_the_benchmark_of_adapters_compares_with_peft_and_with_dense_matrices(tmp_path, capsys):
    from benchmarks import adapters

    words = ["--hidden", "64", "--layers", "1", "--runs", "1", "--widths", "128", "--folder", str(tmp_path)]
    text = adapters.main(words)
    sums, core, base = (read_table(part) for part in text.split("\n\n"))
    exact = [row for row in sums if row["relative error of"].startswith("hf_merge")]
    assert len(exact) == 2 and all(float(row[case]) < 1e-5 for row in exact for case in adapters.SUM_COLUMNS[1:])
    assert len(sums) == 6 and float(core[0]["difference"]) < 1e-3 and float(core[0]["dense / core"]) > 0
    assert [row["adapter into its base"] for row in base] == ["hf_merge", "PEFT"]
    assert all(float(row["wall s"]) > 0 for row in base) and text in capsys.readouterr().out
