"""The command line `hf-merge`: merge, plan, push, deploy and others. Results on stdout, all else on stderr.

Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.
"""

import atexit
import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import yaml
from huggingface_hub import typer_factory
from huggingface_hub.utils import logging

import hf_merge
from hf_merge import _compat, launching
from hf_merge.analysis.commands import EPILOG as ANALYZE
from hf_merge.analysis.commands import analyze
from hf_merge.errors import MergeError, RecipeError
from hf_merge.experts.commands import EPILOG as TRAIN_ROUTER
from hf_merge.experts.commands import train_router
from hf_merge.flags import CacheDir, LocalOnly, Token
from hf_merge.search.commands import app as search
from hf_merge.space_command import EPILOG as SPACE
from hf_merge.space_command import space
from hf_merge.study.commands import study
from hf_merge.trial.commands import EPILOG as TRY
from hf_merge.trial.commands import try_out

Argument, Option, out = _compat.cli_words()
_NEW_OBJECTS = 100_000
"""Python looks for cycles after so many; 700 by default."""


def _examples(*commands: str) -> str:
    return "\n".join(["Examples", *(f"  $ {command}" for command in commands)])


app = typer_factory(
    help="Merge Hugging Face models: plan from headers, stream in bounded memory, repeat bit for bit.",
    epilog=_examples("hf-merge demo", "hf-merge plan recipe.yaml", "hf-merge merge recipe.yaml merged"),
)

Sources = Annotated[list[str], Argument(help="RECIPE, or with --method the models: folders or Hub ids.")]
SourcesAndOutput = Annotated[
    list[str],
    Argument(
        help="RECIPE OUTPUT, or with --method MODEL... OUTPUT (folders or Hub ids, then the folder to make). "
        "With --push-to-hub no OUTPUT is needed; with --method too, --keep-local says that the last is one."
    ),
]
Method = Annotated[str | None, Option("--method", "-m", help="Merge method; `hf-merge methods` lists them.")]
Base = Annotated[str | None, Option("--base", "-b", help="The model that the others were fine-tuned from.")]
Parameters = Annotated[
    list[str] | None,
    Option("--parameter", "-p", help="NAME=VALUE of the method; NAME=V1,V2 gives each model its own. Repeatable."),
]
Statistics = Annotated[
    list[str] | None,
    Option("--statistics", help="File of `hf-merge measure` of a model; once for each, in their order. Repeatable."),
]
DType = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"] | None, Option("--dtype", help="Of the weights written.")
]
Seed = Annotated[int | None, Option("--seed", help="Random methods draw from it. Default: 0, or the recipe's.")]
Missing = Annotated[
    Literal["error", "base", "skip-model"] | None,
    Option("--missing", help="What to do with a tensor that some model lacks. Default: error."),
]
Keys = Annotated[
    Literal["base", "strict", "intersection", "union"] | None,
    Option(
        "--keys", help="Which tensors the output has: the base's, the same and no others anywhere, common ones, all."
    ),
]
TokenizerSource = Annotated[
    str | None, Option("--tokenizer-source", help="Tokenizer of the result: union, base or a model. Default: as it is.")
]
ChatTemplate = Annotated[
    str | None, Option("--chat-template", help="auto, alpaca, chatml, llama3, mistral, exaone, or a Jinja file.")
]
Nonfinite = Annotated[bool, Option("--allow-nonfinite", help="Let NaN and Inf pass.")]
DeviceMap = Annotated[
    str, Option("--device-map", help="Where to compute: auto, balanced, balanced_low_0, sequential, cpu, cuda:0, ...")
]
MaxMemory = Annotated[
    list[str] | None,
    Option("--max-memory", help="DEVICE=SIZE that may be used, as 0=10GB for the first accelerator. Repeatable."),
]
ShardSize = Annotated[str, Option("--max-shard-size", help="Of the output's files.")]
OutputFormat = Annotated[
    Literal["model", "adapter"] | None,
    Option("--output-format", help="A model, or what changes in the base as a PEFT adapter. Default: model."),
]
Rank = Annotated[
    str | None,
    Option("--rank", help="Of an adapter: at most so many dimensions (32), or the share of energy to keep (0.9)."),
]
Targets = Annotated[
    list[str] | None,
    Option("--targets", help="NAME[,NAME...] of modules that get factors: q_proj, '*.mlp.*', all-linear. Repeatable."),
]
ExactSvd = Annotated[
    bool, Option("--exact-svd", help="Of an adapter: decompose whole matrices, and no sketches of them.")
]
KeepRest = Annotated[
    bool | None,
    Option("--keep-rest/--no-keep-rest", help="Save changed norms and biases in an adapter. Default: but for vLLM."),
]
Space = Annotated[
    Literal["core", "full", "factors"] | None,
    Option(
        "--space", help="Where adapters are merged with each other: core (default), full matrices, or A and B apart."
    ),
]
Vllm = Annotated[bool, Option("--vllm", help="Write an adapter as vLLM loads it, or refuse to.")]
Tasks = Annotated[
    str | None,
    Option("--tasks", help="NAME,NAME...: what the tasks of methods such as emr are called. Default: as the models."),
]
Overwrite = Annotated[
    bool, Option("--overwrite", help="Replace the model that is at OUTPUT, once the new one is whole.")
]
Stream = Annotated[bool, Option("--stream", help="Read tensors on the Hub by range, and keep no weights in the cache.")]
Private = Annotated[bool, Option("--private", help="Make the repository private, or refuse one that is not.")]
CreatePr = Annotated[bool, Option("--create-pr", help="Open a pull request instead of changing the branch.")]
Message = Annotated[str | None, Option("--commit-message", help="The first line of the commit.")]
ExistOk = Annotated[bool, Option("--exist-ok", help="Replace the model that is in the repository.")]


