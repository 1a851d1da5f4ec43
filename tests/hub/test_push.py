"""Publishing: one commit that is whole or not there; nothing is lost, and nothing private is told."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import hf_merge
from hf_merge.card import with_checksums
from hf_merge.writer import CARRIED
from tests.hub.conftest import Account, error_line
from tests.hub.server import Fault
from tests.hub.store import Blob, Repo

pytestmark = pytest.mark.e2e

SHARDS = "20KB"

# Code that says how something is refused.
TOLD = """
import hf_merge
def told(call):
    try:
        call()
    except hf_merge.MergeError as error:
        return [type(error).__name__, str(error)]
"""


def shown(repo: Repo, revision: str = "main") -> dict[str, bytes]:
    """Return what a repository shows, without hidden files."""
    files = repo.commit(revision).files
    return {path: blob.content for path, blob in files.items() if not path.startswith(".")}


def pushed(account: Account, name: str) -> Repo:
    return account.hub.store.repos[f"{account.name}/{name}"]


def uploads(account: Account, since: int = 0) -> list[str]:
    """Return the digests of what was uploaded, in order."""
    return [each.path.removeprefix("/lfs/") for each in account.hub.log[since:] if each.method == "PUT"]


def written(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def tensors(content: bytes) -> bytes:
    """Return what follows the header of a safetensors file."""
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.fixture
def local(llamas, tmp_path) -> Path:
    """A merge in a folder."""
    return hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "local", method="linear", max_shard_size=SHARDS).path


def test_a_merge_into_the_hub_is_one_commit_that_loads_and_leaves_nothing_here(account: Account, llamas, tmp_path):
    org = account.name
    for name in "ab":
        account.put(name, llamas[name])
    words = ("--method", "linear", f"{org}/a", f"{org}/b", "--max-shard-size", SHARDS)
    (tmp_path / "work").mkdir()
    call = [sys.executable, "-m", "hf_merge.cli", "merge", *words, "--push-to-hub", f"{org}/m", "--json"]
    done = subprocess.run(
        call, capture_output=True, text=True, env=account.environment(account.write), cwd=tmp_path / "work"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    repo = pushed(account, "m")
    head = repo.commit("main")
    assert told["repo_id"] == f"{org}/m" and told["commit"] == head.sha and "path" not in told
    assert len(head.history()) == 2 and not list((tmp_path / "work").iterdir())
    assert account.cli("merge", *words, tmp_path / "local").returncode == 0
    theirs, ours = shown(repo), written(tmp_path / "local")
    assert theirs.keys() == ours.keys()
    assert {path for path in ours if ours[path] != theirs[path]} == {"README.md"}
    card = theirs["README.md"].decode()
    assert f"# {org}/m" in card and f'from_pretrained("{org}/m")' in card
    for path, blob in head.files.items():
        assert path.endswith(".safetensors") is (f"{blob.sha256}  {path}" in card), path
    got = account.python(
        """
        import hf_merge
        from huggingface_hub import HfApi, ModelCard
        from transformers import AutoModelForCausalLM, AutoTokenizer
        info = HfApi().model_info(f"{org}/m")
        ModelCard.load(f"{org}/m").validate()
        words = AutoTokenizer.from_pretrained(f"{org}/m")("w1 w2").input_ids
        merged = hf_merge.MergedModel(None, hf_merge.plan([f"{org}/a"], method="linear"), f"{org}/m", info.sha)
        layers = [m.config.num_hidden_layers for m in (AutoModelForCausalLM.from_pretrained(f"{org}/m"), merged.load())]
        result = {"tags": info.tags, "layers": layers, "words": words, "card": merged.card.data.base_model_relation}
        """
    )
    assert {f"base_model:{org}/a", f"base_model:{org}/b", "merge", "hf_merge"} <= set(got["tags"])
    assert got["layers"] == [3, 3] and got["words"] == [4, 5] and got["card"] == "merge"


def test_no_more_than_two_shards_lie_on_the_disk_and_the_bytes_are_those_of_a_local_merge(
    account: Account, llamas, local, tmp_path
):
    """Uploads are slow and workers are many: the writer waits."""
    account.hub.faults.append(Fault("hang", "^/lfs/[0-9a-f]+$", method="PUT", seconds=0.1))
    got = account.python(
        """
        import os, threading, time, torch, hf_merge
        from contextlib import suppress
        from hf_merge import execute
        from pathlib import Path
        os.chdir(work)
        seen, stop, folder = [], threading.Event(), Path(f".{org}--m.hf_merge")
        def watch():
            while not stop.is_set():
                with suppress(FileNotFoundError):
                    names = [path for path in folder.glob("*.safetensors*") if path.suffix != ".json"]
                    seen.append([len(names), sum(path.stat().st_size for path in names)])
                time.sleep(0.0005)
        watcher = threading.Thread(target=watch)
        watcher.start()
        torch.set_num_threads(workers)
        execute.WORTH_A_THREAD = 0
        hf_merge.merge(models, push_to_hub=f"{org}/m", method="linear", max_shard_size=shards)
        stop.set()
        watcher.join()
        result = [max(count for count, _ in seen), max(size for _, size in seen), len(seen)]
        """,
        token=account.write,
        models=[str(llamas["a"]), str(llamas["b"])],
        work=str(tmp_path),
        shards=SHARDS,
        workers=6,
    )
    here, there = written(local), shown(pushed(account, "m"))
    shards = [path for path in here if path.endswith(".safetensors")]
    assert len(shards) == 6 and all(here[path] == there[path] for path in shards)
    most, size, samples = got
    assert most == 2 and samples > 50 and size <= 2 * max(len(here[path]) for path in shards)


SLOW = """
import sys, time, hf_merge
from hf_merge.types import Merged, Models

