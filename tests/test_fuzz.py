"""Whatever a file holds, it is read or refused by an error of ours: quickly, and in little memory."""

import json
import resource
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import hf_merge
from hf_merge.errors import MergeError, RecipeError, SourceError
from hf_merge.recipe import Recipe
from hf_merge.sources import open_source
from hf_merge.sources.adapter import CONFIG
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder
from hf_merge.sources.weights import MAX_HEADER
from hf_merge.types import ModelRef

fuzz = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SECONDS = 120  # of CPU, for what takes twenty; a hang takes for ever
ALLOCATED = 30_000_000  # bytes, for inputs of 100 MB


def in_a_process(code, *arguments):
    """Run code under a limit of CPU time and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)),
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-500:]}"
    return done.stdout


# recipes

GOOD = """
merge_method: dare_ties
base_model: {path: org/base, revision: v1}
models:
  - model: org/a@v2+org/lora
    parameters: {weight: [0.1, 0.9], density: {filter: mlp, value: 1e-1}}
  - model: {model: {path: org/b}, lora: {path: org/l, revision: x}}
    parameters:
      weight:
        - {filter: self_attn, value: 0.5}
        - value: &one 1.0
      density: *one
parameters: {normalize: true, lambda: 0.5}
rules:
  - {pattern: "*.lm_head.*", merge_method: passthrough, models: [org/a@v2+org/lora]}
dtype: bfloat16
seed: 7
"""
PIECES = st.sampled_from(
    ["", " ", "\n", "\t", "+", "@", ":", ": ", "- ", "[", "]", "{", "}", "&one ", "*one", "<<: ", "!!int ", "!!set ",
     "!!binary ", "'", '"', "|\n", "? ", "\0", "\ud7ff", "1e999", "-.inf", "0x" + "f" * 99, "1:" * 40, "9" * 5000]
)  # fmt: skip


@st.composite
def mutated(draw, text, pieces):
    """Cut out, repeat and insert pieces of a good text."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + draw(pieces) + text[start:end] * draw(st.integers(0, 2)) + text[end:]
    return text


def recipe_or_our_error(read):
    try:
        recipe = read()
    except MergeError as error:
        assert str(error)
    else:
        assert Recipe.from_yaml(recipe.to_yaml()).to_yaml() == recipe.to_yaml()


def test_the_good_recipe_is_good():
    assert len(Recipe.from_yaml(GOOD).models) == 2


@given(mutated(GOOD, PIECES))
@settings(fuzz, max_examples=400)
def test_mutated_recipe_is_read_or_refused(text):
    recipe_or_our_error(lambda: Recipe.from_yaml(text))


@given(st.binary(max_size=200) | mutated(GOOD.encode(), st.binary(max_size=3)))
@fuzz
def test_recipe_of_any_bytes_is_read_or_refused(tmp_path, data):
    (tmp_path / "recipe.yaml").write_bytes(data)
    recipe_or_our_error(lambda: Recipe.load(tmp_path / "recipe.yaml"))


words = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just(10**400),
    st.sampled_from(["linear", "ties", "org/a", "org/a+org/l", "mlp", "error", "float16"]),
)
names = st.sampled_from(
    ["merge_method", "models", "model", "lora", "path", "revision", "base_model", "parameters", "weight", "density",
     "filter", "value", "rules", "pattern", "dtype", "seed", "missing", "slices"]
)  # fmt: skip
structures = st.recursive(
    words, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=15
)
models = st.dictionaries(st.sampled_from(["model", "lora", "path", "revision"]), structures, max_size=3) | structures


@given(
    st.fixed_dictionaries(
        {"merge_method": st.sampled_from(["linear", "ties"]), "models": st.lists(models, max_size=3)},
        optional=dict.fromkeys(("parameters", "base_model", "rules", "seed", "missing", "allow_nonfinite"), structures),
    )
)
@example({"merge_method": "linear", "models": [{"model": {"model": "org/a", "lora": "org/b"}}]})
@fuzz
def test_recipe_of_any_structure_is_read_or_refused(data):
    recipe_or_our_error(lambda: Recipe.from_yaml(json.dumps(data)))


