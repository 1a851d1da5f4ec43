"""Views of models: other rows, other companions; nothing is read before it is asked for."""

import pytest
import torch

from hf_merge.sources.base import Source
from hf_merge.sources.companions import WithCompanions
from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.reindexed import Borrowed, Reindexed, Rows, gather


class Watched(MappingSource):
    """A source that remembers what was read, and counts how often torch was asked for rows."""

    reads: list[str]

    def __init__(self, tensors, label="watched"):
        super().__init__(tensors, label)
        self.reads, self.config, self.public_id, self.revision = [], {"model_type": "x"}, "org/x", "abc"

    def __getitem__(self, name):
        self.reads.append(name)
        return super().__getitem__(name)

    def fingerprint(self):
        return "x"

    def write_companions(self, folder, wanted=None):
        (folder / "companion").write_text("mine")


def index(*places):
    return torch.tensor(places, dtype=torch.int64)


def test_rows_are_gathered_when_asked_for_and_no_sooner():
    source = Watched({"e": torch.arange(6.0).view(3, 2), "w": torch.ones(2)})
    view = Reindexed(source, {"e": Rows(index(2, -1, 0))})
    assert source.reads == [] and view.specs["e"].shape == (3, 2) and list(view) == ["e", "w"]
    assert view["e"].tolist() == [[4, 5], [0, 0], [0, 1]] and source.reads == ["e"]
    assert (view.label, view.public_id, view.revision, view.config) == ("watched", "org/x", "abc", {"model_type": "x"})
    assert (view.bytes_held("e"), view.bytes_held("w")) == (24, 0)


def test_rows_of_others_and_means_of_several():
    mine, a, b = (Watched({"e": torch.full((2, 2), value)}) for value in (1.0, 2.0, 4.0))
    rows = Rows(
        index(0, -1, -1, -1),
        borrowed=(Borrowed(a, "e", index(1), index(0)),),
        shared=(Borrowed(a, "e", index(2, 3), index(1, 1)), Borrowed(b, "e", index(3), index(0))),
    )
    assert gather(mine["e"], rows).tolist() == [[1, 1], [2, 2], [2, 2], [3, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 2)])
def test_dtypes_and_shapes_stay(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    rows = Rows(index(4, -1, 0, -1), padding=index(1, 3), real=index(0, 1, 2))
    done = gather(tensor, rows)
    assert done.dtype == dtype and done.shape == (4, *shape[1:])
    mean = tensor[:3].double().mean(0).to(dtype)
    assert torch.equal(done[0], tensor[4]) and torch.equal(done[1], mean) and torch.equal(done[3], mean)


def test_rows_are_moved_in_bulk_not_one_by_one(monkeypatch):
    """The number of torch calls does not grow with the number of rows."""
    calls = []
    for name in ("index_select", "index_copy_", "index_fill_", "index_add_"):
        inner = getattr(torch.Tensor, name)
        counted = lambda *a, inner=inner, name=name: (calls.append(name), inner(*a))[1]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, counted)
    found = []
    for count in (40, 4000):
        source, other = Watched({"e": torch.randn(count, 2)}), Watched({"e": torch.randn(count, 2)})
        own = torch.arange(count)
        own[::2] = -1
        lacking = torch.arange(0, count, 2)
        half = len(lacking) // 2
        rows = Rows(
            own,
            borrowed=(Borrowed(other, "e", lacking[:half], lacking[:half]),),
            shared=tuple(Borrowed(s, "e", lacking[half:], lacking[half:]) for s in (source, other)),
        )
        calls.clear()
        view = Reindexed(source, {"e": rows})
        assert len(view["e"]) == count
        found.append(list(calls))
    assert found[0] == found[1] and len(found[0]) < 12


def test_fingerprint_tells_other_rows_apart():
    source = Watched({"e": torch.ones(3, 2)})
    one, two = (Reindexed(source, {"e": Rows(own)}) for own in (index(2, 1, 0), index(1, 2, 0)))
    assert len({source.fingerprint(), one.fingerprint(), two.fingerprint()}) == 3
    assert one.fingerprint() == Reindexed(source, {"e": Rows(index(2, 1, 0))}).fingerprint()
    assert Reindexed(MappingSource({"e": torch.ones(3, 2)}, "m"), {"e": Rows(index(1))}).fingerprint() is None


def test_companions_are_changed_after_the_models_own_were_written(tmp_path):
    source = Watched({"e": torch.ones(3, 2)})
    view = WithCompanions(source, {"a": 1}, lambda folder: (folder / "companion").write_text("changed"))
    inner: Source = Reindexed(view, {"e": Rows(index(0))})
    inner.write_companions(tmp_path)
    assert (tmp_path / "companion").read_text() == "changed" and inner.config == {"a": 1}
    assert view["e"] is source["e"] and view.fingerprint() == "x" and view.specs == source.specs
