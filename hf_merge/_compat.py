"""Every private import from the Hugging Face libraries and torch, each guarded by a test in tests/test_compat.py."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn


def on_disk_layout(
    module: nn.Module, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[str | None, Tensor]]:
    """Map the names a module's checkpoint has to (live name, live tensor).

    A PreTrainedModel may be saved under other names, or its fused weights in parts; the live name is then that
    of the tensor, or None where it is part of another. Tied weights appear once.

    Args:
        module: the model.
        tensors: its tensors by their names in memory, if these are not those of its state_dict.
    """
    state = module.state_dict() if tensors is None else dict(tensors)
    if not hasattr(module, "save_pretrained") or not hasattr(module, "config"):
        return {name: (name, tensor) for name, tensor in state.items()}
    from transformers.core_model_loading import revert_weight_conversion

    for alias in getattr(module, "all_tied_weights_keys", {}):
        state.pop(alias, None)
    state = {name: tensor.detach() for name, tensor in state.items()}
    live = {id(tensor): name for name, tensor in state.items()}
    saved: dict[str, Tensor] = revert_weight_conversion(module, state)  # type: ignore[arg-type]
    return {name: (live.get(id(tensor)), tensor) for name, tensor in saved.items()}


def empty_model(config: Mapping[str, Any]) -> nn.Module | None:
    """Build the model of a config.json on the meta device; None if transformers cannot."""
    import torch

    model_class = _model_class(config)
    if model_class is None:
        return None
    with torch.device("meta"), quiet(), contextlib.suppress(Exception):  # transformers may raise anything here
        return model_class._from_config(_config(model_class, config))
    return None


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a config.json with what its class derives from it, such as the type of every layer."""
    model_class = _model_class(config)
    if model_class is None:
        return dict(config)
    with quiet(), contextlib.suppress(Exception):
        return json.loads(_config(model_class, config).to_json_string(use_diff=False))
    return dict(config)


def _model_class(config: Mapping[str, Any]) -> Any:
    """Return the class that config.json names; None if it is not one of transformers' own."""
    import transformers

    model_class = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
    return None if config.get("auto_map") or not getattr(model_class, "config_class", None) else model_class


