"""The real clients of Hugging Face against the Hub of these tests: what works there is what they need of a Hub."""

import hashlib

import pytest

from tests.hub.conftest import Account, both_ways
from tests.hub.server import Fault

pytestmark = pytest.mark.e2e


@both_ways
def test_a_folder_goes_up_and_comes_back(account: Account, llamas, xet):
    content = (llamas["a"] / "model.safetensors").read_bytes()
    is_known = hashlib.sha256(content).hexdigest() in account.hub.store.large  # another test may have pushed it
    got = account.python(
        """
        from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
        api = HfApi()
        who = api.whoami()
        api.create_repo(f"{org}/m")
        again = api.create_repo(f"{org}/m", exist_ok=True)
        first = api.upload_folder(repo_id=f"{org}/m", folder_path=folder)
        unchanged = api.upload_folder(repo_id=f"{org}/m", folder_path=folder)
        card = ModelCard("---\\nlicense: mit\\nbase_model: org/base\\ntags: [merge]\\n---\\n# Mine\\n")
        card.validate()
        card.push_to_hub(f"{org}/m")
        info = api.model_info(f"{org}/m", files_metadata=True)
        old = api.model_info(f"{org}/m", revision=first.oid)
        weights = hf_hub_download(f"{org}/m", "model.safetensors")
        snapshot = snapshot_download(f"{org}/m")
        lfs = {each.rfilename: each.lfs and each.lfs.size for each in info.siblings}
        result = {
            "who": who["name"], "url": again.repo_id, "same": first.oid == unchanged.oid == old.sha,
            "card": info.card_data.base_model, "tags": info.tags, "weights": weights, "snapshot": snapshot,
            "sha": info.sha, "lfs": lfs, "type": info.config["model_type"],
            "titles": [each.title for each in api.list_repo_commits(f"{org}/m")],
            "files": sorted(api.list_repo_files(f"{org}/m")),
            "paths": [each.path for each in api.get_paths_info(f"{org}/m", ["config.json", "nothing"])],
        }
        """,
        token=account.write,
        folder=llamas["a"],
    )
    assert got["who"] == account.name and got["url"] == f"{account.name}/m" and got["same"]
    assert got["card"] == "org/base" and {"merge", "base_model:org/base"} <= set(got["tags"]) and got["type"] == "llama"
    with open(got["weights"], "rb") as file:
        assert file.read() == content
    assert got["snapshot"].endswith(got["sha"])
    assert got["lfs"]["model.safetensors"] == len(content) and got["lfs"]["config.json"] is None
    assert len(got["titles"]) == 3 and got["titles"][-1].startswith("initial commit")
    assert got["files"] == sorted([".gitattributes", *(path.name for path in llamas["a"].iterdir())])
    assert got["paths"] == ["config.json"]
    assert account.hub.store.large[hashlib.sha256(content).hexdigest()] == content
    large = {
        kind: len(account.seen(*kind)) for kind in (("PUT", "/cdn/"), ("GET", "/cdn/"), ("GET", "/xet-read-token/"))
    }
    assert list(large.values()) == ([0, 0, 1] if xet else [0 if is_known else 1, 1, 0])
    assert len(account.seen("GET", "/resolve/")) == len(got["files"]) - xet


def test_headers_and_one_tensor_are_read_by_ranges(account: Account, llamas):
    account.put("m", llamas["a"])
    got = account.python(
        """
        from huggingface_hub import HfFileSystem, get_safetensors_metadata
        from huggingface_hub.utils import get_session
        import os
        found = get_safetensors_metadata(f"{org}/m")
        file = found.files_metadata["model.safetensors"]
        tensor = file.tensors["model.norm.weight"]
        url = f"{os.environ['HF_ENDPOINT']}/{org}/m/resolve/main/model.safetensors"
        size = os.path.getsize(f"{folder}/model.safetensors")
        with HfFileSystem().open(f"{org}/m/model.safetensors", "rb", block_size=1024) as opened:
            header = int.from_bytes(opened.read(8), "little")
            opened.seek(8 + header + tensor.data_offsets[0])
            read = opened.read(tensor.data_offsets[1] - tensor.data_offsets[0])
        with open(f"{folder}/model.safetensors", "rb") as opened:
            opened.seek(8 + header + tensor.data_offsets[0])
            expected = opened.read(len(read))
        tail = get_session().get(url, headers={"range": "bytes=-4"})
        beyond = get_session().get(url, headers={"range": f"bytes={size}-"})
        result = {
            "tensors": len(file.tensors), "same": read == expected and len(read) == 128,
            "tail": [tail.status_code, tail.headers["content-range"], len(tail.content)],
            "beyond": [beyond.status_code, beyond.headers["content-range"]],
        }
        """,
        folder=llamas["a"],
    )
    size = (llamas["a"] / "model.safetensors").stat().st_size
    assert got["tensors"] == 30 and got["same"]
    assert got["tail"] == [206, f"bytes {size - 4}-{size - 1}/{size}", 4]
    assert got["beyond"] == [416, f"bytes */{size}"]
    ranged = [each for each in account.seen("GET", "/cdn/") if each.range]
    assert {each.status for each in ranged} == {206, 416} and all(each.sent <= 100_001 for each in ranged)


