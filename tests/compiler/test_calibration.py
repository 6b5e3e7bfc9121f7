"""Calibration data: texts, JSON lines and iterables become sequences; what cannot is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mxloom
from mxloom.backends.reference import body
from mxloom.compiler.calibration import CalibrationData, _continued
from mxloom.compiler.calibration_text import drawn, windows
from mxloom.compiler.driver import import_source
from mxloom.compiler.model_source import ModelSource, open_model
from mxloom.dialects.errors import MxloomError, UsageError

KJV = Path(__file__).parents[2] / "examples" / "models" / "kjv-2m"
HELD_OUT = (KJV / "held_out.txt").read_text("utf-8")[:20_000]


@pytest.fixture(scope="module")
def source() -> ModelSource:
    opened = open_model(KJV)
    import_source(opened)
    return opened


@pytest.fixture(scope="module")
def tokens(source: ModelSource) -> list[int]:
    return source.tokenizer()(HELD_OUT, add_special_tokens=False)["input_ids"]


def data(source: ModelSource, given: Any, **options: Any) -> CalibrationData:
    return CalibrationData(source, body(import_source(source)).args, given, **options)


def sequences(found: list[list[Tensor]]) -> list[list[int]]:
    """The tokens of each input; nothing of it is padding."""
    assert all(bool((mask == 1).all()) and ids.shape == mask.shape for ids, mask in found)
    return [row for ids, _ in found for row in ids.tolist()]


def test_a_text_is_cut_from_its_front_where_nobody_chooses(source: ModelSource, tokens: list[int]) -> None:
    wanted = [tokens[64 * i : 64 * (i + 1)] for i in range(5)]
    assert sequences(data(source, HELD_OUT)(5)) == wanted
    assert sequences(data(source, HELD_OUT)(2)) == wanted[:2]


def test_a_short_text_is_one_short_sequence(source: ModelSource, tokens: list[int]) -> None:
    short = HELD_OUT[:60]
    (found,) = sequences(data(source, short)(8))
    assert 2 <= len(found) < 64 and found == tokens[: len(found)]


def test_a_seed_chooses_windows_none_of_them_twice(source: ModelSource, tokens: list[int]) -> None:
    every = [tuple(tokens[32 * i : 32 * (i + 1)]) for i in range(len(tokens) // 32)]
    one = [tuple(row) for row in sequences(data(source, HELD_OUT, length=32, seed=1)(20))]
    assert len(one) == len(set(one)) == 20 and set(one) <= set(every)
    assert one != every[:20]
    assert one == [tuple(row) for row in sequences(data(source, HELD_OUT, length=32, seed=1)(20))]
    assert one[:7] == [tuple(row) for row in sequences(data(source, HELD_OUT, length=32, seed=1)(7))]
    assert one != [tuple(row) for row in sequences(data(source, HELD_OUT, length=32, seed=2)(20))]
    whole = [tuple(row) for row in sequences(data(source, HELD_OUT, length=32, seed=1)(10_000))]
    assert sorted(whole) == sorted(every), "where more are asked for than there are, all come once"


def test_documents_of_json_lines_come_one_window_each_first(source: ModelSource, tmp_path: Path) -> None:
    path = tmp_path / "calibration.jsonl"
    lines = [{"input_ids": list(range(10))}, {"input_ids": [20]}, {"input_ids": [30, 31, 32]}, {"text": HELD_OUT[:300]}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    text = source.tokenizer()(HELD_OUT[:300], add_special_tokens=False)["input_ids"]
    found = sequences(data(source, path, length=4)(5))
    assert found == [[0, 1, 2, 3], [30, 31, 32], text[:4], [4, 5, 6, 7], text[4:8]]
    chosen = sequences(data(source, str(path), length=4, seed=0)(3))
    assert len(chosen) == 3 and [30, 31, 32] in chosen and sum(row[0] < 10 for row in chosen) == 1


def test_of_many_documents_a_seed_chooses_without_reading_them_all_into_memory() -> None:
    many = list(drawn(iter(range(100_000)), 4, seed=0))
    assert len(many) == len(set(many)) == 2 * 4 + 64 and max(many) > 10_000
    assert many == list(drawn(iter(range(100_000)), 4, seed=0)) != sorted(many)
    asked: list[int] = []

    def tokens(document: int) -> list[int]:
        asked.append(document)
        return [document] * 8

    assert list(windows(range(100), tokens, 8, 3, None, shortest=2)) == [[0] * 8, [1] * 8, [2] * 8]
    assert asked == [0, 1, 2], "what is not needed is not tokenized"


def test_iterables_are_read_once_and_no_further_than_they_must(source: ModelSource) -> None:
    read: list[int] = []

    def endless() -> Iterator[list[int]]:
        number = 0
        while True:
            read.append(number)
            yield [number, number + 1]
            number += 1

    held = data(source, endless(), length=8, seed=0)
    assert sequences(held(3)) == [[0, 1], [1, 2], [2, 3]]
    assert sequences(held(4)) == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert read == [0, 1, 2, 3]


def test_iterables_of_texts_tensors_and_inputs_by_name(source: ModelSource) -> None:
    ids = torch.arange(12).reshape(2, 6)
    by_name = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])}
    assert sequences(data(source, [ids, ids[0]])(5)) == [*ids.tolist(), ids[0].tolist()]
    assert sequences(data(source, (row for row in ids))(1)) == [ids[0].tolist()]
    ((given, mask),) = data(source, [by_name])(3)
    assert torch.equal(given, ids) and torch.equal(mask, by_name["attention_mask"])
    first = source.tokenizer()("In the beginning", add_special_tokens=False)["input_ids"]
    assert sequences(data(source, ["In the beginning", "God"])(1)) == [first]


WRONG: dict[str, tuple[Any, str]] = {
    "a number": (3, "calibration is a text, its file, or an iterable of texts, of tensors, or of dictionaries"),
    "one dictionary": ({"input_ids": torch.ones(1, 2)}, "or an iterable of texts, of tensors, or of dictionaries"),
    "one tensor": (torch.ones(1, 2), "or an iterable of texts, of tensors, or of dictionaries"),
    "nothing": ([], "the iterable is empty"),
    "two kinds": ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}, 3.5], "calibration input 1 is 3.5"),
    "no text among texts": (["a text of words", 7], "a text or a list of token numbers was expected among others"),
    "an unknown input": ([{"input_idz": torch.ones(1, 2)}], "unknown input 'input_idz'"),
    "a missing input": ([{"attention_mask": torch.ones(1, 2, dtype=torch.long)}], "input 'input_ids' is missing"),
    "a file that is not there": ("none/there.jsonl", "none/there.jsonl: the calibration text cannot be read"),
    "a token too far": ([[5, 2048]], "the text has token 2048, but the model's vocabulary is 2048"),
    "a text too short": ("a", "the text has fewer than 2 tokens"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_calibration_data_is_named(what: str, source: ModelSource) -> None:
    given, told = WRONG[what]
    with pytest.raises(MxloomError) as caught:
        data(source, given)(2)
    assert told in str(caught.value)


LINES: dict[str, str] = {
    "{": ":2: this is no JSON",
    "3": ":2: a line is a JSON object",
    '{"txt": "a"}': ":2: a line is a JSON object",
    '{"text": "a", "txet": 1}': ":2: unknown key 'txet' (did you mean \"text\"?)",
    '{"text": "a", "input_ids": [1]}': ":2: both text and input_ids",
    '{"text": 3}': ":2: text is a string, got 3",
    '{"input_ids": [1, -1]}': ":2: input_ids is a list of token numbers",
    '{"input_ids": [1, true]}': ":2: input_ids is a list of token numbers",
}


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_is_named(line: str, source: ModelSource, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"text": "In the beginning God created the heaven"}\n' + line)
    with pytest.raises(MxloomError) as caught:
        data(source, path)(4)
    assert f"{path}{LINES[line]}" in str(caught.value)


def test_a_length_that_the_text_or_the_model_has_not_is_an_error(source: ModelSource) -> None:
    with pytest.raises(UsageError, match=r"the text has fewer than 128 tokens, .* or a smaller length"):
        data(source, HELD_OUT[:100], length=128, seed=0)(4)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    config.bos_token_id = config.eos_token_id = 1
    model = open_model(
        transformers.GPT2LMHeadModel(config).eval(), example={"input_ids": torch.arange(8).reshape(2, 4)}
    )
    with pytest.raises(UsageError, match="calibration: length is 17; GPT2LMHeadModel has 16 positions"):
        data(model, None, length=17)


def test_padding_without_a_mask_in_the_module_is_an_error() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=16, num_attention_heads=2, **sizes)
    ids = torch.arange(8).reshape(2, 4)
    model = open_model(transformers.LlamaForCausalLM(config).eval(), example={"input_ids": ids})
    whole, part = torch.ones_like(ids), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ((found,),) = data(model, [{"input_ids": ids, "attention_mask": whole}])(1)
    assert torch.equal(found, ids)
    with pytest.raises(
        UsageError, match="calibration input 0 is padded, and the module was captured without attention"
    ):
        data(model, [{"input_ids": ids, "attention_mask": part}])(1)


def _llama() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=37, num_attention_heads=2, **sizes))


def _sliding() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    config = transformers.Gemma3TextConfig(
        vocab_size=37, num_attention_heads=2, num_key_value_heads=1, sliding_window=4, **sizes
    )
    return transformers.Gemma3ForCausalLM(config)


@pytest.mark.parametrize("make", [_llama, _sliding])
def test_a_model_speaks_with_its_cache_what_it_speaks_without(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, begin = make().eval(), torch.arange(3)[:, None]
    generator = torch.Generator().manual_seed(1)
    ids = begin
    with torch.no_grad():
        while ids.shape[1] < 12:
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        assert torch.equal(_continued(model, begin, 12, torch.Generator().manual_seed(1)), ids)


def test_without_data_a_language_model_speaks_from_the_seed(source: ModelSource) -> None:
    one, again, other = (data(source, None, length=6, seed=seed) for seed in (3, 3, 4))
    first = sequences(one(2))
    assert [len(row) for row in first] == [6, 6]
    assert first == sequences(again(2)) != sequences(other(2))


RECIPE = """version: 1
passes: ["calibrate{kinds=ranges}"]
calibration: {text: texts/calibration.txt, samples: 3, length: 16, seed: 2}
"""


def test_a_recipe_finds_its_text_beside_it_and_its_samples_are_the_default(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "calibration.txt").write_text(HELD_OUT)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    seen: list[list[list[int]]] = []
    call = CalibrationData.__call__

    def watch(self: CalibrationData, samples: int) -> list[list[Tensor]]:
        found = call(self, samples)
        seen.append(sequences(found))
        return found

    monkeypatch.setattr(CalibrationData, "__call__", watch)
    mxloom.compile(source, path)
    assert seen[0] == sequences(call(data(source, HELD_OUT, length=16, seed=2), 3))
    mxloom.compile(source, path, calibration=HELD_OUT[:2000])
    assert seen[1] == sequences(call(data(source, HELD_OUT[:2000], length=16, seed=2), 3))
    assert seen[0] != seen[1]


def test_a_recipe_whose_calibration_nobody_reads_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("version: 1\nquantize: [{weights: mxint8}]\npasses: [pack]\ncalibration: {samples: 2}\n")
    example = {"input": torch.zeros(2, 32)}
    with pytest.raises(UsageError, match=r"recipe\.yaml:4: calibration has no effect: none of the passes needed data"):
        mxloom.compile(nn.Linear(32, 32), path, example=example)


def test_inputs_that_are_no_numbers_are_told_by_the_pass_that_reads_them() -> None:
    x = torch.ones(2, 32)
    x[1, 3] = float("nan")
    with pytest.raises(MxloomError, match="calibration input 0: 1 of 64 values of input are NaN or infinite"):
        mxloom.compile(nn.Linear(32, 32), {"passes": ["calibrate"]}, example={"input": x}, calibration=[x])