BOMBS = {
    "laughs": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
    "merged mappings": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)),
    "flow lists": "a: " + "[" * 30_000,
    "flow mappings": "{a: " * 30_000,
    "json": '{"a":' * 30_000 + "1" + "}" * 30_000,
    "block lists": "a:\n  " + "- " * 30_000,
    "block keys": "? " * 30_000,
    "many nodes": "a: [" + "x," * 400_000 + "]",
    "many keys": "".join(f"k{i}: 1\n" for i in range(90_000)),
    "long number": "a: " + "1" * 1_000_000,
    "long sexagesimal": "a: 1" + ":1" * 400_000,
    "long exponent": "a: 1e" + "1" * 900_000,
    "long hexadecimal": "seed: 0x" + "f" * 1_000_000,
    "long word": "merge_method: " + "x" * 1_000_000,
    "many models": "merge_method: linear\nmodels: [" + ",".join(f"m{i}" for i in range(40_000)) + "]\nx: 1\n",
    "many rules": "merge_method: linear\nmodels: ["
    + ",".join(f"m{i}" for i in range(5_000))
    + "]\nrules:\n"
    + "".join(f"- {{pattern: a, models: [m{i % 5000}]}}\n" for i in range(10_000))
    + "x: 1\n",
    "anchors": "".join(f"a{i}: &a{i} x\n" for i in range(40_000)),
    "brackets": "a: " + "[]" * 400_000,
    "tags": "a: " + "!" * 900_000,
    "tabs": "\t" * 1_000_000,
    "comment": "#" * 1_000_000,
}


def test_recipes_that_are_bombs_are_refused_quickly(tmp_path):
    """Each is refused by an error of ours, and all of them within the limit of CPU time."""
    for name, text in BOMBS.items():
        (tmp_path / name).write_text(text)
    code = (
        "import sys\nfrom hf_merge.recipe import Recipe\nfrom hf_merge.errors import RecipeError\n"
        "for path in sys.argv[1:]:\n"
        "    try: Recipe.load(path)\n"
        "    except RecipeError as error: print('refused:', path)"
    )
    found = in_a_process(code, *(tmp_path / name for name in BOMBS))
    assert found.count("refused:") == len(BOMBS), found


def test_recipe_of_100_mb_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "recipe.yaml", "wb") as file:
        file.truncate(100_000_000)
    tracemalloc.start()
    with pytest.raises(RecipeError, match="has more than 1048576 characters"):
        Recipe.load(tmp_path / "recipe.yaml")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ALLOCATED


# safetensors files