@both_ways
def test_models_and_adapters_are_pushed_loaded_and_reloaded_offline(account: Account, llamas, xet):
    pushed = """
        import torch
        from huggingface_hub import HfApi
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer
        ours = AutoModelForCausalLM.from_pretrained(folder)
        ours.push_to_hub(f"{org}/m")
        AutoTokenizer.from_pretrained(folder).push_to_hub(f"{org}/m")
        base = AutoModelForCausalLM.from_pretrained(f"{org}/m")
        words = AutoTokenizer.from_pretrained(f"{org}/m")("w1 w2").input_ids
        same = all(torch.equal(a, b) for a, b in zip(ours.parameters(), base.parameters(), strict=True))
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
        adapted.push_to_hub(f"{org}/adapter")
        ids = torch.tensor([[1, 5, 6]])
        with torch.no_grad():
            ours_adapted = PeftModel.from_pretrained(ours, f"{org}/adapter").eval()
            equal = torch.equal(adapted(ids).logits, ours_adapted(ids).logits)
        names = sorted(HfApi().list_repo_files(f"{org}/adapter"))
        result = {"same": same, "words": words, "equal": equal, "names": names}
    """
    got = account.python(pushed, token=account.write, folder=llamas["a"])
    assert got["same"] and got["equal"] and got["words"] == [4, 5]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(got["names"])
    if xet:
        return  # what is in the cache does not tell how it came
    before = len(account.hub.log)
    reloaded = """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled
        from transformers import AutoModelForCausalLM
        layers = AutoModelForCausalLM.from_pretrained(f"{org}/m").config.num_hidden_layers
        try:
            HfApi().model_info(f"{org}/m")
        except OfflineModeIsEnabled:
            result = layers
    """
    assert account.python(reloaded, environment={"HF_HUB_OFFLINE": "1"}) == 3
    assert len(account.hub.log) == before


@both_ways
def test_branches_tags_and_pull_requests(account: Account, llamas):
    account.put("m", llamas["a"])
    got = account.python(
        """
        from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
        api, repo = HfApi(), f"{org}/m"
        main = api.model_info(repo).sha
        api.create_branch(repo, branch="next/one")
        api.create_branch(repo, branch="next/one", exist_ok=True)
        api.create_tag(repo, tag="v1")
        add = lambda: CommitOperationAdd("note.txt", b"hello")
        on_branch = api.create_commit(repo, [add()], commit_message="note", revision="next/one")
        pull = api.create_commit(repo, [add()], commit_message="note", create_pr=True, token=stranger)
        more = CommitOperationAdd("more.txt", b"more")
        api.create_commit(repo, [more], commit_message="more", revision=pull.pr_revision)
        empty = api.create_pull_request(repo, title="an empty one")
        whole = api.upload_folder(repo_id=repo, folder_path=folder, create_pr=True, token=stranger)
        refs = api.list_repo_refs(repo, include_pull_requests=True)
        read = [open(hf_hub_download(repo, "note.txt", revision=r)).read() for r in ("next/one", pull.pr_revision)]
        result = {
            "main": api.model_info(repo).sha == main, "pr": pull.pr_revision, "read": read, "empty": empty.num,
            "branches": sorted(each.name for each in refs.branches), "tags": [each.name for each in refs.tags],
            "pulls": [each.ref for each in refs.pull_requests],
            "whole": [whole.pr_revision, hf_hub_download(repo, "model.safetensors", revision=whole.pr_revision)],
            "branch": api.model_info(repo, revision="next/one").sha == on_branch.oid,
            "in_pull": len(api.list_repo_files(repo, revision=pull.pr_revision))
            - len(api.list_repo_files(repo, revision="v1")),
            "open": [each.num for each in api.get_repo_discussions(repo) if each.is_pull_request],
        }
        """,
        token=account.write,
        stranger=account.stranger,
        folder=llamas["b"],
    )
    assert got["main"] and got["branch"] and got["read"] == ["hello", "hello"]
    assert got["branches"] == ["main", "next/one"] and got["tags"] == ["v1"]
    assert got["pr"] == "refs/pr/1" and got["pulls"] == [f"refs/pr/{n}" for n in (1, 2, 3)] and got["empty"] == 2
    assert got["in_pull"] == 2 and got["open"] == [1, 2, 3]
    revision, weights = got["whole"]
    with open(weights, "rb") as file:
        assert revision == "refs/pr/3" and file.read() == (llamas["b"] / "model.safetensors").read_bytes()


