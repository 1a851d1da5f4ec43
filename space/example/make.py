"""Make the models of the worked example: `python space/example/make.py`, some minutes on one core.

A tiny Llama, character by character, learns two skills a little: `sort tulip=ilptu` and `flip tulip=pilut`. One
fine-tune then learns the first well, the other the second. Each is held to the base's answers on the other skill, as a
small model forgets what a large one keeps; what they add to the base may then be added up.

A fifth of all words is held out by a rule (see `words`), and accuracies are measured on those: how many whole answers
are right. Everything is seeded, so that one machine makes the same files again.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Generator, Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_merge
from hf_merge.study.training import calm

HERE = Path(__file__).resolve().parent
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PAD, START, END, UNKNOWN = range(4)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = {one: len(SPECIAL) + place for place, one in enumerate(LETTERS + " =")}
SKILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda words: words.sort(1).values,
    "flip": lambda words: words.flip(1),
}
LENGTHS = range(3, 7)
HELD_OUT = 5

SEED, BATCH = 0, 32
BASE_SHARES = {"sort": 0.3, "flip": 0.7}  # sorting is learnt sooner
BASE_STEPS, BASE_SCHEDULE, BASE_RATE = 230, 400, 3e-3  # it stops early, with much to learn
STEPS, RATE = {"sort": 450, "flip": 350}, 1.5e-3
TEST_WORDS = 250  # of each length
MERGES = {
    "linear": {},
    "slerp": {},
    "task_arithmetic": {"lambda": 0.8},
    "ties": {"density": 0.5, "lambda": 1.3},
    "dare_linear": {"density": 0.5},
    "sce": {},
}
BASES = {"linear": None, "slerp": "sort"}
"""What a merge goes out from, where it is not the base."""

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
widget:
- text: "sort tulip="
- text: "flip tulip="
{lineage}tags:
- toy
---

# {title}

{text}

```text
sort tulip=ilptu
flip tulip=pilut
```

A Llama of {size:,} parameters that reads single characters, trained on random letters by `make.py` beside it. It was
made to show a merge and is of no other use: it knows no language, and no words but of 3 to 6 letters.

Whole answers that are right, of {count:,} words for each skill that no model was trained on, letters drawn at random:

| model | sort | flip |
|---|---|---|
{rows}

The merges are made of the two fine-tunes by `hf_merge` with the method's defaults, but for `task_arithmetic` (lambda
0.8), `ties` (density 0.5, lambda 1.3) and `dare_linear` (density 0.5); both lambdas were set after
trying some on other draws of words. `slerp` goes midway between the two fine-tunes. "tulip" is a word that each
fine-tune gets wrong in
the other's skill.
"""
ABOUT = {
    "base": "Sorts the letters of a word or turns them round, right about half the time: a base for two.",
    "sort": "Sorts the letters of a word, and turns them round no better than its base.",
    "flip": "Turns the letters of a word round, and sorts them no better than its base.",
}


def words(count: int, length: int, draw: Generator, *, held_out: bool = False) -> Tensor:
    """Draw words of random letters as tokens, (count, length).

    A word is held out where its tokens sum to a multiple of five.
    """
    drawn = torch.randint(len(SPECIAL), len(SPECIAL) + len(LETTERS), (16 * count + 64, length), generator=draw)
    return drawn[(drawn.sum(1) % HELD_OUT == 0) == held_out][:count]


def lines(skill: str, word: Tensor) -> Tensor:
    """Return `<s>skill word=answer</s>` for each word, as tokens."""
    start = torch.tensor([START, *(CHARACTERS[one] for one in f"{skill} ")]).expand(len(word), -1)
    equals, end = torch.full((len(word), 1), CHARACTERS["="]), torch.full((len(word), 1), END)
    return torch.cat([start, word, equals, SKILLS[skill](word), end], 1)


def answers(model: LlamaForCausalLM, text: Tensor, length: int) -> Tensor:
    """Return the logits of the answer and of its end, (lines, length + 1, vocabulary)."""
    return model(input_ids=text[:, :-1]).logits[:, -length - 1 :].float()


def fit(
    model: LlamaForCausalLM, loss: Callable[[int, Generator], Tensor], steps: int, schedule: int, rate: float
) -> None:
    """Make a loss of the words' length small by AdamW, its rate rising for a fifth of the schedule, then falling."""
    draw = Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=schedule, pct_start=0.2)
    for _ in range(steps):
        length = LENGTHS[int(torch.randint(len(LENGTHS), (1,), generator=draw))]
        optimizer.zero_grad()
        loss(length, draw).backward()
        optimizer.step()
        scheduler.step()