@hf_merge.merge_method(paper="https://example.org", elementwise=True)
def slow(models: Models) -> Merged:
    "Take the mean, slowly."
    time.sleep(0.1)
    return (models[0] + models[1]) / 2

resume = "resume" in sys.argv
hf_merge.merge(sys.argv[1:3], push_to_hub=sys.argv[3], method="slow", max_shard_size="20KB", resume=resume)
"""


def start(account: Account, llamas, folder: Path, *words: str) -> subprocess.Popen:
    call = [sys.executable, "-c", SLOW, str(llamas["a"]), str(llamas["b"]), f"{account.name}/m", *words]
    return subprocess.Popen(call, env=account.environment(account.write), cwd=folder, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_merge_that_was_killed_shows_nothing_and_goes_on_without_what_it_uploaded(
    account: Account, llamas, tmp_path, how
):
    process, working = start(account, llamas, tmp_path), tmp_path / f".{account.name}--m.hf_merge"
    while not (working / CARRIED).is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(timeout=60) != 0
    kept = json.loads((working / CARRIED).read_text())["files"]
    assert kept and not shown(pushed(account, "m")) and not {*kept} & {path.name for path in working.iterdir()}
    before = len(account.hub.log)
    assert start(account, llamas, tmp_path, "resume").wait(timeout=120) == 0
    assert not {about["sha256"] for about in kept.values()} & {*uploads(account, before)}
    assert not list(tmp_path.glob(".*"))
    whole = hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "whole", method="linear", max_shard_size=SHARDS)
    here, there = written(Path(str(whole.path))), shown(pushed(account, "m"))
    assert here.keys() == there.keys()
    for path in here:
        if path.endswith(".safetensors"):  # the mean by another name: the headers' metadata differs
            assert tensors(here[path]) == tensors(there[path])


def test_what_the_hub_has_lost_meanwhile_is_merged_again(account: Account, llamas, tmp_path):
    process, working = start(account, llamas, tmp_path), tmp_path / f".{account.name}--m.hf_merge"
    while not (working / CARRIED).is_file():
        time.sleep(0.02)
    process.kill()
    process.wait()
    account.hub.store.large.clear()
    account.hub.store.repos = {
        id: repo for id, repo in account.hub.store.repos.items() if repo.namespace == account.name
    }
    code = TOLD + "import os, sys; os.chdir(work); sys.argv += [a, b, f'{org}/m', 'resume']\n"
    code += "result = told(lambda: exec(slow, globals()))"
    values = {"work": str(tmp_path), "a": str(llamas["a"]), "b": str(llamas["b"]), "slow": SLOW}
    kind, said = account.python(code, token=account.write, **values)
    assert kind == "PublishError" and said.startswith("The Hub has lost what an earlier run uploaded")
    assert not shown(pushed(account, "m"))
    assert account.python(code, token=account.write, **values) is None
    assert len(shown(pushed(account, "m"))) > 6 and not list(tmp_path.glob(".*"))


def test_a_push_that_fails_at_any_request_leaves_all_as_it_was_and_the_next_one_completes_it(llamas, account: Account):
    done = account.run("-m", "tests.hub.interrupted", llamas["a"], llamas["b"])
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"merge", "folder", "over_old"} and all(len(rows) > 30 for rows in found.values())
    for name, rows in found.items():
        bad = [
            row
            for row in rows
            if row["again"] or not row["whole_or_nothing"] or not row["complete"] or row["commits"] != 1
        ]
        assert not bad, (name, bad)
        assert sum(row["refused"] is not None for row in rows) > len(rows) // 2


def test_pull_requests_branches_and_replacing(account: Account, llamas, local):
    repo = account.put("m", llamas["b"])
    old, eval_result = repo.commit("main"), {".eval_results/a.yaml": Blob(b"a: 1")}
    repo.add("main", {**old.files, "pytorch_model.bin": Blob(b"stale", True), **eval_result}, "more", account.name)
    before = repo.commit("main")
    got = account.python(
        TOLD
        + """
