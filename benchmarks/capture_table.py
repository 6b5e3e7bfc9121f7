"""What the front end makes of small random models: `python benchmarks/capture_table.py [model ...]` prints Markdown.

Every row is checked against eager torch: the module, printed and parsed again, runs in the reference interpreter at two
sizes (the first with left padding), and its multiply-accumulates are compared with those that torch counts by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

from mxloom.backends._shapes import shapes_of
from mxloom.backends.reference import Interpreter, body
from mxloom.backends.weight_store import WeightStore
from mxloom.compiler.capture import capture
from mxloom.compiler.import_graph import constants, import_program
from mxloom.compiler.simplify import simplify
from mxloom.dialects.mx import parse_module
from mxloom.dialects.operations._operation import Operation
from mxloom.dialects.operations.opaque import AtenOp, SymOp
from mxloom.dialects.operations.parameter import ParameterOp
from mxloom.dialects.operations.size import SizeOp

_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16}
_PHI3: dict[str, Any] = {key: value for key, value in _GROUPED.items() if key != "head_dim"}
_GPT2: dict[str, Any] = {"vocab_size": 128, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
_OPT: dict[str, Any] = {**_TEXT, "ffn_dim": 96, "word_embed_proj_dim": 64}
_DISTIL: dict[str, Any] = {"vocab_size": 128, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
_IMAGES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_MOE: dict[str, Any] = {**_GROUPED, "num_local_experts": 4, "sliding_window": None}
_T5: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_GPT_OSS: dict[str, Any] = {
    **_GROUPED,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


class UserNet(nn.Module):
    """A convolutional network as a user writes one: residual, pooling, a view in the middle, named with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm_1 = nn.BatchNorm2d(8)
        self.conv_2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm_1(self.conv_1(image)))
        x = self.pool(x + self.conv_2(x))
        return self.head(x.view(x.shape[0], -1))


def _language(config: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _experts(config: Any) -> nn.Module:
    """Experts as a loop of matrix products: torch does not count what its grouped product does."""
    model: Any = _language(config)
    model.set_experts_implementation("eager")
    return model


def _classifier(config: Any) -> nn.Module:
    return transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")


def _sequences(config: Any) -> nn.Module:
    return transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")


def _image_classifier(config: Any) -> nn.Module:
    return transformers.AutoModelForImageClassification.from_config(config, attn_implementation="eager")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _language(transformers.LlamaConfig(**_GROUPED)),
    "mistral": lambda: _language(transformers.MistralConfig(**_GROUPED, sliding_window=6)),
    "qwen2": lambda: _language(transformers.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: _language(transformers.Qwen3Config(**_GROUPED)),
    "gemma3": lambda: _language(transformers.Gemma3TextConfig(**_GROUPED, sliding_window=6)),
    "phi3": lambda: _language(transformers.Phi3Config(**_PHI3)),
    "gpt2": lambda: _language(transformers.GPT2Config(**_GPT2)),
    "opt": lambda: _language(transformers.OPTConfig(**_OPT)),
    "bert": lambda: _classifier(transformers.BertConfig(**_TEXT)),
    "roberta": lambda: _classifier(transformers.RobertaConfig(**{**_TEXT, "pad_token_id": 1})),
    "distilbert": lambda: _classifier(transformers.DistilBertConfig(**_DISTIL)),
    "t5": lambda: _sequences(transformers.T5Config(**_T5)),
    "vit": lambda: _image_classifier(transformers.ViTConfig(**_IMAGES)),
    "resnet": lambda: _image_classifier(
        transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    ),
    "mlp": lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)),
    "user_cnn": UserNet,
}
"""The models that must be bit-identical, as the front end's tests run them."""

MORE: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: _experts(transformers.MixtralConfig(**_MOE)),
    "gpt_oss": lambda: _experts(transformers.GptOssConfig(**_GPT_OSS)),
    "falcon": lambda: _language(
        transformers.FalconConfig(**{k: v for k, v in _TEXT.items() if k != "intermediate_size"})
    ),
    "bloom": lambda: _language(transformers.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)),
    "gpt_neox": lambda: _language(transformers.GPTNeoXConfig(**_TEXT)),
}
"""Models beyond those: experts, sinks, attention written inside the model."""