@app.command(
    "merge",
    epilog=_examples(
        "hf-merge merge recipe.yaml merged",
        "hf-merge merge --method ties --base org/base org/a org/b -p density=0.5 merged",
        "hf-merge merge recipe.yaml --push-to-hub me/merged --private",
        "hf-merge merge recipe.yaml merged --processes 4",
    ),
)
def merge(
    sources_and_output: SourcesAndOutput,
    method: Method = None,
    base: Base = None,
    parameter: Parameters = None,
    statistics: Statistics = None,
    dtype: DType = None,
    seed: Seed = None,
    missing: Missing = None,
    keys: Keys = None,
    tokenizer_source: TokenizerSource = None,
    chat_template: ChatTemplate = None,
    allow_nonfinite: Nonfinite = False,
    output_format: OutputFormat = None,
    rank: Rank = None,
    targets: Targets = None,
    exact_svd: ExactSvd = False,
    space: Space = None,
    keep_rest: KeepRest = None,
    vllm: Vllm = False,
    tasks: Tasks = None,
    push_to_hub: Annotated[str | None, Option("--push-to-hub", help="REPO_ID to publish the model in.")] = None,
    keep_local: Annotated[
        bool | None,
        Option("--keep-local/--no-keep-local", help="Leave the model at OUTPUT too. Default: if there is an OUTPUT."),
    ] = None,
    private: Private = False,
    create_pr: CreatePr = False,
    commit_message: Message = None,
    exist_ok: ExistOk = False,
    overwrite: Overwrite = False,
    resume: Annotated[bool, Option("--resume", help="Take over the finished shards of an interrupted run.")] = False,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory = None,
    max_shard_size: ShardSize = "5GB",
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
    stream: Stream = False,
    processes: Annotated[
        int, Option("--processes", min=1, help="Merge with so many processes on this machine; each has its threads.")
    ] = 1,
    job: Annotated[str | None, Option("--job", help="Merge on Hugging Face Jobs, on hardware of this name.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="With --job: show request and price; start nothing.")] = False,
    timeout: Annotated[str, Option("--timeout", help="With --job: when to stop it, finished or not.")] = "2h",
    namespace: Annotated[
        str | None, Option("--namespace", help="With --job: the account that runs and pays it.")
    ] = None,
) -> None:
    """Merge models into a folder that from_pretrained loads, or straight into the Hub."""
    changes = _changes(
        parameter, method=method, base_model=base, statistics=statistics, dtype=dtype, seed=seed, missing=missing,
        keys=keys,
        tokenizer_source=tokenizer_source, chat_template=chat_template, allow_nonfinite=allow_nonfinite or None,
        output_format=output_format, space=space, tasks=tasks.split(",") if tasks else None,
        **_of_adapter(rank, targets, exact_svd, keep_rest, vllm),
    )  # fmt: skip
    if job is not None:
        here = {"--commit-message": commit_message, "--keep-local": keep_local, "--overwrite": overwrite,
                "--statistics": statistics,
                "--resume": resume, "--stream": stream, "--local-files-only": local_files_only,
                "--processes": processes > 1}  # fmt: skip
        if said := [flag for flag, value in here.items() if value]:
            raise click.UsageError(f"{', '.join(said)} cannot be said of a job: leave it out.")
        _job(
            sources_and_output, push_to_hub, flavor=job, dry_run=dry_run, timeout=timeout, namespace=namespace,
            private=private, create_pr=create_pr, exist_ok=exist_ok, max_shard_size=max_shard_size, token=token,
            cache_dir=cache_dir, **changes,
        )  # fmt: skip
        return
    if dry_run or namespace is not None:
        raise click.UsageError("--dry-run and --namespace go with --job; `hf-merge plan` says what a merge does here.")
    sources, output = _sources_and_output(
        sources_and_output, only_sources=push_to_hub is not None and bool(method) and not keep_local
    )
    if not sources or (output is None and push_to_hub is None):
        raise click.UsageError(
            "Give a recipe and the output folder, or with --method the models and the output folder."
        )
    if processes > 1 and not launching.is_launched():
        raise click.exceptions.Exit(_launch(processes))
    merged = hf_merge.merge(
        _recipe(sources, method), output, overwrite=overwrite, resume=resume, device_map=device_map,
        max_memory=_max_memory(max_memory),
        max_shard_size=max_shard_size, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
        push_to_hub=push_to_hub, keep_local=keep_local, private=private or None, create_pr=create_pr,
        commit_message=commit_message, exist_ok=exist_ok, stream=stream, **changes,
    )  # fmt: skip
    if launching.environment().rank:
        return
    for problem in merged.plan.problems:
        out.warning(problem.message)
    places = {"path": merged.path, "repo_id": merged.repo_id, "commit": merged.commit, "url": merged.url}
    where = {key: str(value) for key, value in places.items() if value is not None}
    if isinstance(merged, hf_merge.MergedAdapter):
        _show_adapter("Merged", merged)
    else:
        out.result("Merged", **where, tensors=len(merged.plan.steps), bytes=merged.plan.bytes_written)


@app.command(
    "extract",
    epilog=_examples(
        "hf-merge extract org/finetuned org/base adapter --rank 32",
        "hf-merge extract org/finetuned org/base adapter --energy 0.9 --targets q_proj,v_proj",
    ),
)
def extract(
    finetuned: Annotated[str, Argument(help="The model: a folder or a Hub id.")],
    base: Annotated[str, Argument(help="The model that it was fine-tuned from.")],
    output: Annotated[str | None, Argument(help="The folder to make; not needed with --push-to-hub.")] = None,
    rank: Annotated[int | None, Option("--rank", help="At most so many dimensions for each module.")] = None,
    energy: Annotated[
        float | None, Option("--energy", help="As few as keep this share of the squared norm of each change.")
    ] = None,
    targets: Targets = None,
    exact: Annotated[bool, Option("--exact", help="Decompose whole matrices, and no sketches of them.")] = False,
    keep_rest: KeepRest = None,
    vllm: Vllm = False,
    dtype: DType = None,
    seed: Seed = None,
    tokenizer_source: TokenizerSource = None,
    push_to_hub: Annotated[str | None, Option("--push-to-hub", help="REPO_ID to publish the adapter in.")] = None,
    private: Private = False,
    create_pr: CreatePr = False,
    exist_ok: ExistOk = False,
    overwrite: Overwrite = False,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
    stream: Stream = False,
) -> None:
    """Extract a LoRA adapter from a fine-tuned model."""
    listed = [name for text in targets for name in text.split(",")] if targets else None
    made = hf_merge.extract_adapter(
        finetuned, base, output, rank=rank, energy=energy, targets=listed, exact=exact, keep_rest=keep_rest, vllm=vllm,
        push_to_hub=push_to_hub, private=private or None, create_pr=create_pr, exist_ok=exist_ok, overwrite=overwrite,
        token=token, cache_dir=cache_dir, local_files_only=local_files_only, stream=stream,
        **_changes(None, dtype=dtype, seed=seed, tokenizer_source=tokenizer_source),
    )  # fmt: skip
    _show_adapter("Extracted", made)


@app.command(
    "push",
    epilog=_examples("hf-merge push merged me/merged --private", "hf-merge push merged org/merged --create-pr"),
)
def push(
    folder: Annotated[str, Argument(help="The folder to publish.")],
    repo_id: Annotated[str, Argument(help="NAMESPACE/NAME on the Hub; made if it does not exist.")],
    private: Private = False,
    create_pr: CreatePr = False,
    revision: Annotated[
        str | None, Option("--revision", help="The branch; made from main if it does not exist. Default: main.")
    ] = None,
    commit_message: Message = None,
    exist_ok: ExistOk = False,
    token: Annotated[str | None, Option("--token", help="One that may write.")] = None,
) -> None:
    """Publish a folder on the Hub, as one commit."""
    info = hf_merge.push_to_hub(
        folder, repo_id, private=private or None, create_pr=create_pr, revision=revision,
        commit_message=commit_message, exist_ok=exist_ok, token=token,
    )  # fmt: skip
    out.result("Pushed", repo_id=info.repo_url.repo_id, commit=info.oid, url=info.pr_url or info.commit_url)


@app.command(
    "measure",
    epilog=_examples(
        "hf-merge measure org/a a.jsonl a.safetensors --what gram",
        "hf-merge measure org/a images/ a.safetensors --what fisher --targets expected",
        "hf-merge measure org/a a.jsonl org/b b.jsonl grams --what merged_gram",
    ),
)
def measure(
    words: Annotated[
        list[str],
        Argument(
            help="MODEL DATA OUTPUT; of merged_gram MODEL DATA of each model, then OUTPUT. DATA: a file or folder."
        ),
    ],
    what: Annotated[
        Literal["fisher", "gram", "activations", "merged_gram"],
        Option("--what", help="For the methods fisher, regmean (gram) and regmean_plus_plus (merged_gram)."),
    ] = "gram",
    targets: Annotated[
        Literal["sampled", "data", "expected"],
        Option("--targets", help="Labels of the Fisher information: the model's, the data's, all by their chance."),
    ] = "sampled",
    column: Annotated[
        list[str] | None,
        Option("--column", help="ROLE=NAME, as text=review; also text_pair, image, label. Repeatable."),
    ] = None,
    batch_size: Annotated[int, Option("--batch-size", help="Examples at a time.")] = 8,
    max_examples: Annotated[int, Option("--max-examples", help="At most so many, drawn by the seed; 0: all.")] = 256,
    max_length: Annotated[int, Option("--max-length", help="Of texts, in tokens.")] = 512,
    seed: Annotated[int, Option("--seed", help="Examples and labels are drawn by it.")] = 0,
    device_map: DeviceMap = "auto",
    max_memory: Annotated[str, Option("--max-memory", help="Of the Gram matrices of one pass over the data.")] = "4GB",
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "float64"], Option("--dtype", help="In which the model runs.")
    ] = "float32",
    scaling: Annotated[float | None, Option("--scaling", help="Of merged_gram: that of the merge.")] = None,
    ridge: Annotated[float | None, Option("--ridge", help="Of merged_gram: that of the merge.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is at OUTPUT.")] = False,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Run a model on data and leave a file of statistics, which some methods merge by."""
    *pairs, output = words
    together = what == "merged_gram"
    if (len(pairs) != 2 and not together) or len(pairs) % 2 or not pairs:
        raise click.UsageError("Give MODEL DATA OUTPUT; with --what merged_gram MODEL DATA of each model, then OUTPUT.")
    if bad := [text for text in column or () if not all(text.partition("="))]:
        raise click.UsageError(f"--column takes ROLE=NAME, as text=review; found '{bad[0]}'.")
    model, data = (pairs[::2], pairs[1::2]) if together else pairs
    made = hf_merge.measure(
        model, data, what, output=output, targets=targets, batch_size=batch_size, max_examples=max_examples or None,
        columns=dict(text.split("=", 1) for text in column or ()), max_length=max_length, seed=seed,
        device_map=device_map, max_memory=max_memory, dtype=dtype, scaling=scaling, ridge=ridge, overwrite=overwrite,
        token=token, cache_dir=cache_dir, local_files_only=local_files_only,
    )  # fmt: skip
    out.result("Measured", path=", ".join(map(str, made)) if isinstance(made, list) else str(made))


@app.command("plan", epilog=_examples("hf-merge plan recipe.yaml", "hf-merge plan recipe.yaml --json"))
def plan(
    sources: Sources,
    method: Method = None,
    base: Base = None,
    parameter: Parameters = None,
    statistics: Statistics = None,
    dtype: DType = None,
    seed: Seed = None,
    missing: Missing = None,
    keys: Keys = None,
    tokenizer_source: TokenizerSource = None,
    chat_template: ChatTemplate = None,
    allow_nonfinite: Nonfinite = False,
    output_format: OutputFormat = None,
    rank: Rank = None,
    targets: Targets = None,
    exact_svd: ExactSvd = False,
    space: Space = None,
    keep_rest: KeepRest = None,
    vllm: Vllm = False,
    tasks: Tasks = None,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory = None,
    max_shard_size: ShardSize = "5GB",
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
    stream: Stream = False,
) -> None:
    """Say what a merge would read, write and need; only headers of weights are read."""
    changes = _changes(
        parameter, method=method, base_model=base, statistics=statistics, dtype=dtype, seed=seed, missing=missing,
        keys=keys,
        tokenizer_source=tokenizer_source, chat_template=chat_template, allow_nonfinite=allow_nonfinite or None,
        output_format=output_format, space=space, tasks=tasks.split(",") if tasks else None,
        **_of_adapter(rank, targets, exact_svd, keep_rest, vllm),
    )  # fmt: skip
    made = hf_merge.plan(
        _recipe(sources, method), device_map=device_map, max_memory=_max_memory(max_memory),
        max_shard_size=max_shard_size, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
        stream=stream, **changes,
    )  # fmt: skip
    if out.mode.value == "json":
        out.dict(made.to_dict())
    else:
        out.text(str(made))
    if made.errors:
        raise click.exceptions.Exit(1)


@app.command(
    "check",
    epilog=_examples(
        "hf-merge check recipe.yaml", "hf-merge check org/a org/b", "hf-merge check org/a org/b --base org/base --json"
    ),
)
def check(
    sources: Annotated[list[str], Argument(help="RECIPE, ours or MergeKit's, or models: folders or Hub ids.")],
    method: Method = None,
    base: Base = None,
    parameter: Parameters = None,
    missing: Missing = None,
    keys: Keys = None,
    tokenizer_source: TokenizerSource = None,
    output_format: OutputFormat = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Say whether models can be merged, and what would help; of weights only headers are read."""
    changes = _changes(
        parameter, missing=missing, keys=keys, tokenizer_source=tokenizer_source, output_format=output_format
    )
    report = hf_merge.check(
        sources[0] if _is_recipe(sources) else sources, base_model=base, method=method, token=token,
        cache_dir=cache_dir, local_files_only=local_files_only, **changes,
    )  # fmt: skip
    _show(report)
    if report.verdict == "does not fit":
        raise click.exceptions.Exit(1)


@app.command("methods", epilog=_examples("hf-merge methods", "hf-merge methods ties"))
def methods(name: Annotated[str | None, Argument(help="A method, or a pattern such as '*ties*'.")] = None) -> None:
    """List the merge methods, or explain one."""
    found = hf_merge.list_methods(name or "*")
    if name and (name in found or not found):
        out.text(_explain(hf_merge.get_method(name)))
        return
    out.set_no_truncate(True)
    out.table([{"name": each, "summary": hf_merge.get_method(each).summary} for each in found])


@app.command("demo", epilog=_examples("hf-merge demo"))
def demo(output: Annotated[str, Argument(help="The folder to make.")] = "hf_merge_demo") -> None:
    """Train a small vision model and three fine-tunes, merge them by several methods, and compare."""
    from hf_merge.demo import run_demo

    result = run_demo(output)
    out.text(result.table())
    out.result("Merged model with its card", path=str(result.best), seconds=round(result.seconds))


app.command("analyze", epilog=ANALYZE)(analyze)
app.command("try", epilog=TRY)(try_out)
app.add_command(search, "search")
app.command(
    "study",
    epilog=_examples(
        "hf-merge study vision8", "hf-merge study vision8 --quick --tasks 4", "hf-merge study study.yaml results"
    ),
)(study)
app.command("train-router", epilog=TRAIN_ROUTER)(train_router)
app.command("space", epilog=SPACE)(space)


def _sources_and_output(words: list[str], *, only_sources: bool) -> tuple[list[str], str | None]:
    """Tell the output from what is merged: it is the last, unless a push leaves it out."""
    if only_sources or (len(words) == 1 and words[0].endswith((".yaml", ".yml", ".json"))):
        return words, None
    return words[:-1], words[-1]


@app.command(
    "deploy",
    epilog=_examples("hf-merge deploy me/merged", "hf-merge deploy me/merged --to job --hardware a10g-small --start"),
)
def deploy(
    repo_id: Annotated[str, Argument(help="The model on the Hub, or for commands a folder.")],
    to: Annotated[
        Literal["commands", "job", "endpoint", "space"],
        Option("--to", help="Your own machine, a job that serves for a while, an inference endpoint, a demo."),
    ] = "commands",
    start: Annotated[bool, Option("--start", help="Start it; without, only say what would be sent.")] = False,
    hardware: Annotated[
        str | None, Option("--hardware", help="As `hf jobs hardware` or `hf endpoints hardware` list it.")
    ] = None,
    name: Annotated[str | None, Option("--name", help="Of the endpoint or Space.")] = None,
    namespace: Annotated[str | None, Option("--namespace", help="The account that owns and pays it.")] = None,
    timeout: Annotated[str, Option("--timeout", help="When to stop a job.")] = "1h",
    public: Annotated[bool, Option("--public", help="Let everybody see the Space.")] = False,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run the code that came with the model.")
    ] = False,
    token: Token = None,
) -> None:
    """Say how to serve a model and what that costs, or start it on the Hub."""
    _show(hf_merge.deploy(
        repo_id, to, dry_run=not start, hardware=hardware, name=name, namespace=namespace, timeout=timeout,
        private=not public, trust_remote_code=trust_remote_code, token=token,
    ))  # fmt: skip