push = lambda **more: hf_merge.push_to_hub(folder, f"{org}/m", **more)
result = [
    told(push),
    push(create_pr=True, commit_message="please").pr_revision,
    push(revision="next/one").oid,
    push(revision="next/one", commit_message="again").oid,
    told(lambda: push(revision="v1")),
    told(lambda: push(revision=commit)),
    told(lambda: push(private=True, exist_ok=True)),
    push(create_pr=True, token=stranger).pr_num,
    told(lambda: push(exist_ok=True, token=stranger)),
]
""",
        token=account.write,
        folder=str(local),
        stranger=account.stranger,
        commit=_with_tag(repo),
    )
    refused, pull, branch, more, on_tag, on_commit, public, by_stranger, no_right = got
    assert refused[0] == "OutputExistsError" and "'model.safetensors' and 6 more files" in refused[1]
    assert repo.commit("main") == before and pull == "refs/pr/1" and by_stranger == 2
    assert repo.commit(pull).title == "please" and repo.commit(pull).parent == before
    assert repo.commit("next/one").sha == branch == more and repo.commit("next/one").parent == before
    assert shown(repo, "next/one").keys() == shown(repo, pull).keys() == written(local).keys()
    assert "has no branch 'v1'" in on_tag[1] and "has no branch" in on_commit[1]
    assert "exists and is public, and was to be private" in public[1]
    assert no_right[1].startswith(f"The token that was sent may not write to '{account.name}/m'")
    done = account.cli("push", local, f"{account.name}/m", "--exist-ok", token=account.write)
    assert done.returncode == 0, done.stderr
    head = repo.commit("main")
    assert head.parent == before and shown(repo).keys() == written(local).keys()
    assert {path for path in head.files if path.startswith(".")} == {".gitattributes", ".eval_results/a.yaml"}


def _with_tag(repo: Repo) -> str:
    repo.refs["refs/tags/v1"] = repo.commit("main")
    return repo.commit("main").sha


def test_a_private_repository_is_made_and_an_empty_one_is_filled(account: Account, local):
    account.hub.store.repos[f"{account.name}/empty"] = empty = Repo.new(f"{account.name}/empty", account.name)
    empty.add("main", {**empty.commit("main").files, "README.md": Blob(b"soon")}, "a word", account.name)
    for name, flags in {"secret": ("--private",), "empty": ()}.items():
        done = account.cli("push", local, f"{account.name}/{name}", *flags, token=account.write)
        assert done.returncode == 0, done.stderr
    assert pushed(account, "secret").private and not empty.private
    assert shown(empty).keys() == shown(pushed(account, "secret")).keys() == written(local).keys()
    again = account.cli("push", local, f"{account.name}/empty", token=account.write)
    assert again.returncode == 0 and len(empty.commit("main").history()) == 3, again.stderr


def test_refusals_say_what_to_do_and_come_before_anything_is_merged(account: Account, llamas, local, tmp_path):
    org = account.name
    account.put("full", llamas["a"])
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "README.md").write_text("---\n- a list\n---\n")
    (bad / "config.json").write_text("{}")
    (tmp_path / "template.md").write_text("---\nlicense: [\n---\n{{ name }}")
    expected = {
        "push('m', token=False)": ("PublishError", "To push to the Hub takes a token that may write, and there"),
        "push('m')": ("PublishError", "To push to the Hub takes a token that may write, and there is none: make one"),
        "push('m', token='hf_wrong')": ("PublishError", "The Hub does not accept the token that was sent"),
        "push('m', token='hf_a b')": ("PublishError", "The token has spaces or other characters"),
        "push('m', token=read)": ("PublishError", f"The token of '{org}' may only read: make one that may write at"),
        "push('a--b', token=write)": ("PublishError", f"'{org}/a--b' cannot be the id of a repository"),
        "push('a/b', token=write)": ("PublishError", f"'{org}/a/b' cannot be the id of a repository"),
        "push('m', token=stranger)": ("PublishError", f"The token that was sent may not write to '{org}/m': choose"),
        "push('full', token=write)": ("OutputExistsError", f"'{org}/full' exists and is not empty ('model.safeten"),
        "push('bad', token=write, folder=bad)": ("PublishError", "The Hub does not take the metadata of the card"),
        "push('m', token=write, folder=empty)": ("PublishError", "There is nothing to publish at "),
        "push('m', token=write, folder=file)": ("PublishError", f"'{bad}/config.json' is a file: what is published"),
        "merge(push_to_hub=f'{org}/full', token=write)": ("OutputExistsError", f"'{org}/full' exists and is not empty"),
        "merge(push_to_hub=f'{org}/m', token=read)": ("PublishError", f"The token of '{org}' may only read"),
        "merge(push_to_hub=f'{org}/m', token=stranger)": ("PublishError", "The token that was sent may not write"),
        "merge(push_to_hub=f'{org}/m', token=write, keep_local=True)": ("OutputError", "Where to?"),
        "merge(output='m', keep_local=False)": ("OutputError", "keep_local= says what stays here"),
        "merge(output='m.safetensors', push_to_hub=f'{org}/m', token=write)": ("OutputError", "'m.safetensors' is a"),
        "merge(push_to_hub=f'{org}/m', token=write, card_template=template)": ("", "The "),
        "merge(output='m', private=True)": ("OutputError", "private= says how to push the model: name push_to_hub="),
        "merge()": ("OutputError", "Where to? Name an output folder"),
    }  # fmt: skip
    got = account.python(
        TOLD
        + """