REFUSALS = {
    "missing": ("info('nothing')", "RepositoryNotFoundError", 401),
    "private": ("info('private')", "RepositoryNotFoundError", 401),
    "private, stranger": ("info('private', token=stranger)", "RepositoryNotFoundError", 404),
    "wrong token": ("info('open', token='hf_wrong')", "HfHubHTTPError", 401),
    "gated": ("file('gated')", "GatedRepoError", 401),
    "gated, stranger": ("file('gated', token=stranger)", "GatedRepoError", 403),
    "revision": ("info('open', revision='nowhere')", "RevisionNotFoundError", 404),
    "file": ("file('open', name='nothing.txt')", "RemoteEntryNotFoundError", 404),
    "anonymous commit": ("commit()", "HfHubHTTPError", 401),
    "commit of a reader": ("commit(token=read)", "HfHubHTTPError", 403),
    "commit of a stranger": ("commit(token=stranger)", "HfHubHTTPError", 403),
    "stale parent": ("commit(token=write, parent_commit=stale)", "HfHubHTTPError", 412),
    "there already": ("api.create_repo(f'{org}/open', token=write)", "HfHubHTTPError", 409),
    "no safetensors": ("api.get_safetensors_metadata(f'{org}/empty')", "NotASafetensorsRepoError", None),
}


def test_refusals_and_rights(account: Account, llamas):
    """Every refusal is the exception that the client raises for the real Hub's answer."""
    stale = account.put("open", llamas["a"]).commit("main").history()[-1].sha
    account.put("private", llamas["a"], private=True)
    account.put("gated", llamas["a"], gated=True, granted={f"{account.name}-friend"})
    account.python("from huggingface_hub import create_repo; result = create_repo(f'{org}/empty')", token=account.write)
    got = account.python(
        """
        from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
        api = HfApi()
        info = lambda name, **more: api.model_info(f"{org}/{name}", **more)
        file = lambda repo, name="config.json", **more: hf_hub_download(f"{org}/{repo}", name, **more)
        add = lambda: CommitOperationAdd("note.txt", b"hello")
        commit = lambda **more: api.create_commit(f"{org}/open", [add()], commit_message="note", **more)
        def refused(code):
            try:
                eval(code)
            except Exception as error:
                response = getattr(error, "response", None)
                return [type(error).__name__, None if response is None else response.status_code]
        result = {
            "refused": {name: refused(code) for name, (code, *_) in refusals.items()},
            "granted": bool(file("gated", token=read)) and info("private", token=read).private,
            "shown": info("gated").gated,
        }
        api.delete_repo(f"{org}/open", token=write)
        result["deleted"] = refused("info('open')")
        """,
        refusals=REFUSALS,
        stale=stale,
        write=account.write,
        read=account.read,
        stranger=account.stranger,
    )
    assert {name: tuple(found) for name, found in got["refused"].items()} == {
        name: (error, status) for name, (_, error, status) in REFUSALS.items()
    }
    assert got["granted"] and got["shown"] == "auto" and got["deleted"] == ["RepositoryNotFoundError", 401]