@app.command(
    "register", epilog=_examples("hf-merge register", "hf merge plan recipe.yaml", "hf-merge register --remove")
)
def register(remove: Annotated[bool, Option("--remove", help="Take it back.")] = False) -> None:
    """Let Hugging Face's own command line run this one: `hf merge ...`."""
    from hf_merge import extension

    if remove:
        out.result("Removed", path=str(extension.unregister()))
    else:
        out.result("Registered", command="hf merge", path=str(extension.register()))


def _job(sources: list[str], repo_id: str | None, **wanted: Any) -> None:
    """Merge elsewhere: a job has no folder to leave the result in."""
    from hf_merge.jobs import run_merge_job

    if repo_id is None:
        raise click.UsageError("--job needs --push-to-hub: the job keeps no folder.")
    method = wanted.get("method")
    if method is None and len(sources) > 1:
        raise click.UsageError(f"--job keeps no folder: leave '{sources[-1]}' out.")
    _show(run_merge_job(_recipe(sources, method), repo_id, **wanted))


def _launch(processes: int) -> int:
    """Run this command as several processes; return their exit status."""
    if (said := launching.environment()).world > 1:
        raise click.UsageError(f"--processes starts processes, and {said.by} has started {said.world}: leave it out.")
    return launching.launch(processes, "-m", "hf_merge.cli", *sys.argv[1:])