import os
os.chdir(work)
def push(name, folder=local, **more):
    hf_merge.push_to_hub(folder, f"{org}/{name}", **more)
def merge(**more):
    hf_merge.merge([a, b], method="linear", **more)
result = {code: told(lambda: eval(code, globals())) for code in codes}
result["left"] = sorted(os.listdir("."))
""",
        codes=list(expected),
        local=str(local),
        bad=str(bad),
        empty=str(tmp_path / "nothing"),
        file=str(bad / "config.json"),
        template=str(tmp_path / "template.md"),
        work=str(tmp_path),
        a=str(llamas["a"]),
        b=str(llamas["b"]),
        write=account.write,
        read=account.read,
        stranger=account.stranger,
    )
    assert got.pop("left") == ["bad", "local", "template.md"]
    for code, (kind, begun) in expected.items():
        found, said = got[code]
        assert kind in ("", found) and said.startswith(begun) and said.endswith("."), (code, found, said)
        assert not any(token in said for token in (account.write, account.read, account.stranger)) and "\n" not in said
    assert f"{org}/m" not in account.hub.store.repos and f"{org}/bad" not in account.hub.store.repos


def test_offline_and_unreachable_hubs_are_refused_at_once(account: Account, local):
    offline = account.cli("push", local, f"{account.name}/m", token=account.write, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "HF_HUB_OFFLINE forbids to push" in error_line(offline.stderr)
    far = account.cli("push", local, f"{account.name}/m", token=account.write, HF_ENDPOINT="http://127.0.0.1:9")
    assert "The Hub at http://127.0.0.1:9 cannot be reached for" in error_line(far.stderr)


def test_a_commit_of_somebody_else_is_not_put_over(account: Account, llamas, local):
    account.put("m", llamas["a"])
    got = account.python(
        TOLD
        + """