STATE = {"b.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.arange(3), "c": torch.zeros(0, 4)}
FILE = save(STATE, metadata={"format": "pt"})
HEADER = FILE[8 : 8 + struct.unpack("<Q", FILE[:8])[0]].decode()
DATA = FILE[8 + len(HEADER) :]


def with_header(text, length=None):
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + DATA


def read_or_our_error(folder, data, name="model.safetensors"):
    """Read a file and every tensor in it, or be refused."""
    path = Path(folder) / name
    path.write_bytes(data)
    try:
        source = Checkpoint(Folder(path.parent), "m", file=path.name)
        for tensor in source:
            assert source[tensor].shape == source.specs[tensor].shape
            source[tensor].float().sum()
    except MergeError as error:
        assert str(error)
        return None
    return source


@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(fuzz, max_examples=400)
def test_file_with_flipped_bytes_is_read_or_refused(tmp_path, flips):
    data = bytearray(FILE)
    for place, byte in flips:
        data[place] = byte
    read_or_our_error(tmp_path, bytes(data))


@given(st.integers(0, len(FILE)))
@fuzz
def test_truncated_file_is_refused(tmp_path, end):
    assert (read_or_our_error(tmp_path, FILE[:end]) is None) == (end < len(FILE))


@given(
    mutated(
        HEADER,
        st.sampled_from(
            [
                "-",
                "9",
                "[",
                "]",
                "{",
                "}",
                ",",
                ":",
                '"',
                "null",
                "1e9",
                "NaN",
                "true",
                "18446744073709551616",
                "\\ud800",
                '"x":1,',
                "F4",
                "F8_E8M0",
                "C64",
                "BOOL",
                "I4",
                "9223372036854775808",
                " ",
                "\0",
                "\ud800",
            ]
        ),
    )
)
@settings(fuzz, max_examples=400)
def test_file_with_a_mutated_header_is_read_or_refused(tmp_path, header):
    read_or_our_error(tmp_path, with_header(header))


sizes = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([-(1 << 63), (1 << 31) - 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**400]),
    st.sampled_from([None, 1.5, "1", True, []]),
)
place = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "BF16", "U8", "BOOL", "F8_E8M0", "F4", "C64", "Q4", "", None, 3]),
        "shape": st.lists(sizes, max_size=4) | sizes,
        "data_offsets": st.lists(sizes, min_size=1, max_size=3) | sizes,
    },
    optional={"extra": st.recursive(st.none(), lambda inner: st.lists(inner, max_size=2), max_leaves=3)},
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "é", ""]), place | structures, max_size=4))
@example({"a": {"dtype": "F32", "shape": [(1 << 64) - 1, 0], "data_offsets": [0, 0]}})
@example({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}})
@example({"a": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}})
@settings(fuzz, max_examples=400)
def test_file_with_a_header_of_any_structure_is_read_or_refused(tmp_path, header):
    text = json.dumps(header).encode()
    read_or_our_error(tmp_path, with_header(text))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    read_or_our_error(tmp_path, struct.pack("<Q", len(text)) + text)


ODD = {
    "nothing": b"",
    "huge length": with_header(HEADER, (1 << 64) - 1),
    "length of the sign bit": with_header(HEADER, 1 << 63),
    "length of 100 MB": with_header(HEADER, 100_000_000),
    "length zero": with_header(HEADER, 0),
    "not utf-8": with_header(HEADER.encode().replace(b"b.weight", b"b.w\xff\xfeght")),
    "utf-16": with_header(HEADER.encode("utf-16")),
    "name twice": with_header(HEADER.replace('"a.bias"', '"b.weight"')),
    "field twice": with_header(HEADER.replace('"shape":', '"shape":[9],"shape":', 1)),
    "list": with_header("[]"),
    "null": with_header("null"),
    "nested lists": with_header('{"a":' + "[" * 30_000 + "]" * 30_000 + "}"),
    "nested objects": with_header('{"a":' * 30_000 + "1" + "}" * 30_000),
    "nested in a field that nobody reads": with_header(
        HEADER.replace('"shape":', '"x":' + "[" * 30_000 + "]" * 30_000 + ',"shape":', 1)
    ),
    "long integer": with_header(HEADER.replace("[2,3]", "[" + "1" * 5_000 + "]")),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_file_is_refused(tmp_path, case):
    assert read_or_our_error(tmp_path, ODD[case]) is None


@pytest.mark.parametrize("size", [MAX_HEADER + 1, 99_000_000, 100_000_000, 200_000_000])
def test_header_of_100_mb_is_refused_before_it_is_read(tmp_path, size):
    """The file is as large as it says, and sparse."""
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", size) + b"{")
        file.truncate(8 + size)
    tracemalloc.start()
    with pytest.raises(SourceError, match=f"header has {size} bytes"):
        Checkpoint(Folder(path.parent), "m", file=path.name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_headers_that_are_bombs_end_quickly(tmp_path):
    wide = json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)})
    for i, text in enumerate([wide, '{"a":' + "[" * 1_000_000, HEADER + " " * 20_000_000, '{"' + "a" * 20_000_000]):
        (tmp_path / f"{i}.safetensors").write_bytes(with_header(text))
    code = (
        "import sys\nfrom hf_merge.sources import open_source\nfrom hf_merge.types import ModelRef\n"
        "from hf_merge.errors import SourceError\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(len(open_source(ModelRef(path=path))))\n"
        "    except SourceError as error: print('refused')"
    )
    assert in_a_process(code, *sorted(tmp_path.iterdir())).split()[1:] == ["refused", "3", "refused"]


