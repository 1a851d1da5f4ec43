"""A recipe and the form that shows it: what the form can show is read from the recipe, what it changes is written back.

The recipe, as plain data, is the only state of the page; the form is one view of it and its YAML is another. What a
form cannot show (slices, modules, rules, filters of other names) stays in the recipe as it is, and is told.

A setting in the form is a plain value, `{"curve": [..]}` over depth, or `{"parts": {"attention", "mlp", "rest"}}`.
"""

from __future__ import annotations

import base64
import json
import shlex
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

import hf_merge
from hf_merge.controls import controls

ORDER = (
    "name",
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "rules",
    "lines",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "keys",
    "missing",
    "output_format",
    "rank",
    "dtype",
    "out_dtype",
    "seed",
)
ATTENTION = ("self_attn", "attn", "attention")
MLP = ("mlp", "feed_forward", "ffn", "intermediate")
UNSHOWN = {
    "slices": "layers that are stacked (slices)",
    "modules": "parts of the model merged apart (modules)",
    "rules": "other methods for some tensors (rules)",
    "lines": "a scale by depth (lines)",
    "stages": "merges that build on one another (stages)",
}
FLAGS = {
    "base_model": "--base",
    "tokenizer_source": "--tokenizer-source",
    "chat_template": "--chat-template",
    "keys": "--keys",
    "missing": "--missing",
    "output_format": "--output-format",
    "rank": "--rank",
    "dtype": "--dtype",
    "seed": "--seed",
}
"""What keywords say of a recipe beside method, models and parameters, and the command by these options."""
LINK_LIMIT = 8000
"""Characters of a link that browsers and servers take without complaint."""