from huggingface_hub import CommitOperationAdd, HfApi
from hf_merge import hub
from pathlib import Path
destination = hub.ask(f"{org}/m", exist_ok=True).prepare()
note = [CommitOperationAdd("note.txt", b"mine")]
HfApi().create_commit(f"{org}/m", note, commit_message="in between")
result = told(lambda: hub.push_folder(Path(folder), destination))
""",
        token=account.write,
        folder=str(local),
    )
    assert got[0] == "PublishError" and got[1].startswith(f"Somebody else changed '{account.name}/m' meanwhile")
    assert pushed(account, "m").commit("main").title == "in between"
    assert pushed(account, "m").commit("main").files["note.txt"].content == b"mine"


def test_a_merge_that_stays_here_too_is_not_lost_with_the_push(account: Account, llamas, tmp_path):
    """The folder keeps local paths, so that it can be merged again; what others see does not."""
    org, words = account.name, ("--method", "linear", llamas["a"], llamas["b"], tmp_path / "m", "--keep-local")
    account.hub.faults.append(Fault("error", "/commit/main", status=503))
    done = account.cli("merge", *words, "--push-to-hub", f"{org}/m", token=account.write)
    said = error_line(done.stderr)
    assert done.returncode == 1 and said.endswith(f"push it with `hf-merge push {tmp_path / 'm'} {org}/m`.")
    assert (tmp_path / "m" / "config.json").is_file() and not shown(pushed(account, "m"))
    account.hub.faults.clear()
    before = len(account.hub.log)
    done = account.cli("push", tmp_path / "m", f"{org}/m", token=account.write)
    assert done.returncode == 0 and not uploads(account, before), done.stderr
    recipe = shown(pushed(account, "m"))["hf_merge_recipe.yaml"]
    assert str(llamas["a"]) in (tmp_path / "m" / "hf_merge_recipe.yaml").read_text()
    assert yaml.safe_load(recipe)["models"] == [{"model": "a"}, {"model": "b"}]


def test_no_token_and_no_local_path_gets_out(account: Account, llamas, tmp_path):
    org = account.name
    account.put("private", llamas["a"], private=True)
    words = ("--method", "linear", f"{org}/private", llamas["b"])
    (tmp_path / "here").mkdir()
    merged = account.cli(
        "merge", *words, tmp_path / "here" / "m", "--keep-local", "--push-to-hub", f"{org}/m", "--token",
        account.write, HF_DEBUG="1", HF_MERGE_VERBOSITY="info",
    )  # fmt: skip
    assert merged.returncode == 0, merged.stderr
    refused = account.cli("push", tmp_path / "here" / "m", f"{org}/private", "--token", account.stranger)
    assert refused.returncode == 1
    folders = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    store = [blob.content for repo in account.hub.store.repos.values() for blob in repo.commit("main").files.values()]
    requests = [f"{seen.path}?{seen.query} {seen.agent}".encode() for seen in account.hub.log]
    texts = [*(path.read_bytes() for path in folders), *store, *requests]
    texts += [text.encode() for done in (merged, refused) for text in (done.stdout, done.stderr)]
    for secret in (account.write, account.stranger):
        assert not any(secret.encode() in text for text in texts)
    for content in shown(pushed(account, "m")).values():
        assert str(tmp_path).encode() not in content and str(llamas["b"].parent).encode() not in content


def test_files_that_a_parent_has_on_the_hub_are_copied_there(account: Account, llamas, tmp_path):
    """If that is refused they are sent."""
    org, repo = account.name, account.put("base", llamas["base"])
    files = dict(repo.commit("main").files)
    tokenizer = Blob(files["tokenizer.json"].content, large=True)
    repo.add("main", {**files, "tokenizer.json": tokenizer}, "a large tokenizer", org)
    recipe = {"merge_method": "ties", "base_model": f"{org}/base", "models": [str(llamas["a"])]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ("merge", tmp_path / "recipe.yaml", tmp_path / "m", "--no-keep-local", "--push-to-hub")
    account.hub.faults.append(Fault("error", "lfs-files/duplicate", first=2, status=403))
    for name in ("copied", "sent"):
        done = account.cli(*words, f"{org}/{name}", token=account.write)
        assert done.returncode == 0, done.stderr
    assert [seen.status for seen in account.seen("POST", "lfs-files/duplicate")] == [200, 403]
    copied, sent = (pushed(account, name).commit("main").files["tokenizer.json"] for name in ("copied", "sent"))
    assert copied == tokenizer and sent.content == tokenizer.content and not sent.large
    assert tokenizer.sha256 not in uploads(account)
    assert len(pushed(account, "copied").commit("main").history()) == 2


def test_any_folder_is_published_but_for_what_is_hidden(account: Account, llamas, tmp_path):
    """A recipe alone, without weights and without a card; its local paths do not go out."""
    folder = tmp_path / "recipe"
    (folder / ".eval_results").mkdir(parents=True)
    (folder / ".eval_results" / "a.yaml").write_text("a: 1")
    (folder / ".env").write_text("SECRET=1")
    recipe = {"merge_method": "linear", "models": [str(llamas["a"]), "org/b"], "base_model": str(llamas["base"])}
    (folder / "hf_merge_recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = account.cli("push", folder, f"{account.name}/r", token=account.write)
    assert done.returncode == 0, done.stderr
    files = pushed(account, "r").commit("main").files
    assert set(files) == {".gitattributes", ".eval_results/a.yaml", "hf_merge_recipe.yaml"}
    public = yaml.safe_load(files["hf_merge_recipe.yaml"].content)
    assert public["models"] == [{"model": "a"}, {"model": "org/b"}] and public["base_model"] == "base"


def test_checksums_have_one_place_in_any_card():
    ours = "---\ntags: []\n---\n\n# m\n\n```yaml\n## Licence\n```\n\n## Licence\n\n- mit\n\n## Limits\n\n- many\n"
    once = with_checksums(ours, {"b.safetensors": "bb", "a.safetensors": "aa"})
    assert once.index("aa  a.safetensors\nbb  b.safetensors") < once.index("\n\n## Licence\n\n- mit")
    assert with_checksums(with_checksums(once, {"c": "cc"}), {"b.safetensors": "bb", "a.safetensors": "aa"}) == once
    assert with_checksums("my card", {"c": "cc"}).startswith("my card\n\n## Checksums\n")
    assert with_checksums("", {"c": "cc"}).startswith("## Checksums")
    edited = once.replace("## Licence\n\n- mit\n\n## Limits\n\n- many\n", "## Mine\n\ntext\n")
    assert with_checksums(edited, {"c": "cc"}).endswith("```\n") and "## Mine\n\ntext" in with_checksums(
        edited, {"c": "cc"}
    )


def test_the_working_folder_is_a_sibling_of_an_output_that_does_not_stay(account: Account, llamas, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": [str(llamas["a"]), str(llamas["b"])]}))
    done = account.cli(
        "merge", recipe, tmp_path / "deep" / "m", "--no-keep-local", "--push-to-hub", "m", token=account.write
    )
    assert done.returncode == 0 and not list((tmp_path / "deep").iterdir()), done.stderr
    assert shown(pushed(account, "m"))


def test_an_adapter_is_pushed_without_the_path_of_its_base_and_loads_from_there(account: Account, llamas, tmp_path):
    org = account.name
    account.put("base", llamas["base"])
    code = """
        import os, warnings, hf_merge, torch
        warnings.simplefilter("ignore")
        os.chdir(folder)
        far = hf_merge.extract_adapter(a, f"{org}/base", rank=4, push_to_hub=f"{org}/far")
        near = hf_merge.extract_adapter(a, base, "near", rank=4, push_to_hub=f"{org}/near")
        ids = torch.arange(8)[None]
        models = [one.load().eval()(ids).logits for one in (far, near)]
        result = [far.path, far.base, far.base_revision, os.listdir("."), torch.equal(*models)]
        """
    words = {"a": llamas["a"], "base": llamas["base"], "folder": tmp_path}
    path, base, revision, listed, same = account.python(code, token=account.write, **words)
    assert path is None and base == f"{org}/base" and sorted(listed) == ["home", "near"] and same
    far, near = (json.loads(shown(pushed(account, name))["adapter_config.json"]) for name in ("far", "near"))
    assert far["base_model_name_or_path"] == f"{org}/base" and far["revision"] == revision
    assert near["base_model_name_or_path"] == "base"
    assert all(str(llamas["base"].parent).encode() not in text for text in shown(pushed(account, "near")).values())
    assert f"base_model:\n- {org}/base\n".encode() in shown(pushed(account, "far"))["README.md"]
