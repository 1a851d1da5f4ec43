"""Step 5: what came out, in pictures, and tried beside the models that it was made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import form
import gradio as gr
import pandas as pd
import psutil
import security
from components import heatmap, trials
from jobs import Job
from ui.page import Page
from ui.run import LENGTH

import hf_merge

TOKENS = 64
OUTSIDE = "outside"
CROWDED = 16
"""Layers that an axis can name one by one."""
IMAGES = ("image-classification",)
COMPARED = ("feature-extraction", "sentence-similarity")
CHANGE = "% of the base's weights"
ROOM = 1.3
"""Memory that a model takes while it is loaded and answers, over its size."""


def build(page: Page) -> dict[str, Any]:
    """Lay the step out; return its components."""
    with gr.Group(elem_classes="step", elem_id="step-result"):
        gr.Markdown("## 5 · Result")
        waiting = gr.Markdown(
            "Here will be pictures of what the merge did, and a try-out beside its parents.", elem_id="no-result"
        )
        with gr.Column(visible=False, elem_id="result") as whole:
            told = gr.Markdown("", elem_id="result-told")
            similarity = heatmap(elem_id="similarity")
            with gr.Row():
                change = _line_plot("change", "Change by layer", y="change", y_title=CHANGE, color="model")
                norms = _line_plot("norms", "Norms by layer", y="norm", y_title="norm", color="name")
            readings = gr.Markdown("", elem_id="readings")
            conflicts = heatmap(elem_id="conflicts")
            gr.Markdown("### Try it")
            with gr.Row():
                text = gr.Textbox(label="Text", lines=2, max_length=LENGTH, elem_id="try-text")
                image = gr.Image(label="Image", type="pil", visible=False, height=200, elem_id="try-image")
            go = gr.Button("Try", elem_id="try")
            answers = trials(elem_id="answers")
    parts = {
        "waiting": waiting,
        "result": whole,
        "result_told": told,
        "similarity": similarity,
        "change": change,
        "norms": norms,
        "readings": readings,
        "conflicts": conflicts,
        "try_text": text,
        "try_image": image,
        "answers": answers,
    }
    _wire(page, go, parts)
    return parts


def _line_plot(elem_id: str, title: str, **columns: Any) -> gr.LinePlot:
    """Return a plot by layer, a line for each model."""
    size = {"height": 280, "min_width": 320}
    return gr.LinePlot(
        x="layer", x_title="layer", title=title, elem_id=elem_id, buttons=["fullscreen"], **size, **columns
    )


def shown(job: Job | None) -> dict[str, Any]:
    """Return what the step shows of a finished job."""
    if job is None or job.state != "done":
        return {"waiting": gr.Markdown(visible=True), "result": gr.Column(visible=False)}
    result = job.result
    if "folder" not in result:
        link = f"[{security.escape_markdown(result['repo_id'])}]({result['url']})"
        return {
            "waiting": gr.Markdown(f"Merged straight into {link}.", visible=True),
            "result": gr.Column(visible=False),
        }
    analysis = result["analysis"]
    task = result.get("task") or "text-generation"
    readings = analysis.get("readings", {})
    told = (
        f"Merged in {max(result['seconds'], 1):.0f} s."
        if "error" not in analysis
        else (f"Merged; pictures could not be made: {security.escape_markdown(analysis['error'])}")
    )
    return {
        "waiting": gr.Markdown(visible=False),
        "result": gr.Column(visible=True),
        "result_told": told,
        "similarity": _similarity(analysis),
        "conflicts": _conflicts(analysis),
        "change": _plot(_changes(analysis)),
        "norms": _plot(_norms(analysis)),
        "readings": "\n\n".join(
            security.escape_markdown(readings[key]) for key in ("change", "norms") if key in readings
        ),
        "try_text": gr.Textbox(
            visible=task not in IMAGES,
            value=result.get("prompt", ""),
            info="A text on each line, to be compared." if task in COMPARED else None,
        ),
        "try_image": gr.Image(visible=task in IMAGES),
        "answers": {"trials": []},
    }


def _similarity(analysis: dict[str, Any]) -> dict[str, Any]:
    """Return how alike the changes of the base are, or without a base how far apart the models lie."""
    kind, low, high, caption = ("similarity", -1, 1, "How alike the changes are")
    if not analysis.get(kind):
        kind, low, high, caption = ("distances", 0, 1.5, "How far apart the models are")
    found = analysis.get(kind) or {"models": [], "values": []}
    names = form.labels(found["models"])
    return {
        "rows": names,
        "columns": names,
        "values": found["values"],
        "low": low,
        "high": high,
        "digits": 2,
        "caption": caption,
        "reading": analysis.get("readings", {}).get(kind, ""),
    }


def _conflicts(analysis: dict[str, Any]) -> dict[str, Any]:
    shares = {(row["layer"], row["part"]): row["share"] for row in analysis.get("conflicts") or ()}
    layers, kinds = (list(dict.fromkeys(place[axis] for place in shares)) for axis in (0, 1))
    return {
        "rows": layers,
        "columns": kinds,
        "values": [[shares.get((layer, kind)) for kind in kinds] for layer in layers],
        "low": 0,
        "high": 1,
        "digits": 2,
        "corner": "layer",
        "caption": "Where signs disagree",
        "reading": analysis.get("readings", {}).get("conflicts", ""),
    }


def _plot(table: pd.DataFrame) -> Any:
    """Return what a plot shows; one of nothing is not there, as that of changes where there is no base."""
    return gr.LinePlot(table, visible=not table.empty)


def _changes(analysis: dict[str, Any]) -> pd.DataFrame:
    """Return how far each model went in each layer, in per cent of the length of the base's weights there."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in analysis.get("change") or ():
        both = sums.setdefault((row["layer"], row["model"]), [0.0, 0.0])
        both[0] += row["norm"] ** 2
        both[1] += row["base_norm"] ** 2
    lines = [(layer, model, 100 * (own / base) ** 0.5) for (layer, model), (own, base) in sums.items() if base]
    return _by_layer(lines, ["layer", "model", "change"])