def _show(request: Any) -> None:
    """Print what was or would be asked of the Hub, for people or for programs."""
    if out.mode.value == "json":
        out.dict(request.to_dict())
    else:
        out.text(str(request))


def _show_adapter(word: str, made: Any) -> None:
    """Say where an adapter is, and how much of the change it keeps at least."""
    if word != "Merged":  # whose problems were shown
        for problem in made.plan.problems:
            out.warning(problem.message)
    places = {"path": made.path, "repo_id": made.repo_id, "commit": made.commit, "url": made.url}
    where = {key: str(value) for key, value in places.items() if value is not None}
    least = f"{min(made.kept.values(), default=1.0):.4f}"
    out.result(word, **where, modules=len(made.kept), least_kept=least, left_out=len(made.left_out))


def _changes(parameters: list[str] | None, **named: Any) -> dict[str, Any]:
    """Collect what the flags say of the recipe."""
    said = {key: value for key, value in named.items() if value is not None}
    return said | dict(_parameter(text) for text in parameters or ())


def _of_adapter(
    rank: str | None, targets: list[str] | None, exact_svd: bool, keep_rest: bool | None, vllm: bool
) -> dict[str, Any]:
    """Collect what the flags say of an adapter."""
    return {
        "rank": None if rank is None else yaml.safe_load(rank),
        "targets": [name for text in targets for name in text.split(",")] if targets else None,
        "exact_svd": exact_svd or None,
        "keep_rest": keep_rest,
        "vllm": vllm or None,
    }