def build(name: str) -> nn.Module:
    """The model with random weights; biases and norms are moved off 0 and 1, where they would hide mistakes."""
    torch.manual_seed(0)
    model = {**MODELS, **MORE}[name]().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return model


def inputs(name: str, batch: int = 2, length: int = 10, *, padded: bool = True) -> dict[str, Tensor]:
    """Inputs by name; the first row of tokens is padded by three on the left, so that whole rows are masked."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    if name == "mlp":
        return {"input": torch.randn(batch, 16, generator=generator)}
    if name == "user_cnn":
        return {"image": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name in ("vit", "resnet"):
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    given = {"input_ids": torch.randint(3, 128, (batch, length), generator=generator), "attention_mask": mask}
    if name == "t5":
        given["decoder_input_ids"] = torch.randint(3, 128, (batch, length - 3), generator=generator)
    return given


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Row:
    """One line of the table. `differences` are the largest of any output at each size, 0 where all bits are equal."""

    name: str
    nodes: int
    operations: int
    opaque: tuple[str, ...]
    differences: tuple[float, ...]
    round_trip: bool
    macs: int
    torch_macs: int
    seconds: float

    @property
    def structured(self) -> float:
        """Share of the operations that are declared ones, in percent."""
        return 100 * (1 - len(self.opaque) / self.operations)

    @property
    def structured_macs(self) -> float:
        """Share of the multiply-accumulates that torch counts in the eager model, in percent."""
        return 100 * self.macs / self.torch_macs


def measure(name: str) -> Row:
    """Capture, import and run one model, against eager torch."""
    model, example = build(name), inputs(name)
    start = time.process_time()
    program = capture(model, example)
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    module = import_program(simplify(program))
    seconds = time.process_time() - start
    module.verify()
    text = str(module)
    again = parse_module(text)
    run = Interpreter(again, WeightStore.from_state_dict({**model.state_dict(), **constants(program)}))
    operations = [op for op in body(again).ops if isinstance(op, Operation) and not isinstance(op, _NO_WORK)]
    shapes = shapes_of(again, [tuple(tensor.shape) for tensor in example.values()])
    return Row(
        name,
        nodes,
        len(operations),
        tuple(op.target.data for op in operations if isinstance(op, AtenOp)),
        tuple(_difference(model, run, given) for given in (example, inputs(name, 3, 17))),
        str(again) == text,
        sum(op.macs(shapes.__getitem__) for op in operations),
        _torch_macs(model, example),
        seconds,
    )


_NO_WORK = (ParameterOp, SizeOp, SymOp)


def _difference(model: nn.Module, run: Interpreter, given: dict[str, Tensor]) -> float:
    with torch.no_grad():
        expected = tensors(model(**given))
    got = run(*given.values())
    assert len(expected) == len(got), f"{len(expected)} outputs, the module gives {len(got)}"
    return max(0.0 if torch.equal(a, b) else (a - b).abs().max().item() for a, b in zip(expected, got, strict=True))


def _torch_macs(model: nn.Module, given: dict[str, Tensor]) -> int:
    """Multiply-accumulates of the eager model: torch counts two floating-point operations for each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**given)
    return counter.get_total_flops() // 2


def capture_table(names: Iterable[str] = (*MODELS, *MORE)) -> str:
    """The table in Markdown."""
    lines = [
        "| model | FX nodes | operations | equal to eager, 2 x 10 and 3 x 17 | text round trip | operations structured "
        "| MACs structured | opaque operators | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in map(measure, names):
        equal = ", ".join("every bit" if difference == 0 else f"to {difference:.1e}" for difference in row.differences)
        opaque = " ".join(sorted({name.removeprefix("aten.").split(".")[0] for name in row.opaque})) or "-"
        lines.append(
            f"| {row.name} | {row.nodes} | {row.operations} | {equal} | {'yes' if row.round_trip else 'no'} "
            f"| {row.structured:.0f} % | {row.structured_macs:.1f} % | {opaque} | {row.seconds:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(capture_table(sys.argv[1:] or (*MODELS, *MORE)))