def test_faults_strike_the_requests_they_name(account: Account, llamas):
    """The client fetches again what is cut; a silent loss is found; an error is what it is."""
    account.put("m", llamas["a"])
    weights, config = f"cdn/{account.name}/m/.*model.safetensors", f"{account.name}/m/resolve/.*/config.json"
    account.hub.faults += [
        Fault("cut", weights, method="GET", last=1, after=1000),
        Fault("short", config, method="GET", last=1, after=10),
        Fault("error", f"{account.name}/m$", last=1, status=503),
        Fault("hang", f"{account.name}/m/refs", last=1, seconds=0.2),
    ]
    got = account.python(
        """
        import time
        from huggingface_hub import HfApi, hf_hub_download
        def tried(call):
            try:
                return call()
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        api = HfApi()
        start = time.perf_counter()
        api.list_repo_refs(f"{org}/m")
        waited = time.perf_counter() - start
        result = {
            "weights": hf_hub_download(f"{org}/m", "model.safetensors"), "waited": waited,
            "config": [tried(lambda: hf_hub_download(f"{org}/m", "config.json")) for _ in range(2)],
            "info": [tried(lambda: api.model_info(f"{org}/m").id) for _ in range(2)],
        }
        """
    )
    content = (llamas["a"] / "model.safetensors").read_bytes()
    with open(got["weights"], "rb") as file:
        assert file.read() == content
    assert [each.sent for each in account.seen("GET", "/cdn/")] == [1000, len(content)]
    assert "Consistency check failed" in got["config"][0] and got["config"][1].endswith("config.json")
    assert "503" in got["info"][0] and got["info"][1] == f"{account.name}/m" and got["waited"] >= 0.2


def test_large_files_come_from_another_host_whose_links_expire(account: Account, llamas):
    """The address tells all that a client must know, opens without a token, and not for ever."""
    account.put("m", llamas["a"], private=True)
    content = (llamas["a"] / "model.safetensors").read_bytes()
    asked = """
        import os
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import get_session
        url = hf_hub_url(f"{org}/m", "model.safetensors")
        found = get_hf_file_metadata(url)
        result = {
            "told": [found.commit_hash, found.etag, found.size, found.location],
            "got": len(get_session().get(found.location, headers={"range": "bytes=8-"}).content),
            "forged": get_session().get(found.location.replace("Expires=", "Expires=1")).status_code,
            "mixed": get_session().get(found.location, headers={"authorization": "Bearer x"}).status_code,
        }
    """
    got = account.python(asked, token=account.read)
    commit, digest = (
        account.hub.store.repos[f"{account.name}/m"].commit("main").sha,
        hashlib.sha256(content).hexdigest(),
    )
    *told, link = got["told"]
    assert told == [commit, digest, len(content)] and link.startswith(
        f"{account.hub.cdn}/cdn/{account.name}/m/{digest}/"
    )
    assert got["got"] == len(content) - 8 and (got["forged"], got["mixed"]) == (403, 400)
    assert [each.authorized for each in account.seen("GET", "/cdn/")] == [False, False, True]
    account.hub.log[:] = [each for each in account.hub.log if each.status != 400]  # ours, not the client's
    account.hub.expire_links()
    account.hub.switches.xet = False  # now the client itself must take its token off
    again = """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import get_session
        result = {"old": get_session().get(link).status_code, "new": hf_hub_download(f"{org}/m", "model.safetensors")}
    """
    got = account.python(again, token=account.read, link=link)
    with open(got["new"], "rb") as file:
        assert got["old"] == 403 and file.read() == content
    assert [each.authorized for each in account.seen("HEAD", "model.safetensors")] == [True, True]


def test_lists_come_in_pages(account: Account, tmp_path):
    """The client reads on where the Hub says that there is more."""
    for name in ("a/1", "a/2", "b/1", "c"):
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_text(name)
        account.put("m", tmp_path / "m")
    account.hub.switches.page_size = 2
    got = account.python("""
        from huggingface_hub import HfApi, snapshot_download
        import os
        api, repo = HfApi(), f"{org}/m"
        result = {
            "files": api.list_repo_files(repo), "commits": len(api.list_repo_commits(repo)),
            "tree": [each.path for each in api.list_repo_tree(repo)],
            "below": [each.path for each in api.list_repo_tree(repo, path_in_repo="a")],
            "snapshot": sum(len(files) for _, _, files in os.walk(snapshot_download(repo))),
        }
    """)
    assert sorted(got["files"]) == [".gitattributes", "a/1", "a/2", "b/1", "c"] and got["snapshot"] == 5
    assert got["commits"] == 5 and got["tree"] == ["a", "b", ".gitattributes", "c"] and got["below"] == ["a/1", "a/2"]
    assert [each.query for each in account.seen("GET", "/commits/")] == ["", "cursor=2", "cursor=4"]


