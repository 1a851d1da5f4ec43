"""Load a backbone with task experts, from a folder or the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hf_merge import _compat
from hf_merge.adapters.modules import layout_of
from hf_merge.errors import ParameterError, SourceError
from hf_merge.experts.reading import Index, read_index
from hf_merge.experts.routed import RoutedModel
from hf_merge.experts.routers import read_router
from hf_merge.sources.folder import read_json
from hf_merge.sources.hub import download
from hf_merge.types import ModelRef


def load_experts(
    folder_or_repo: str | Path,
    *,
    router: Literal["auto"] | None = "auto",
    device_map: Any = None,
    dtype: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> RoutedModel:
    """Load a backbone with task experts.

        model = hf_merge.load_experts("merged")
        model.set_task("cars")
        outputs = model(pixel_values=images)
        outputs = model(pixel_values=images, task=["cars", "dtd"])  # one for each example
        outputs = model.set_task(None)(pixel_values=images)         # by the router, if there is one

    Args:
        folder_or_repo: as `merge` wrote it, or its id on the Hub.
        router: `auto`: the one that lies there, if there is one; None: the caller says the task.
        device_map, dtype: of the backbone, as in transformers; experts follow it.
        revision, token, cache_dir, local_files_only: for a model on the Hub, as everywhere in huggingface_hub.
        **kwargs: of `from_pretrained`.

    Raises:
        SourceError: it is no such folder, or a part of it does not belong to the rest; or weights would be quantised,
            or offloaded to where no expert can change them.
    """
    if router not in ("auto", None):
        raise ParameterError(
            f"'router' should be 'auto' or None; found {router!r}. Train one with hf_merge.train_router."
        )
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    local = Path(folder_or_repo).expanduser()
    is_local = local.is_dir()
    folder = local if is_local else download(ModelRef(path=str(folder_or_repo), revision=revision), only=["*"], **hub)
    index = read_index(folder)
    config = read_json(folder / "config.json")
    layout = layout_of(config)
    if layout is None:
        raise SourceError(f"'{folder_or_repo}' has no class of transformers' own in its config.json.")
    found = read_router(folder, [*index.tasks], **hub) if router == "auto" else None
    model, missing = _backbone(_model_class(index, config), folder, device_map, dtype, kwargs)
    _refuse_unreachable(model)
    return RoutedModel(
        model.eval(), index, layout, router=found, folder=folder if is_local else None, missing=missing
    ).eval()  # fmt: skip


def _backbone(kind: Any, folder: Path, device_map: Any, dtype: Any, kwargs: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Load the backbone; return it, and the parameters that its files lack, which the tasks bring."""
    with _compat.quiet():  # heads that the tasks bring are looked at here
        model, told = kind.from_pretrained(
            folder, device_map=device_map, dtype=dtype or "auto", output_loading_info=True, **kwargs
        )
    return model, sorted(told["missing_keys"])


def _refuse_unreachable(model: Any) -> None:
    """Raise if weights are not where an expert can change them."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise SourceError(
            "The backbone would be quantised, and experts change its weights as they were merged: load it without "
            "quantization_config, or with a smaller dtype."
        )
    away = next((name for name, one in model.named_parameters() if one.is_meta), None)
    if away is not None:
        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
        raise SourceError(
            f"'{away}' and others are offloaded ({', '.join(sorted(places)) or 'not loaded'}), and experts change "
            'weights where they lie: load the model where it fits, as device_map={"": "cpu"}, or with a smaller dtype.'
        )


def _model_class(index: Index, config: Mapping[str, Any]) -> Any:
    """Return the class that has the tasks' heads; the backbone's own if they have none."""
    import transformers

    kinds = {next(iter(task.get("architectures") or ()), "") for task in index.tasks.values()} - {""}
    if len(kinds) > 1:
        raise SourceError(f"The tasks are of several classes of models ({', '.join(sorted(kinds))}): load each alone.")
    own = next(iter(config.get("architectures") or ()), "AutoModel")
    return getattr(transformers, next(iter(kinds), own), transformers.AutoModel)