# the other files of a model

json_texts = st.one_of(
    st.binary(max_size=20),
    structures.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[]", b"3", b"null", b"NaN", b'"x"', b"{}", b"[" * 30_000, b"9" * 5_000, b"\xff\xfe{}", b""]),
)


def model_folder(folder):
    save_file({"x.weight": torch.ones(2, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return folder


def merge_or_our_error(*folders):
    """Plan and merge; nothing but our errors, and nothing half written."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            hf_merge.merge(list(map(str, folders)), Path(scratch, "m"), method="linear")
        except MergeError as error:
            assert str(error) and not Path(scratch, "m").exists()
        else:
            assert Path(scratch, "m", "model.safetensors").is_file()


config_values = st.sampled_from(
    [None, 3, [], {}, "x", ["x"], [None], [["x"]], {"quant_method": 3}, {"quant_method": "fp8"}, True, 1e400, 10**400]
)
configs = st.dictionaries(
    st.sampled_from(
        ["architectures", "model_type", "dtype", "torch_dtype", "quantization_config", "text_config", "_name_or_path"]
    ),
    config_values | st.dictionaries(st.sampled_from(["model_type", "dtype", "quantization_config"]), config_values),
    max_size=4,
)


@given(st.one_of(json_texts, configs.map(lambda value: json.dumps(value).encode())))
@settings(fuzz, max_examples=200)
def test_config_of_any_kind_is_read_or_refused(tmp_path, data):
    (model_folder(tmp_path) / "config.json").write_bytes(data)
    merge_or_our_error(tmp_path)


@given(json_texts)
@settings(fuzz, max_examples=60)
def test_listing_of_modules_of_any_kind_is_copied(tmp_path, data):
    (model_folder(tmp_path) / "modules.json").write_bytes(data)
    assert Folder(tmp_path).companions() == ["modules.json"]


@given(
    st.one_of(
        json_texts,
        st.dictionaries(
            st.text(max_size=3),
            st.one_of(words, st.lists(words, max_size=2), st.sampled_from(["\0", "x" * 300, "..", "/", "a/b", "."])),
            max_size=3,
        ).map(lambda value: json.dumps({"weight_map": value}).encode()),
    )
)
@fuzz
def test_index_of_any_kind_is_read_or_refused(tmp_path, data):
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    with pytest.raises(SourceError):
        Checkpoint(Folder(tmp_path), "m")


@given(
    st.one_of(
        json_texts,
        st.dictionaries(
            st.sampled_from(
                ["peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out", "init_lora_weights",
                 "modules_to_save", "target_parameters"]
            ),
            structures,
            max_size=5,
        ).map(lambda value: json.dumps({"peft_type": "LORA", **value}).encode()),
    )
)  # fmt: skip
@fuzz
def test_config_of_an_adapter_of_any_kind_is_read_or_refused(tmp_path, data):
    folder = model_folder(tmp_path)
    (folder / "lora").mkdir(exist_ok=True)
    factors = {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}
    tensors = {f"base_model.model.x.lora_{which}.weight": t for which, t in factors.items()}
    save_file(tensors, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / CONFIG).write_bytes(data)
    try:
        source = open_source(ModelRef(path=str(folder), lora=ModelRef(path=str(folder / "lora"))))
        assert source["x.weight"].shape == (2, 2)
    except MergeError as error:
        assert str(error)