def entries(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the models of a recipe as mappings with at least `model`."""
    listed = recipe.get("models") or ()
    return [dict(one) if isinstance(one, Mapping) and "model" in one else {"model": one} for one in listed]


def name_of(model: Any) -> str:
    """Return a model's name as the form shows it: an id, with its revision and its adapters."""
    if not isinstance(model, Mapping):
        return str(model)
    if "model" in model:
        adapters = model.get("lora") or []
        listed = adapters if isinstance(adapters, list) else [adapters]
        return "+".join([name_of(model["model"]), *(name_of(one) for one in listed)])
    revision = model.get("revision")
    return f"{model.get('path', '?')}{f'@{revision}' if revision else ''}"


def names(recipe: Mapping[str, Any]) -> list[str]:
    """Return the names of the models that are merged, in order."""
    return [name_of(one["model"]) for one in entries(recipe)]


def label(name: str) -> str:
    """Return the short name of a model, for the ends of sliders and the columns of tables."""
    return "+".join(part.rstrip("/").rsplit("/", 1)[-1].split("@")[0] for part in name.split("+"))


def labels(listed: Sequence[str]) -> list[str]:
    """Return short names that tell models apart: whole names where short ones are equal."""
    short = [label(one) for one in listed]
    return [one if short.count(one) == 1 else whole for one, whole in zip(short, listed, strict=True)]


def with_models(recipe: Mapping[str, Any], wanted: Sequence[str], base: str | None) -> dict[str, Any]:
    """Return a recipe with these models, in this order; what it says of models that stay is kept."""
    known = {name_of(one["model"]): one for one in entries(recipe)}
    kept = [known.get(name, {"model": name}) for name in wanted]
    made = dict(recipe)
    made["models"] = [one["model"] if one.keys() == {"model"} else one for one in kept]
    made.pop("base_model", None)
    return made | ({"base_model": base} if base else {})


def with_method(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a recipe by another method; parameters that it has too are kept."""
    known = {one.name for one in controls(hf_merge.get_method(name))}
    made: dict[str, Any] = {**recipe, "merge_method": name}
    made = _with_parameters(made, {key: one for key, one in (made.get("parameters") or {}).items() if key in known})
    made["models"] = [
        _tidy(one, {key: value for key, value in (one.get("parameters") or {}).items() if key in known})
        for one in entries(recipe)
    ]
    return made


def with_base(recipe: Mapping[str, Any], aside: Any) -> tuple[dict[str, Any], Any]:
    """Set the base aside for a method to which it would be one more model, or put it back for another one.

    Args:
        recipe: the recipe.
        aside: the base that is aside, None if none is.

    Returns:
        The recipe, and the base that is aside now.
    """
    method, base = hf_merge.get_method(str(recipe["merge_method"])), recipe.get("base_model")
    one_more = method.base == "ignored" and method.space == "models" and method.count is None and not method.statistics
    if one_more and base and name_of(base) not in names(recipe):
        return {key: value for key, value in recipe.items() if key != "base_model"}, base
    if not one_more and not base and aside and name_of(aside) not in names(recipe):
        return {**recipe, "base_model": aside}, None
    return dict(recipe), aside


def values(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the form shows: for each parameter one, or a list with one for each model.

    Raises:
        hf_merge.MergeError: there is no such method.
    """
    shared, listed = recipe.get("parameters") or {}, entries(recipe)
    found: dict[str, Any] = {}
    for control in controls(hf_merge.get_method(str(recipe.get("merge_method")))):
        common = shared.get(control.name, control.default)
        if control.per_model:
            each = [(one.get("parameters") or {}).get(control.name, common) for one in listed]
            found[control.name] = [_shown(one, control.default) for one in each]
        else:
            found[control.name] = _shown(common, control.default)
    return found


def with_values(
    recipe: Mapping[str, Any], chosen: Mapping[str, Any], words: Sequence[str] = (ATTENTION[0], MLP[0])
) -> dict[str, Any]:
    """Return a recipe with these settings; those that the form cannot show stay as they are.

    Args:
        recipe: the recipe.
        chosen: settings as `values` gives them.
        words: by which filters find the tensors of attention and of MLPs; see `words`.
    """
    before = values(recipe)
    shared, own = dict(recipe.get("parameters") or {}), [dict(one.get("parameters") or {}) for one in entries(recipe)]
    for control in controls(hf_merge.get_method(str(recipe["merge_method"]))):
        name = control.name
        if name not in chosen or chosen[name] == before[name]:
            continue
        shared.pop(name, None)
        for one in own:
            one.pop(name, None)
        if not control.per_model:
            shared |= {} if chosen[name] == control.default else {name: _written(chosen[name], words)}
            continue
        if all(one == chosen[name][0] for one in chosen[name]):
            shared |= {} if chosen[name][0] == control.default else {name: _written(chosen[name][0], words)}
            continue
        for parameters, setting in zip(own, chosen[name], strict=True):
            parameters[name] = _written(setting, words)
    made = _with_parameters(dict(recipe), shared)
    made["models"] = [_tidy(one, parameters) for one, parameters in zip(entries(recipe), own, strict=True)]
    return made


def unshown(recipe: Mapping[str, Any]) -> list[str]:
    """Say what of a recipe the form cannot show."""
    told = [words for key, words in UNSHOWN.items() if recipe.get(key)]
    settings = [recipe.get("parameters") or {}, *(one.get("parameters") or {} for one in entries(recipe))]
    odd = sorted({key for one in settings for key, value in one.items() if _shown(value, None) is None})
    return told + [f"filters for {key}" for key in odd]


class _Dumper(yaml.SafeDumper):
    """Writes a value that stands in two places twice: recipes have no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML, its fields in the usual order."""
    rest = [key for key in recipe if key not in ORDER and key != "stages"]
    last = {key: recipe[key] for key in [*ORDER, *rest] if recipe.get(key) not in (None, [], {}, ())}
    documents = [*recipe.get("stages", ()), last]
    return yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )


def as_python(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as a call of `hf_merge.merge`."""
    if not _is_plain(recipe):
        text = f'recipe = hf_merge.Recipe.from_yaml("""\\\n{to_yaml(recipe)}""")'
        return f'import hf_merge\n\n{text}\nhf_merge.merge(recipe, "merged")\n'
    words = {"method": recipe["merge_method"], **_fields(recipe), **_flat(recipe)}
    given = "".join(f"    {'lambda_' if key == 'lambda' else key}={value!r},\n" for key, value in words.items())
    listed = ", ".join(repr(name) for name in names(recipe))
    return f'import hf_merge\n\nmerged = hf_merge.merge(\n    [{listed}], "merged",\n{given})\n'


def as_command(recipe: Mapping[str, Any], *, job: str | None = None, repo_id: str = "me/merged") -> str:
    """Return a recipe as an `hf-merge merge` command: here, or on Hugging Face Jobs on hardware of the name `job`."""
    goal = f"--push-to-hub {shlex.quote(repo_id)} --job {job}" if job else "merged"
    if not _is_plain(recipe):
        return f"hf-merge merge recipe.yaml {goal}"
    fields = [f"{FLAGS[key]} {shlex.quote(str(value))}" for key, value in _fields(recipe).items()]
    settings = [f"-p {shlex.quote(f'{key}={_flagged(value)}')}" for key, value in _flat(recipe).items()]
    listed = " ".join(shlex.quote(name) for name in names(recipe))
    return " ".join(["hf-merge merge --method", recipe["merge_method"], *fields, *settings, listed, goal])


def packed(recipe: Mapping[str, Any]) -> str | None:
    """Return a recipe as the value of `?recipe=` in a link; None if the link would be too long."""
    text = json.dumps(recipe, separators=(",", ":"), ensure_ascii=False)
    made = base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode().rstrip("=")
    return made if len(made) <= LINK_LIMIT else None


def unpacked(text: str) -> str:
    """Return the recipe of a link as YAML text, which is to be read like any other.

    Raises:
        ValueError: it is no recipe of a link.
    """
    if len(text) > LINK_LIMIT:
        raise ValueError(f"The link's recipe has {len(text):,} characters; at most {LINK_LIMIT:,} are read.")
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), 1 << 16)
        if not unpacker.eof:
            raise ValueError("cut off, or too long")
        return raw.decode()
    except (ValueError, zlib.error) as error:
        raise ValueError("The link's recipe is damaged: copy the link again, whole.") from error


def words(tensors: Iterable[str]) -> tuple[str, str]:
    """Return by which words filters find attention and MLPs among the names of these tensors."""
    listed = list(tensors)

    def first(known: Sequence[str]) -> str:
        return next((word for word in known if any(word in name for name in listed)), known[0])

    return first(ATTENTION), first(MLP)


def _shown(setting: Any, default: Any) -> Any:
    """Return a recipe's setting as the form has it; `default` for one that the form cannot show."""
    if not isinstance(setting, (list, tuple, Mapping)):
        return setting
    listed = [setting] if isinstance(setting, Mapping) else list(setting)
    if listed and not any(isinstance(one, (list, tuple, Mapping)) for one in listed):
        return {"curve": listed}
    parts: dict[str, Any] = {}
    for one in listed:
        part = _part_of(one.get("filter")) if isinstance(one, Mapping) and "value" in one else None
        if part is None or part in parts:
            return default
        parts[part] = _shown(one["value"], None)
    whole = {"attention": None, "mlp": None, "rest": None} | parts
    rest = default if whole["rest"] is None else whole["rest"]
    return {"parts": {part: rest if value is None else value for part, value in whole.items()}} if parts else default


def _part_of(word: str | None) -> str | None:
    if word in (None, "*"):
        return "rest"
    return "attention" if word in ATTENTION else "mlp" if word in MLP else None


def _written(setting: Any, words: Sequence[str]) -> Any:
    """Return a setting of the form as a recipe has it."""
    if isinstance(setting, Mapping) and "curve" in setting:
        return list(setting["curve"])
    if isinstance(setting, Mapping) and "parts" in setting:
        parts = setting["parts"]
        named = [
            {"filter": word, "value": _written(parts[part], words)}
            for part, word in zip(("attention", "mlp"), words, strict=True)
        ]
        return [*named, {"value": _written(parts["rest"], words)}]
    return setting


def _with_parameters(recipe: dict[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in recipe.items() if key != "parameters"}
    return rest | ({"parameters": dict(parameters)} if parameters else {})


def _tidy(entry: Mapping[str, Any], parameters: Mapping[str, Any]) -> Any:
    """Return an entry with these parameters; the bare name if there is no more to say."""
    rest = {key: value for key, value in entry.items() if key != "parameters"}
    if parameters:
        return rest | {"parameters": dict(parameters)}
    return rest["model"] if rest.keys() == {"model"} else rest


def _is_plain(recipe: Mapping[str, Any]) -> bool:
    """Whether keywords can say all of it: models by their names, each parameter a value or one for each model."""
    said = {key for key, value in recipe.items() if value not in (None, [], {}, ())}
    if said - {"merge_method", "models", "parameters", *FLAGS} or not recipe.get("models"):
        return False
    if any(isinstance(one["model"], Mapping) or one.keys() - {"model", "parameters"} for one in entries(recipe)):
        return False
    each = [one.get("parameters") or {} for one in entries(recipe)]
    settings = [*(recipe.get("parameters") or {}).values(), *(value for one in each for value in one.values())]
    return len({tuple(sorted(one)) for one in each}) <= 1 and not any(
        isinstance(one, (list, tuple, Mapping)) for one in settings
    )


def _fields(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: name_of(recipe[key]) if key == "base_model" else recipe[key]
        for key in FLAGS
        if recipe.get(key) is not None
    }


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a plain recipe: one value each, or a list with one for each model."""
    each = [one.get("parameters") or {} for one in entries(recipe)]
    own = {key: [one[key] for one in each] for key in (each[0] if each else ())}
    return {**(recipe.get("parameters") or {}), **own}


def _flagged(value: Any) -> str:
    """Return a value as `--parameter` takes it."""
    if isinstance(value, list):
        return ",".join(_flagged(one) for one in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