def _parameter(text: str) -> tuple[str, Any]:
    """Read `name=0.5` or `name=0.5,0.3`."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.UsageError(f"--parameter takes NAME=VALUE; found '{text}'.")
    try:
        return name, yaml.safe_load(f"[{value}]" if "," in value and "[" not in value and "{" not in value else value)
    except yaml.YAMLError:
        raise click.UsageError(f"--parameter {name}: '{value}' is no value.") from None


def _max_memory(said: list[str] | None) -> dict[int | str, int | str] | None:
    """Read `0=10GB` and `cpu=30GB`."""
    if said and (bad := [text for text in said if not all(text.partition("="))]):
        raise click.UsageError(f"--max-memory takes DEVICE=SIZE, as 0=10GB or cpu=30GB; found '{bad[0]}'.")
    return {device: size for device, _, size in (text.partition("=") for text in said)} if said else None


def _recipe(sources: list[str], method: str | None) -> Any:
    """A recipe's path, or the list of models that --method merges."""
    if method and not _is_recipe(sources):
        return sources
    if len(sources) > 1 or (Path(sources[0]).is_dir()):
        raise RecipeError(f"{', '.join(sources)}: to merge models without a recipe, say how with --method.")
    return sources[0]


def _is_recipe(sources: list[str]) -> bool:
    return len(sources) == 1 and sources[0].endswith((".yaml", ".yml", ".json"))