def _config(model_class: Any, config: Mapping[str, Any]) -> Any:
    """Read a config.json as `from_pretrained` does, with the words that stand for infinities."""
    return model_class.config_class.from_dict(model_class.config_class._decode_special_floats(dict(config)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let transformers log errors only."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass(frozen=True)
class Place:
    """Where transformers puts a checkpoint's tensor when it loads it.

    Attributes:
        live: the parameters it becomes, or becomes part of, by their names in memory.
        pattern: which of transformers' conversions stacks, cuts or transposes it on the way; None if it is kept.
    """

    live: tuple[str, ...]
    pattern: str | None


class Conversion:
    """A model's names in checkpoints and in memory, and the ways between them: transformers' tables.

    Args:
        module: the model, without values; it is not read.
    """

    def __init__(self, module: nn.Module):
        from transformers.core_model_loading import PrefixChange

        self._module, self.shapes = module, module.state_dict()
        self.tied = {a: t for a, t in getattr(module, "all_tied_weights_keys", {}).items() if a in self.shapes}
        # What revert_weight_conversion finds for a model that was not loaded, found once.
        kept = [c for c in self._conversions(add_legacy=False) if not isinstance(c, PrefixChange)]
        module._weight_conversions = kept  # type: ignore[assignment]

    def _conversions(self, **options: Any) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return get_model_conversion_mapping(self._module, **options)  # type: ignore[arg-type]

    def _named(self, names: Iterable[str]) -> Iterator[tuple[str, str, str | None, Any]]:
        """Yield (name, parameter, pattern, converter) for names that the model has a place for when it loads them."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        found = self._conversions()
        renamings = [c for c in found if isinstance(c, WeightRenaming)]
        converters = [c for c in found if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = getattr(self._module, "base_model_prefix", "")
        for name in sorted(names, key=dot_natural_key):
            live, pattern = rename_source_key(name, renamings, converters, prefix, self.shapes)
            if live not in self.shapes and name in self.shapes:
                live, pattern = rename_source_key(name, [], [], prefix, self.shapes)
            if live in self.shapes:
                yield name, live, pattern, by_pattern.get(pattern or "")

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """Find the place of each name; names that the model has no place for are left out."""
        found: dict[str, Place] = {}
        for name, live, pattern, converter in self._named(names):
            patterns = converter.target_patterns if converter else [""]
            targets = dict.fromkeys(live.replace(patterns[0], target) if target else live for target in patterns)
            found[name] = Place(tuple(t for t in targets if t in self.shapes), pattern)
        return found

    def live(self, names: Iterable[str]) -> dict[str, str]:
        """Return the parameter that each name becomes, or becomes part of."""
        return {name: live for name, live, _, _ in self._named(names)}

    def saved_name(self, live: str) -> str:
        """Return what `save_pretrained` calls a parameter, or the first part of it."""
        return next(iter(self.to_disk({live: self.shapes[live]})))

    def to_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn tensors of a checkpoint into parameters, as loading does; parts of one parameter come together."""
        made: dict[str, Tensor] = {}
        waiting: dict[str, Any] = {}
        for name, live, pattern, converter in self._named(tensors):
            if converter is None:
                made[live] = tensors[name]
                continue
            if live not in waiting:
                waiting[live] = copy.deepcopy(converter)
            waiting[live].add_tensor(live, name, pattern, tensors[name])
        for live, converter in waiting.items():
            made |= _plain(converter.convert(live, model=self._module, config=self._module.config))
        return made

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn parameters into tensors of a checkpoint, as `save_pretrained` does; parts stay views if they can."""
        from transformers.core_model_loading import revert_weight_conversion

        views = {live: tensor.as_subclass(_uncopied()) for live, tensor in tensors.items()}
        return _plain(revert_weight_conversion(self._module, views))  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _uncopied() -> type[Tensor]:
    """Return a tensor class whose chunks stay views: transformers makes each contiguous, to write it to a file."""
    import torch

    class Uncopied(torch.Tensor):
        def contiguous(self, *_: Any, **__: Any) -> Any:
            return self

    return Uncopied


def _plain(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    single = {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}
    return {name: tensor.as_subclass(torch.Tensor) for name, tensor in single.items()}


def vocabulary_tensors(module: Any) -> list[str]:
    """Name, as in memory, the input embeddings of a model and its output head with the head's bias."""
    found: list[str] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(Exception):  # models of images have none and say so each in its own way
            part = getattr(module, getter)()
            rows = part.weight.shape[0]
            ids = {id(p) for p in part.parameters() if p.shape[0] == rows}
            found += [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in ids]
    return list(dict.fromkeys(found))


def module_devices(module: nn.Module, device_map: str, max_memory: Mapping[Any, int] | None) -> dict[str, int | str]:
    """Return the map that `from_pretrained` would settle on: prefixes of names in memory, and their devices.

    Args:
        module: the model, without values.
        device_map: auto, balanced, balanced_low_0 or sequential.
        max_memory: bytes by device; of devices that need not be here.
    """
    from transformers.integrations.accelerate import _get_device_map

    with quiet(), muted("accelerate.utils.modeling"):  # which warns of every device that is not here
        return dict(_get_device_map(module, device_map, max_memory and {**max_memory}, None))  # type: ignore[arg-type]


def expanded(device_map: Mapping[str, int | str], names: Iterable[str]) -> dict[str, int | str]:
    """Look tensors up in a device map, by their names in memory, as loading does."""
    from transformers.integrations.accelerate import expand_device_map

    found: dict[str, Any] = expand_device_map(dict(device_map), list(names))
    return found


@contextlib.contextmanager
def muted(logger: str) -> Iterator[None]:
    """Let a library's logger tell errors only."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(before)


def mxfp4_dequantizer() -> Any:
    """Return `f(blocks, scales, *, dtype)`: packed experts [E, rows, groups, 16] to [E, 32 * groups, rows]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors


def pipeline_tag(architecture: str) -> str | None:
    """Return the Hub's task of a model class: `text-generation` for LlamaForCausalLM."""
    tables = classes_of_tasks()
    for tag, words in _TASKS.items():
        if any(architecture in tables.get(word, ()) for word in words):
            return tag
    return None


@lru_cache(maxsize=1)
def classes_of_tasks() -> dict[str, set[str]]:
    """Return the classes that modeling_auto's tables list, by the tables' words: CAUSAL_LM, MASKED_LM, ...

    The file is read, not imported: that would take longer than merging many a model does.
    """
    package = find_spec("transformers")
    assert package is not None and package.origin is not None
    text = (Path(package.origin).parent / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
    tables = re.findall(r"^MODEL_FOR_(\w+)_MAPPING_NAMES = OrderedDict\((.*?)^\)", text, re.MULTILINE | re.DOTALL)
    return {word: set(re.findall(r'"(\w+)"', table)) for word, table in tables}


def declared_ties(kinds: Iterable[str], architecture: str) -> frozenset[str] | None:
    """Return the names in all `_tied_weights_keys` of the files that define a class and its parts.

    They are read, not imported: that takes longer than adding an adapter to a small model does.

    Args:
        kinds: `model_type` of a config and of the configs in it.
        architecture: the class.

    Returns:
        Names and patterns, or None if the files do not say: they are not there, or make the names when they run.
    """
    package = find_spec("transformers")
    assert package is not None and package.origin is not None
    models = Path(package.origin).parent / "models"
    todo, seen, names, is_there = [_package_of(kind, models) for kind in kinds], set(), set(), False
    while todo:
        seen.add(name := todo.pop())
        found = _ties_in(models / name / f"modeling_{name}.py", architecture)
        if found is None:
            return None
        names |= found.names
        is_there |= found.is_there
        todo += [other for other in found.others if other not in seen]
    return frozenset(names) if is_there else None


def _package_of(kind: str, models: Path) -> str:
    """Return the package of a `model_type`, which may be that of a part: `gemma3_text` is in `gemma3`."""
    words = re.split(r"\W|_", kind[:99])  # which is anybody's text
    for count in range(len(words), 0, -1):
        name = "_".join(words[:count])
        file = models / name / f"configuration_{name}.py"
        if file.is_file():
            return name if f'"{kind}"' in file.read_text(encoding="utf-8") else ""
    return ""


class _Ties(NamedTuple):
    """What a file says of ties: the names, whether it defines the class that is asked for, and which others it uses."""

    names: set[str]
    is_there: bool
    others: set[str]


def _ties_in(file: Path, architecture: str) -> _Ties | None:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return None
    names: set[str] = set()
    for statement in ast.walk(ast.parse(text)):
        if not isinstance(statement, ast.stmt) or hasattr(statement, "body"):
            if getattr(statement, "name", "") == _TIES:
                return None
            continue
        parts = list(ast.walk(statement))
        if not any(_TIES in (getattr(part, "id", ""), getattr(part, "attr", "")) for part in parts):
            continue
        inside = [item for part in parts if isinstance(part, ast.Dict) for item in (*part.keys, *part.values)]
        if any(isinstance(part, ast.JoinedStr) for part in parts) or not all(
            isinstance(item, ast.Constant) for item in inside
        ):
            return None
        names |= {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    others = set(re.findall(r"^from \.\.(\w+)\.modeling_\w+ import", text, re.MULTILINE))
    return _Ties(names, re.search(rf"^class {re.escape(architecture)}\b", text, re.MULTILINE) is not None, others)


_TIES = "_tied_weights_keys"

_TASKS = {
    "text-generation": ["CAUSAL_LM"],
    "image-classification": ["IMAGE_CLASSIFICATION"],
    "image-segmentation": ["IMAGE_SEGMENTATION"],
    "fill-mask": ["MASKED_LM"],
    "object-detection": ["OBJECT_DETECTION"],
    "question-answering": ["QUESTION_ANSWERING"],
    "text2text-generation": ["SEQ_TO_SEQ_CAUSAL_LM"],
    "text-classification": ["SEQUENCE_CLASSIFICATION"],
    "table-question-answering": ["TABLE_QUESTION_ANSWERING"],
    "token-classification": ["TOKEN_CLASSIFICATION"],
    "audio-classification": ["AUDIO_CLASSIFICATION"],
    "automatic-speech-recognition": ["CTC", "SPEECH_SEQ_2_SEQ"],
    "zero-shot-image-classification": ["ZERO_SHOT_IMAGE_CLASSIFICATION"],
    "image-text-to-text": ["IMAGE_TEXT_TO_TEXT"],
}
"""transformers.modelcard.TASK_MAPPING: tags, and the words of modeling_auto's tables that hold their classes."""


def _flat(values: Any) -> list[str]:
    return [name for value in values for name in (value if isinstance(value, (list, tuple)) else [value])]


def cli_words() -> tuple[Any, Any, Any]:
    """Return (Argument, Option, out): the annotations and the output channel of huggingface_hub's CLI framework."""
    from huggingface_hub.cli._framework import Argument, Option
    from huggingface_hub.cli._output import out

    return Argument, Option, out


def uv_image() -> str:
    """Return the image in which huggingface_hub runs uv on Jobs."""
    from huggingface_hub._jobs_api import DEFAULT_UV_IMAGE

    return DEFAULT_UV_IMAGE


def job_payload(**wanted: Any) -> dict[str, Any]:
    """Return the JSON that `HfApi.run_job` posts for these arguments."""
    from huggingface_hub._jobs_api import _create_job_spec

    return _create_job_spec(**wanted)


def cache_folder(repo_id: str) -> str:
    """Return what the Hub's cache calls the folder of a model."""
    from huggingface_hub.file_download import repo_folder_name

    return repo_folder_name(repo_id=repo_id, repo_type="model")


def extension_folder(name: str) -> Path:
    """Return where the hf command looks for an extension's manifest."""
    from huggingface_hub.cli.extensions import EXTENSIONS_ROOT

    return EXTENSIONS_ROOT.expanduser() / f"hf-{name}"


def extension_file() -> str:
    """Return what hf calls an extension's manifest."""
    from huggingface_hub.cli.extensions import MANIFEST_FILENAME

    return MANIFEST_FILENAME


def extension_manifest(owner: str, repo: str, name: str, *, executable: Path, version: str, description: str) -> Any:
    """Return a manifest of an extension that hf only has to run; `save(folder)` writes it."""
    from huggingface_hub.cli.extensions import ExtensionManifest

    return ExtensionManifest(
        owner=owner, repo=repo, repo_id=f"{owner}/{repo}", short_name=name, executable_path=str(executable),
        type="python", installed_at=datetime.now(UTC), description=description, commit_sha=version,
    )  # fmt: skip


def extension_owner(folder: Path) -> tuple[str | None, str | None]:
    """Return an extension's owner and the repository it came from, by its manifest; None for what it does not say."""
    from huggingface_hub.cli.extensions import ExtensionManifest

    with contextlib.suppress(Exception):  # no manifest, or not one: hf logs it and goes on
        manifest = ExtensionManifest.load(folder)
        return manifest.owner, manifest.repo_id
    return None, None


def compile_chat_template(text: str) -> Any:
    """Compile a chat template as transformers does, with its tags.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(text)


def uploaded_file(path: str, *, sha256: str, size: int, is_committed: bool = False) -> Any:
    """Return what a commit says of a large file that was uploaded by another process, and is not here any more.

    Args:
        path: in the repository.
        sha256: its digest, in hexadecimal digits.
        size: in bytes.
        is_committed: it is there already, so that the commit need not name it.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(path, b"")
    addition.upload_info = UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256))
    addition._upload_mode, addition._is_uploaded, addition._should_ignore = "lfs", True, False
    addition._remote_oid = sha256 if is_committed else None
    return addition


def class_to_load(config: Mapping[str, Any], folder: Path, *, trust_remote_code: bool | None = None) -> Any:
    """Return the class whose `from_pretrained` loads a model; AutoModel if config.json names none.

    Args:
        config: the content of config.json.
        folder: where it lies, with the code that it may name.
        trust_remote_code: whether that code may run.

    Returns:
        None if the class is not one of transformers' own and its code is not there, or may not run.
    """
    import transformers

    name = next(iter(config.get("architectures") or ()), None)
    codes = config.get("auto_map") or {}
    code = next((code for code in codes.values() if isinstance(code, str) and code.endswith(f".{name}")), None)
    if code and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(code, folder)
    return getattr(transformers, name, None) if name else transformers.AutoModel


def class_of_auto(auto_class: Any, config: Any) -> tuple[Any, Any]:
    """Return the class that an Auto class chooses for a config, or None, and the part of the config that it takes."""
    from transformers.models.auto.auto_factory import _get_model_class

    if type(config) not in auto_class._model_mapping:
        return None, config
    model_class = _get_model_class(config, auto_class._model_mapping)
    text: Any = config.sub_configs.get("text_config")
    is_text = text is not None and getattr(model_class, "config_class", None) == text
    return model_class, config.get_text_config() if is_text else config


def auto_class_name(architecture: str) -> str:
    """Name the Auto class that makes models of a class: AutoModelForCausalLM for LlamaForCausalLM."""
    from transformers.models.auto import modeling_auto

    general = {"AutoModel": 1, "AutoModelForPreTraining": 2, "AutoModelForTextEncoding": 3}
    found = [
        name for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None
        and architecture in _flat(auto._model_mapping._model_mapping.values())
    ]  # fmt: skip
    return min(found, key=lambda name: general.get(name, 0), default="AutoModel")


def tokenizer_class(config: Mapping[str, Any], folder: Path) -> str | None:
    """Name the class of a folder's tokenizer, where its own files do not and `model_type` would decide."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if told.get("tokenizer_class") or told.get("auto_map"):
        return None
    return config.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(config.get("model_type", ""))


def config_to_load(
    model_class: Any, folder: Path, changes: Mapping[str, Any], *, trust_remote_code: bool | None = None
) -> tuple[Any, set[str]]:
    """Read config.json as `from_pretrained` of a class does, and change attributes.

    Args:
        model_class: the class; an Auto class lets `model_type` decide.
        folder: where it lies.
        changes: attributes.
        trust_remote_code: whether code that it names may run.

    Returns:
        The config, and the names of changes that are no attributes.
    """
    from transformers import AutoConfig

    reader: Any = getattr(model_class, "config_class", None) or AutoConfig
    trusted = {"trust_remote_code": trust_remote_code} if reader is AutoConfig else {}
    of_files = {"revision", "force_download", "subfolder", "proxies", "gguf_file"} & changes.keys()
    said = {key: value for key, value in changes.items() if key not in of_files}
    read: Any = reader.from_pretrained(folder, return_unused_kwargs=True, **said, **trusted)
    config, unused = read
    return config, of_files | ({*unused} & said.keys())


def generation_config(folder: Path) -> Any:
    """Read how a model generates, as `from_pretrained` does: from its own file, or else from old config.json files."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


LOADING_WORDS = {
    "device_map", "max_memory", "quantization_config", "offload_folder", "offload_buffers", "distributed_config",
    "device_mesh", "attn_implementation", "experts_implementation", "generation_config", "output_loading_info",
    "trust_remote_code", "key_mapping", "fusion_config", "use_kernels", "kernel_config", "allow_all_kernels",
    "tqdm_class", "low_cpu_mem_usage", "ignore_mismatched_sizes",
}  # fmt: skip
"""What `from_pretrained` takes beside files: the keywords that it reads, some without a place in its signature."""


def loading_order(names: Iterable[str]) -> list[str]:
    """Sort names of tensors as transformers' loader asks for them."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def default_store() -> Any:
    """Return the key-value store of torch.distributed's default group; None if its backend has none."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def parts_on_disk(config: Mapping[str, Any]) -> dict[str, tuple[str, Tensor]]:
    """Map names of a checkpoint to the parameter they are, or lie in, and a view on the meta device that says where.

    The views' shapes, strides and offsets are those within the parameter, whose tensor is contiguous. What
    transformers computes when it saves, and does not merely cut out of one parameter, is left out.
    """
    from bisect import bisect_right
    from itertools import accumulate

    import torch

    module = empty_model(config)
    if module is None:
        return {}
    tables = Conversion(module)
    kept = {name: tensor for name, tensor in tables.shapes.items() if name not in tables.tied}
    starts = [*accumulate((max(t.numel(), 1) for t in kept.values()), initial=1)]  # a copy begins at 0
    store = torch.empty(starts[-1], dtype=torch.float32, device="meta")
    live = {n: store[s : s + t.numel()].view(t.shape) for (n, t), s in zip(kept.items(), starts, strict=False)}
    found: dict[str, tuple[str, Tensor]] = {}
    names = list(kept)
    for name, tensor in tables.to_disk(live).items():
        place = bisect_right(starts, tensor.storage_offset()) - 1
        if place >= 0:
            offset = tensor.storage_offset() - starts[place]
            found[name] = names[place], store.as_strided(tensor.shape, tensor.stride(), offset)
    return found


def is_transposed(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether a module's class says that its experts' weights are [in, out]."""
    model = empty_model(config)
    with contextlib.suppress(AttributeError):
        return bool(getattr(model.get_submodule(module), "is_transposed", False)) if model is not None else False
    return False


def peft_model(
    config: Mapping[str, Any], adapter: Mapping[str, Any], values: Mapping[str, Tensor], *, rest: str
) -> Any:
    """Build a model in which PEFT has put an adapter, without values but for some parameters of the base.

    Args:
        config: the base's config.json.
        adapter: the adapter's config.
        values: parameters of the base, by their names in memory, in float32.
        rest: what the other parameters are: on the `meta` device, or zeros on the `cpu` that take no memory.

    Raises:
        Exception: whatever PEFT raises for an adapter that it cannot put there.
    """
    import warnings

    import torch
    from peft import PeftConfig, PeftModel

    model = empty_model(config)
    if model is None:
        raise ValueError("its base is no model class of transformers")
    model.float().eval()
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = values.get(f"{path}.{name}" if path else name)
            if value is None and rest == "cpu":
                value = torch.zeros(1).expand(parameter.shape)
            if value is not None:
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    changes = {"inference_mode": True, "modules_to_save": None, "trainable_token_indices": None, "progressbar": False}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        words = PeftConfig.from_peft_type(**adapter)
        for key, value in changes.items():
            if hasattr(words, key):
                setattr(words, key, value)
        return PeftModel(model, words)


def peft_type(name: str) -> Any:
    """Return a type of adapters, which is made if PEFT has none of this name: there is no public way to add one."""
    from peft import PeftType

    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType[name]


def peft_knows(name: str) -> bool:
    """Tell whether a type of adapters is registered."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return name in {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING}


def peft_tensors(model: Any) -> dict[str, Tensor]:
    """Return what PEFT would save of the adapter in a model, by the names in its file."""
    import warnings

    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model_state_dict(model, save_embedding_layers=False)


def peft_targets(model: Any) -> list[str]:
    """Name the modules that an adapter changes."""
    return list(dict.fromkeys(model.base_model.targeted_module_names))


def peft_merge(model: Any, tensors: Mapping[str, Tensor], modules: Iterable[str]) -> dict[str, Tensor]:
    """Give an adapter its values, merge it into some modules, and return their parameters by their names in memory.

    Args:
        model: made by `peft_model` with the values of these modules.
        tensors: the adapter's: what belongs to these modules, and what belongs to none.
        modules: which are merged.

    Raises:
        ValueError, RuntimeError: values that are not finite, or tensors that do not fit.
    """
    import warnings

    import torch
    from peft import set_peft_model_state_dict

    found: dict[str, Tensor] = {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(model, dict(tensors))
        for name in modules:
            layer = model.base_model.model.get_submodule(name)
            layer = layer if hasattr(layer, "merge") else layer.get_submodule("merged_expert")
            layer.merge(safe_merge=True)
            own = layer.get_base_layer().named_parameters(recurse=False)
            found |= {f"{name}.{leaf}": parameter.data for leaf, parameter in own}
    return found


def peft_live(module: Any) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return config and tensors of the active adapters of a live model, by name; nothing if it has none.

    Raises:
        ValueError: one is merged into the weights already.
    """
    if not getattr(module, "peft_config", None):
        return {}
    import warnings

    from peft import PeftModel, get_peft_model_state_dict

    if any(getattr(part, "merged_adapters", None) for part in module.modules()):
        raise ValueError("has merged its adapter into its weights")
    active = module.active_adapters if isinstance(module, PeftModel) else module.active_adapters()
    names = [active] if isinstance(active, str) else [*active]
    found: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            tensors = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
            tensors = {k if k.startswith("base_model.") else f"base_model.model.{k}": t for k, t in tensors.items()}
            found[name] = json.loads(json.dumps(module.peft_config[name].to_dict(), default=_plain_word)), tensors
    return found


def _plain_word(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))


def peft_base(module: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the model under a live model's adapters and its tensors by their names without PEFT's."""
    from peft import PeftModel

    model = module.get_base_model() if isinstance(module, PeftModel) else module
    found: dict[str, Tensor] = {}
    for name, part in model.named_modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for leaf, tensor in own:
            path = f"{name}.{leaf}" if name else leaf
            if leaf in part._non_persistent_buffers_set or _is_adapters(model, path):
                continue
            found[re.sub(r"\.(base_layer|original_module)(?=\.)", "", path)] = tensor
    return model, found


def _is_adapters(model: Any, path: str) -> bool:
    """Tell whether a tensor belongs to an adapter: it lies in what PEFT wraps around a module of the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    words = path.split(".")
    part = model
    for word in words:
        if isinstance(part, AuxiliaryTrainingWrapper) and word != "original_module":
            return True
        if isinstance(part, BaseTunerLayer) and word != "base_layer":
            return True
        part = getattr(part, word)
    return False
