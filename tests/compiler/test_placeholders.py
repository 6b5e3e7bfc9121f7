"""Models whose weights stay in their files are captured as if they lay in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.initialization as initialization
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MarianConfig, PreTrainedConfig, PreTrainedModel, WhisperConfig

import mxloom
from mxloom.compiler.capture import capture
from mxloom.compiler.checkpoint import rebuild_constants
from mxloom.compiler.placeholders import on_meta, placed
from mxloom.dialects.errors import MxloomError, UsageError

HALVES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def saved(folder: Path, kind: type[PreTrainedModel], config: Any) -> Any:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


def whisper(folder: Path) -> Any:
    config = WhisperConfig(**HALVES, num_mel_bins=16, max_source_positions=50, max_target_positions=40)
    return saved(folder, transformers.WhisperForConditionalGeneration, config)


def test_whisper_from_its_folder_is_eager_to_the_bit(tmp_path: Path) -> None:
    """Its encoder makes positions where its inputs lie and looks them up where its weights lie."""
    model = whisper(tmp_path)
    example = {"input_features": torch.randn(2, 16, 100), "decoder_input_ids": torch.arange(14).reshape(2, 7) + 3}
    compiled = mxloom.compile(tmp_path, example=example)
    given = {"input_features": torch.randn(3, 16, 100), "decoder_input_ids": torch.arange(15).reshape(3, 5) + 3}
    with torch.no_grad():
        assert torch.equal(compiled(**given).logits, model(**given, use_cache=False).logits)


def test_a_model_of_other_inputs_is_told_how_to_be_compiled(tmp_path: Path) -> None:
    whisper(tmp_path)
    with pytest.raises(UsageError, match=r"mxloom\.compile\(.*'input_features': tensor, 'decoder_input_ids': tensor"):
        mxloom.compile(tmp_path)


def test_parameters_that_the_architecture_makes_need_no_file(tmp_path: Path) -> None:
    """Marian's checkpoints leave out its positions: sine and cosine, by its own initialisation."""
    model = saved(tmp_path, transformers.MarianMTModel, MarianConfig(**HALVES, max_position_embeddings=40))
    assert not any("embed_positions" in name for name in load_file(tmp_path / "model.safetensors"))
    tokens = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "decoder_input_ids": tokens[:, 2:]}
    with torch.no_grad():
        assert torch.equal(mxloom.compile(tmp_path)(**given)[0], model(**given, use_cache=False).logits)


class Odd(PreTrainedModel):
    """Holds a tensor that is no buffer, and a parameter that its initialisation fills."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.table = torch.arange(4.0) * 2
        self.scale = nn.Parameter(torch.empty(4))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            drawn = torch.rand(4) if self.config.num_labels == 7 else torch.zeros(4)
            initialization.copy_(self.scale, drawn + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table + self.scale


def odd(**config: Any) -> Odd:
    with torch.device("meta"):
        return Odd(PreTrainedConfig(**config))


def test_plain_tensors_and_made_parameters_get_their_values(tmp_path: Path) -> None:
    model = odd()
    rebuild_constants(model, tmp_path, ["scale"])
    assert model.table.tolist() == [0, 2, 4, 6]
    assert model.scale.tolist() == [0.5] * 4
    assert isinstance(model.scale, nn.Parameter)


def test_a_parameter_drawn_at_random_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MxloomError, match=r"1 tensors that config.json asks for are missing: scale"):
        rebuild_constants(odd(num_labels=7), tmp_path, ["scale"])


class Tied(nn.Module):
    """Makes a tensor wherever torch puts it, whatever the device of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.zeros(8))
        self.shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x) + torch.arange(8) + self.shift)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_without_values_is_captured_on_the_processor(device: str) -> None:
    with torch.device("meta"):
        model = Tied()
    before = model.state_dict(keep_vars=True)
    program = capture(model, {"x": torch.zeros(2, 5, dtype=torch.long, device=device)})
    assert {node.meta["val"].device.type for node in program.graph.nodes if "val" in node.meta} == {"cpu"}
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, tensor in before.items())


def test_placed_parameters_share_memory_and_stay_tied() -> None:
    """The memory is that of the largest parameter: 16 x 8 floats; a buffer has its own."""
    with torch.device("meta"):
        model = Tied()
        model.add_module("wide", wide := nn.Linear(4, 4))
    with placed(model):
        assert not on_meta(model)
        assert model.head.weight is model.embed.weight
        assert wide.weight.untyped_storage().nbytes() == 16 * 8 * 4
        assert wide.weight.data_ptr() == model.embed.weight.data_ptr() != model.shift.data_ptr()
        assert wide.weight.is_contiguous()
    assert on_meta(model)