def _explain(method: Any) -> str:
    """Write all there is to know about a method."""
    from hf_merge.controls import in_words

    count = method.number_of_models
    lines = [f"{method.name}: {method.summary}", "", f"  {method.formula}".replace("\n", "\n  "), ""]
    lines += [f"Good for: {method.good_for}", ""] if method.good_for else []
    lines += [f"Merges {count} ({method.space}); base: {method.base}. Source: {method.paper}", "", "Parameters:"]
    for p in method.parameters.values():
        scope = ", for each model" if p.per_model else ""
        lines.append(f"  {p.name} ({p.words}{scope}; default {p.default}): {p.help}")
    lines += ["", f"In words, with the defaults: {in_words(method, {})}"] if method.in_words else []
    return "\n".join([*lines, *(["", f"Notes: {method.notes}"] if method.notes else [])])


def _collect_rarely() -> None:
    """Let Python look for cycles less often, and not once more as it ends: torch alone has 170,000 objects."""
    gc.set_threshold(_NEW_OBJECTS)
    atexit.register(gc.freeze)


def main() -> None:
    """Run the command line and turn errors into one line and an exit status."""
    if os.environ.get("HF_MERGE_VERBOSITY") == "info":
        logging.set_verbosity_info()
    _collect_rarely()
    launching.follow_parent()
    try:
        status = app.main(standalone_mode=False, windows_expand_args=False)
    except click.exceptions.Abort:
        if launching.speaks():
            out.error("Interrupted.")
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except MergeError as error:
        if launching.speaks():
            out.error(str(error))
        status = 1
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