def _norms(analysis: dict[str, Any]) -> pd.DataFrame:
    lines = [(row["layer"], row["name"], row["norm"]) for row in analysis.get("norms") or ()]
    return _by_layer(lines, ["layer", "name", "norm"])


def _by_layer(lines: list[tuple[str, str, float]], columns: list[str]) -> pd.DataFrame:
    """Return the lines of layers; their names are numbers where there are many, and an axis would be crowded."""
    inner = [line for line in lines if line[0] != OUTSIDE]
    many = len({line[0] for line in inner}) > CROWDED and all(line[0].isdecimal() for line in inner)
    return pd.DataFrame([(int(line[0]) if many else line[0], *line[1:]) for line in inner], columns=pd.Index(columns))


def _wire(page: Page, go: gr.Button, parts: dict[str, Any]) -> None:
    def attempt(
        text: str, image: Any, owner: str, run: dict[str, Any], oauth: gr.OAuthToken | None, request: gr.Request
    ) -> dict[str, Any]:
        security.guard(request)
        job = page.place.jobs.get(owner, run.get("shown") or "")
        if job is None or job.state != "done" or "folder" not in job.result:
            return {"trials": [], "error": "This merge is not here any more: merge again."}
        return tried(job, _given(job, (text or "")[:LENGTH], image), page.place.token(oauth))

    inputs = [parts["try_text"], parts["try_image"], page.owner, page.run]
    gr.on(
        [go.click, parts["try_text"].submit],
        attempt,
        inputs,
        parts["answers"],
        concurrency_id="try",
        concurrency_limit=1,
        api_visibility="private",
        show_progress="minimal",
    )


def _given(job: Job, text: str, image: Any) -> Any:
    """Return what the models get: an image, a text, or a text for each line where models compare them."""
    task = job.result.get("task")
    if task in IMAGES:
        return image
    return [line for line in text.splitlines() if line.strip()] if task in COMPARED else text


def tried(job: Job, given: Any, token: Any) -> dict[str, Any]:
    """Give the merge and its parents the same input."""
    if given is None or not given:
        return {"trials": [], "error": "Give the models something to answer to."}
    size = sum(file.stat().st_size for file in Path(job.result["folder"]).rglob("*.safetensors"))
    free = psutil.virtual_memory().available
    if size * ROOM > free:
        told = f"The model takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free here"
        return {"trials": [], "error": f"{told}: try it on a larger machine, with `hf-merge try`."}
    recipe = job.result["recipe"]
    parents = form.names(recipe)
    models = {"merged": job.result["folder"], **dict(zip(form.labels(parents), parents, strict=True))}
    cache = {"token": token, "cache_dir": None if token is None else job.cache}
    try:
        made = on_gpu(hf_merge.try_out)(models, given, max_new_tokens=TOKENS, **cache)
    except hf_merge.MergeError as error:
        return {"trials": [], "error": security.redact(str(error))}
    return {"trials": [one.to_dict() for one in made]}


def on_gpu(run: Any) -> Any:
    """Return a function that has a GPU while it runs, on a Space with ZeroGPU; elsewhere the function itself."""
    if os.environ.get("SPACES_ZERO_GPU"):
        import spaces  # type: ignore[import-not-found]

        return spaces.GPU(duration=60)(run)
    return run
