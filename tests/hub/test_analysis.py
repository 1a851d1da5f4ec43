"""What an analysis of models on the Hub reads: pieces of tensors where it takes a sample, whole files where not."""

import json

import pytest

import hf_merge

pytestmark = pytest.mark.e2e


def analysed(account, *words):
    """Analyse two models of the account over their base by the command line; return the JSON."""
    names = [f"{account.name}/{name}" for name in ("a", "b")]
    call = ("analyze", *names, "--base", f"{account.name}/base", "--json", *words)
    done = account.cli(*call)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def plain(found):
    """What an analysis found, without the names of files."""
    return {key: value for key, value in found.items() if key != "models"}


def test_a_sample_is_read_by_range_and_is_that_of_the_files(account, llamas):
    for name in ("base", "a", "b"):
        account.put(name, llamas[name])
    told = analysed(account, "--sample", "64")
    here = hf_merge.analyze([llamas["a"], llamas["b"]], base_model=llamas["base"], sample=64)
    assert plain(told) == plain(json.loads(json.dumps(here.to_dict())))
    assert not [*account.home.rglob("*.safetensors")]
    assert all(one.range for one in account.seen("GET") if one.path.endswith(".safetensors"))


def test_all_of_it_comes_as_files_and_is_that_of_the_folders(account, llamas):
    for name in ("base", "a", "b"):
        account.put(name, llamas[name])
    told = analysed(account)
    here = hf_merge.analyze([llamas["a"], llamas["b"]], base_model=llamas["base"])
    assert plain(told) == plain(json.loads(json.dumps(here.to_dict())))
    assert len({path.resolve() for path in account.home.rglob("*.safetensors")}) == 3