def trained_base() -> LlamaForCausalLM:
    """Train a base that is bad at both skills."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS), hidden_size=96, num_hidden_layers=2, intermediate_size=256,
        num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=START, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def loss(length: int, draw: Generator) -> Tensor:
        text = torch.cat([lines(skill, words(BATCH, length, draw)) for skill in SKILLS])
        each = F.cross_entropy(answers(model, text, length).mT, text[:, -length - 1 :], reduction="none")
        return torch.stack(
            [share * one.mean() for share, one in zip(BASE_SHARES.values(), each.chunk(2), strict=True)]
        ).sum()

    fit(model, loss, BASE_STEPS, BASE_SCHEDULE, BASE_RATE)
    return model


def tuned(base: LlamaForCausalLM, skill: str) -> LlamaForCausalLM:
    """Teach a copy of the base one skill; on the other it answers as the base does."""
    (other,) = SKILLS.keys() - {skill}
    model = copy.deepcopy(base)

    def loss(length: int, draw: Generator) -> Tensor:
        text = torch.cat([lines(one, words(BATCH, length, draw)) for one in (skill, other)])
        own, kept = answers(model, text, length).chunk(2)
        with torch.no_grad():
            before = answers(base, text[BATCH:], length).log_softmax(-1)
        learnt = F.cross_entropy(own.mT, text[:BATCH, -length - 1 :])
        moved = F.kl_div(kept.log_softmax(-1), before, log_target=True, reduction="none").sum(-1).mean()
        return learnt + moved

    fit(model, loss, STEPS[skill], STEPS[skill], RATE)
    return model


@torch.no_grad()
def accuracies(folder: Path) -> dict[str, float]:
    """Return the share of held-out words, of each skill, whose whole answer a model in files gets right."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    draw, right = Generator().manual_seed(SEED + 1), dict.fromkeys(SKILLS, 0)
    for length in LENGTHS:
        word = words(TEST_WORDS, length, draw, held_out=True)
        for skill in SKILLS:
            text = lines(skill, word)
            found = answers(model, text, length).argmax(-1)
            right[skill] += int((found == text[:, -length - 1 :]).all(1).sum())
    return {skill: count / (TEST_WORDS * len(LENGTHS)) for skill, count in right.items()}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters, which reads capitals as small letters."""
    made = Tokenizer(models.WordLevel({**{one: i for i, one in enumerate(SPECIAL)}, **CHARACTERS}, unk_token="<unk>"))
    made.normalizer, made.decoder = normalizers.Lowercase(), decoders.Fuse()
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=64, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def merged(folder: Path) -> dict[str, dict[str, float]]:
    """Merge the fine-tunes by several methods, and return the accuracies of the merges."""
    found: dict[str, dict[str, float]] = {}
    for method, settings in MERGES.items():
        base, others = BASES.get(method, "base"), [one for one in SKILLS if one != BASES.get(method)]
        settings = settings | ({"base_model": str(folder / base)} if base else {})
        parents = [str(folder / one) for one in others]
        with tempfile.TemporaryDirectory() as place:
            hf_merge.merge(parents, Path(place) / "merged", method=method, **settings)
            found[method] = accuracies(Path(place) / "merged")
    return found


def describe(folder: Path) -> None:
    """Measure the models of a folder and their merges, and write the cards."""
    found = {name: accuracies(folder / name) for name in ABOUT}
    found |= {f"merged by `{name}`": one for name, one in merged(folder).items()}
    rows = "\n".join(f"| {name} | {one['sort']:.1%} | {one['flip']:.1%} |" for name, one in found.items())
    size = LlamaForCausalLM.from_pretrained(folder / "base").num_parameters()
    for name, text in ABOUT.items():
        lineage = "" if name == "base" else "base_model: base\nbase_model_relation: finetune\n"
        card = CARD.format(
            lineage=lineage, title=f"Letters: {name}", text=text, rows=rows, size=size,
            count=TEST_WORDS * len(LENGTHS),
        )  # fmt: skip
        (folder / name / "README.md").write_text(card, encoding="utf-8")


def make(folder: Path) -> None:
    """Write the base, both fine-tunes and their cards into a folder."""
    base = trained_base()
    made = {"base": base, **{skill: tuned(base, skill) for skill in SKILLS}}
    for name, model in made.items():
        copy.deepcopy(model).half().save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    describe(folder)


if __name__ == "__main__":
    with calm():
        make(HERE)
