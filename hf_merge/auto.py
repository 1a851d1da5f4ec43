"""Recipe repos for transformers' Auto classes: model_type "hf_merge" is merged when it is loaded.

`import hf_merge` registers it (see `registration`): AutoConfig gives a `MergeConfig`, and AutoModelForX.from_pretrained
a plain model of the class that it chooses for the merged model's config.
"""

from __future__ import annotations

import os
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from hf_merge.errors import RecipeError
from hf_merge.registration import MODEL_TYPE

_OF_FILES = (
    "revision", "force_download", "subfolder", "proxies", "use_safetensors", "weights_only", "variant", "gguf_file",
    "adapter_kwargs", "code_revision", "_from_auto", "_from_pipeline", "_commit_hash", "disable_mmap",
)  # fmt: skip
"""Keywords about files of weights, of which a recipe repo has none, and those that Auto classes add."""


class MergeConfig(PreTrainedConfig):
    """The config.json of a recipe repo.

    Attributes:
        recipe: what is merged when a model is loaded, as plain data; `hf_merge.Recipe.load` reads it.
        hf_merge_version: that wrote it.
    """

    model_type = MODEL_TYPE
    recipe: Any = None
    hf_merge_version: Any = None


def register_config() -> None:
    """Tell AutoConfig what a recipe repo is."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, MergeConfig, exist_ok=True)


def register_models() -> None:
    """Tell every Auto class that makes models how it makes one from a recipe repo."""
    from transformers.models.auto import modeling_auto

    for name, auto_class in vars(modeling_auto).items():
        if name.startswith("Auto") and getattr(auto_class, "_model_mapping", None) is not None:
            auto_class.register(MergeConfig, _maker(auto_class), exist_ok=True)


def _maker(auto_class: Any) -> type:
    """Return what an Auto class takes for the class of a model: it merges one of the class that fits instead."""

    class Merged:
        config_class = MergeConfig

        @classmethod
        def from_pretrained(cls, name: str | os.PathLike[str], *_: Any, config: MergeConfig, **options: Any) -> Any:
            return _merged(auto_class, os.fspath(name), config, options)

        @classmethod
        def _from_config(cls, config: Any, **_: Any) -> Any:
            raise RecipeError(
                f"The config of a recipe repo describes no empty model: use {auto_class.__name__}.from_pretrained."
            )

        @classmethod
        def register_for_auto_class(cls, auto_class: Any = None) -> None:
            """Do nothing; transformers asks for it when it has run the code of a repo."""

    Merged.__name__ = Merged.__qualname__ = f"Merged{auto_class.__name__.removeprefix('Auto')}"
    return Merged


def _merged(auto_class: Any, name: str, config: MergeConfig, options: dict[str, Any]) -> Any:
    """Merge what a recipe repo says, into the class that an Auto class chooses."""
    from hf_merge.api import load_recipe

    if not config.recipe:
        raise RecipeError(f"config.json of '{name}' has no recipe: write the repo again by Recipe.save_pretrained.")
    hub = {key: options.pop(key) for key in ("token", "cache_dir", "local_files_only") if key in options}
    kept = {key: value for key, value in options.items() if key not in _OF_FILES and value is not None}
    changes = {**_said_of_config(config), **kept}
    return load_recipe(config.recipe, hub, name=name, auto_class=auto_class, **changes)


def _said_of_config(config: MergeConfig) -> dict[str, Any]:
    """Return attributes that were given to an Auto class, which puts them into our config: they are the model's."""
    plain = MergeConfig(recipe=config.recipe).to_dict()
    ours = {"recipe", "auto_map", "architectures", "tokenizer_class", "dtype", "transformers_version", "model_type"}
    said = {key: value for key, value in config.to_dict().items() if key not in ours and not key.startswith("_")}
    said = {key: value for key, value in said.items() if key != "hf_merge_version" and plain.get(key) != value}
    implementation = getattr(config, "_attn_implementation", None)
    return {**said, **({"attn_implementation": implementation} if implementation else {})}