@both_ways
def test_copies_and_deletions_in_commits(account: Account, llamas, xet):
    """Large files are copied by name alone, from other repositories too; what is not there is refused."""
    account.put("from", llamas["a"], private=True)
    account.put("stranger", llamas["b"], private=True)
    account.hub.store.repos[f"{account.name}-stranger/m"] = account.hub.store.repos.pop(f"{account.name}/stranger")
    account.hub.store.repos[f"{account.name}-stranger/m"].id = f"{account.name}-stranger/m"
    got = account.python(
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
        from huggingface_hub import hf_hub_download
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
        api, to = HfApi(), f"{org}/to"
        api.create_repo(to)
        def copy(name, new, repo=f"{org}/from"):
            return CommitOperationCopy(name, new, src_repo_id=repo, src_repo_type="model")
        def commit(*operations, **more):
            try:
                return api.create_commit(to, operations, commit_message="m", **more).oid
            except Exception as error:
                response = getattr(error, "response", None)
                return [type(error).__name__, None if response is None else response.status_code]
        other = CommitOperationCopy("a/model.safetensors", "b/model.safetensors")
        oids = [
            commit(copy("model.safetensors", "a/model.safetensors"), copy("config.json", "a/config.json")),
            commit(other, CommitOperationAdd("new.bin", b"new"), CommitOperationAdd("note.txt", b"note")),
            commit(CommitOperationDelete("a/"), CommitOperationDelete("note.txt")),
        ]
        gone = CommitOperationAdd("gone.bin", b"gone")  # the client takes it for one that it has sent
        gone._is_uploaded, gone._upload_mode, gone._should_ignore, gone._remote_oid = True, "lfs", False, None
        refused = {
            "hidden": commit(copy("model.safetensors", "c", repo=f"{org}-stranger/m")),
            "missing": commit(copy("nothing.bin", "c")),
            "gone": commit(gone),
            "deleted": commit(CommitOperationDelete("note.txt")),
        }
        known = [UploadInfo.from_bytes(each) for each in (open(weights, "rb").read(), b"new", b"gone")]
        actions, _, _ = post_lfs_batch_info(known, None, "model", to)
        result = {
            "oids": len(set(oids)), "refused": refused, "files": api.list_repo_files(to),
            "there": ["actions" not in each for each in actions],
            "copied": hf_hub_download(to, "b/model.safetensors"), "new": hf_hub_download(to, "new.bin"),
            "commits": len(api.list_repo_commits(to)),
        }
        """,
        token=account.write,
        weights=str(llamas["a"] / "model.safetensors"),
    )
    assert got["refused"] == {
        "hidden": ["RepositoryNotFoundError", 404],
        "missing": ["EntryNotFoundError", None],
        "gone": ["BadRequestError", 400],
        "deleted": ["RemoteEntryNotFoundError", 404],
    }
    assert got["oids"] == 3 and got["commits"] == 4 and got["there"] == [True, True, False]
    assert sorted(got["files"]) == [".gitattributes", "b/model.safetensors", "new.bin"]
    with open(got["copied"], "rb") as copied, open(got["new"], "rb") as new:
        assert copied.read() == (llamas["a"] / "model.safetensors").read_bytes() and new.read() == b"new"
    assert len(account.seen("PUT")) == (0 if xet else 1)
    lines = next(each for each in account.seen("POST", "/to/commit/")).body
    assert [line["key"] for line in lines] == ["header", "lfsFile", "file"] and "size" not in lines[1]["value"]
    assert account.seen("POST", "/to/commit/")[0].authorized


def test_xet_fails_where_its_storage_or_its_tokens_do(account: Account, llamas):
    """What Xet transfers is no request: it fails by its tokens, or by a storage that has lost what it had."""
    for name in ("lost", "denied"):
        account.put(name, llamas["a"])
    account.hub.switches.xet_keeps = False
    account.hub.faults.append(Fault("error", f"{account.name}/denied/xet-read-token", last=1, status=403))
    asked = """
        from huggingface_hub import hf_hub_download
        result = {}
        for name in ("lost", "denied"):
            try:
                hf_hub_download(f"{org}/{name}", "model.safetensors")
            except Exception as error:
                result[name] = [type(error).__name__, str(error)]
    """
    got = account.python(asked, xet=True)
    assert got["lost"][0] == "RuntimeError" and "File size mismatch" in got["lost"][1]
    assert got["denied"][0] == "HfHubHTTPError" and "403" in got["denied"][1]


@both_ways
def test_a_push_that_failed_anywhere_is_repeated_and_ends_in_one_commit(account: Account, tmp_path, xet):
    """What was carried out is not undone, a repeat meets it, and a client with Xet repeats the commit by itself."""
    org, requests = account.name, ["ask", "token", "end"] if xet else ["ask", "batch", "put", "verify", "end"]
    account.hub.faults += [
        Fault("twice", f"{org}/twice/commit/", last=1),
        Fault("twice", f"{org}/stale/commit/", last=1, status=503),
        Fault("cut", f"{org}/cut/commit/", last=1, after=10),
        *(Fault("forbidden", rf"{org}/{name}\b", first=n, last=n) for n, name in enumerate(requests, 1)),
    ]
    got = account.python(
        """
        from pathlib import Path
        from huggingface_hub import HfApi
        api, result = HfApi(), {}
        def pushed(name, **more):
            try:
                api.upload_folder(repo_id=f"{org}/{name}", folder_path=Path(folder, name), **more)
            except Exception as error:
                response = getattr(error, "response", None)
                return type(error).__name__ if response is None else response.status_code
        for name in ["twice", "stale", "cut", *requests]:
            Path(folder, name).mkdir()
            Path(folder, name, "weights.bin").write_text(f"of {name}")
            api.create_repo(f"{org}/{name}")
            parent = api.list_repo_commits(f"{org}/{name}")[0].commit_id if name == "stale" else None
            result[name] = [pushed(name, parent_commit=parent), pushed(name)]
        """,
        token=account.write,
        requests=requests,
        folder=tmp_path,
    )
    first = (
        {"twice": None, "stale": 412, "cut": None}
        if xet
        else {"twice": 500, "stale": 503, "cut": "RemoteProtocolError"}
    )
    told = {"token": "ConnectionError", "put": "RuntimeError", "verify": "RuntimeError"}  # what the client makes of 403
    denied = {name: told.get(name, 403) for name in requests}
    assert got == {name: [failed, None] for name, failed in (first | denied).items()}
    for name in got:
        repo = account.hub.store.repos[f"{org}/{name}"]
        assert repo.commit("main").files["weights.bin"].content == f"of {name}".encode()
        assert len(repo.commit("main").history()) == 2
    tried = [each.status for each in account.seen("POST", "/stale/commit/")]
    assert tried == ([503, 412] if xet else [503])


def test_a_commit_that_changes_nothing(account: Account, tmp_path):
    """The real Hub makes it where a client sends it, and the client of the Hub sends it where an answer was lost."""
    account.hub.switches.empty_commits = True
    account.hub.faults.append(Fault("twice", f"{account.name}/m/commit/", last=1))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "note.txt").write_text("note")
    asked = """
        from huggingface_hub import HfApi
        HfApi().create_repo(f"{org}/m")
        HfApi().upload_folder(repo_id=f"{org}/m", folder_path=folder)
        result = len(HfApi().list_repo_commits(f"{org}/m"))
    """
    assert account.python(asked, token=account.write, xet=True, folder=tmp_path / "m") == 3


def test_jobs_are_asked_for_looked_at_and_priced(account: Account, tmp_path):
    """A local script reaches a job through a bucket; who may not write in the namespace runs none there."""
    (tmp_path / "script.py").write_text("print('merged')")
    account.hub.switches.job_logs = ("one", "two")
    got = account.python(
        """
        from huggingface_hub import HfApi, Volume
        api = HfApi()
        def refused(**more):
            try:
                api.run_job(image="python", command=["true"], namespace=org, **more)
            except Exception as error:
                return error.response.status_code
        model = Volume(type="model", source=f"{org}/m", mount_path="/models/m", revision="main")
        job = api.run_uv_job(script, script_args=["--x", "1"], dependencies=["hf-merge"], flavor="a10g-large",
                             secrets={"HF_TOKEN": "hf_secret"}, env={"A": "b"}, timeout="2h", volumes=[model])
        stages = [job.status.stage, *(api.inspect_job(job_id=job.id).status.stage for _ in range(4))]
        other = api.run_job(image="python:3.12", command=["python", "-V"])
        api.cancel_job(job_id=other.id)
        result = {
            "url": job.url, "stages": stages, "waited": api.wait_for_job(job.id).status.stage, "flavor": job.flavor,
            "secrets": job.secrets, "volumes": [[each.type, each.source] for each in job.volumes],
            "logs": [list(api.fetch_job_logs(job_id=job.id, **more)) for more in ({}, {"follow": True}, {"tail": 1})],
            "jobs": {each.id: each.status.stage for each in api.list_jobs()}, "ids": [job.id, other.id],
            "prices": {each.name: each.unit_cost_usd for each in api.list_jobs_hardware() if each.accelerator},
            "refused": [refused(token=read), refused(token=stranger), refused(flavor="abacus")],
        }
        """,
        token=account.write,
        read=account.read,
        stranger=account.stranger,
        script=str(tmp_path / "script.py"),
        environment={"HF_HUB_DISABLE_EXPERIMENTAL_WARNING": "1"},
    )
    assert got["url"] == f"{account.hub.url}/jobs/{account.name}/{got['ids'][0]}" and got["flavor"] == "a10g-large"
    assert got["stages"] == ["SCHEDULING", "SCHEDULING", "RUNNING", "COMPLETED", "COMPLETED"]
    assert got["waited"] == "COMPLETED" and got["logs"] == [["one", "two"], ["one", "two"], ["two"]]
    assert got["jobs"] == dict(zip(got["ids"], ["COMPLETED", "CANCELED"], strict=True))
    assert got["secrets"] == {"HF_TOKEN": ""} and got["prices"]["a10g-large"] == 0.025
    assert got["volumes"] == [["model", f"{account.name}/m"], ["bucket", f"{account.name}/jobs-artifacts"]]
    assert got["refused"] == [403, 403, 400]
    asked = next(each for each in account.hub.log if each.path == f"/api/jobs/{account.name}" and each.body).body
    assert asked["command"] == ["uv", "run", "--with", "hf-merge", "/data/script.py", "--x", "1"]
    assert asked["secrets"] == {"HF_TOKEN": "hf_secret"} and asked["timeoutSeconds"] == 7200
    assert [*account.hub.store.buckets[f"{account.name}/jobs-artifacts"].values()] == [b"print('merged')"]


@both_ways
def test_spaces_and_datasets_are_repositories_too(account: Account, tmp_path):
    """One of each kind may have the same name, and each has its own address."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "app.py").write_text("import gradio")
    (tmp_path / "app" / "README.md").write_text("---\nsdk: gradio\n---\n")
    (tmp_path / "app" / "large ü.bin").write_bytes(b"data")
    got = account.python(
        """
        from huggingface_hub import HfApi, create_repo, hf_hub_download, snapshot_download
        api, repo = HfApi(), f"{org}/app"
        kinds = {"model": {}, "dataset": {}, "space": {"space_sdk": "gradio", "space_hardware": "cpu-basic"}}
        urls = [create_repo(repo, repo_type=kind, **more) for kind, more in kinds.items()]
        for kind in ("dataset", "space"):
            api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder)
        api.upload_file(path_or_fileobj=b"torch", path_in_repo="requirements.txt", repo_id=repo, repo_type="space")
        result = {
            "urls": urls, "ids": [each.repo_id for each in urls], "sdk": api.space_info(repo).sdk,
            "files": [sorted(api.list_repo_files(repo, repo_type=kind)) for kind in kinds],
            "read": open(hf_hub_download(repo, "large ü.bin", repo_type="space")).read(),
            "path": snapshot_download(repo, repo_type="dataset"),
        }
        api.delete_repo(repo, repo_type="space")
        result["left"] = [api.repo_exists(repo, repo_type=kind) for kind in kinds]
        """,
        token=account.write,
        folder=tmp_path / "app",
    )
    name, url = f"{account.name}/app", account.hub.url
    assert got["urls"] == [f"{url}/{name}", f"{url}/datasets/{name}", f"{url}/spaces/{name}"]
    assert got["ids"] == [name] * 3 and got["sdk"] == "gradio" and got["read"] == "data"
    sent = [".gitattributes", "README.md", "app.py", "large ü.bin"]
    assert got["files"] == [[".gitattributes"], sent, sorted([*sent, "requirements.txt"])]
    assert "datasets--" in got["path"] and got["left"] == [True, True, False]
    made = [each.body for each in account.hub.log if each.path == "/api/repos/create" and each.body["name"] == "app"]
    assert made[-1]["sdk"] == "gradio" and made[-1]["hardware"] == "cpu-basic"
