"""What the verifier refuses, in words that say what was expected and what came."""

import pytest
from xdsl.utils.exceptions import ParseError, VerifyException

from mxloom.dialects.mx import parse_module

REFUSED = {
    "linear: width": (
        "mx.linear %x, %w : (tensor<2x64xf32>, tensor<32x96xf32>) -> tensor<2x32xf32>",
        "mx.linear: weight [32, 96] sums over 96 values, but the input [2, 64] ends in 64",
    ),
    "linear: result": (
        "mx.linear %x, %w : (tensor<2x64xf32>, tensor<32x64xf32>) -> tensor<2x64xf32>",
        "mx.linear: the operands give a result of shape [2, 32], but its type says [2, 64]",
    ),
    "linear: bias": (
        "mx.linear %x, %w, %b : (tensor<2x64xf32>, tensor<32x64xf32>, tensor<64xf32>) -> tensor<2x32xf32>",
        "mx.linear: the bias must be [32], got [64]",
    ),
    "linear: transposed": (
        "mx.linear %x, %w, %b, transposed : (tensor<5x2x64xf32>, tensor<64x32xf32>, tensor<32xf32>) "
        "-> tensor<5x2x32xf32>",
        "mx.linear: transposed and with a bias, it needs a matrix as input, got [5, 2, 64]",
    ),
    "matmul": (
        "mx.matmul %x, %w : (tensor<2x64xf32>, tensor<32x64xf32>) -> tensor<2x64xf32>",
        "mx.matmul: [2, 64] times [32, 64]: the first ends in 64, the second sums over 32",
    ),
    "conv: channels": (
        "mx.conv %x, %w : (tensor<2x4x8x8xf32>, tensor<8x3x3x3xf32>) -> tensor<2x8x6x6xf32>",
        "mx.conv: weight [8, 3, 3, 3] in 1 groups reads 3 channels, but the input [2, 4, 8, 8] has 4",
    ),
    "conv: padding": (
        "mx.conv %x, %w, padding = [1, 1] : (tensor<2x3x8x8xf32>, tensor<8x3x3x3xf32>) -> tensor<2x8x6x6xf32>",
        "mx.conv: the operands give a result of shape [2, 8, 8, 8], but its type says [2, 8, 6, 6]",
    ),
    "attention: heads": (
        "mx.attention %x, %w, %b, scale = 1.0 : (tensor<2x4x5x8xf32>, tensor<2x3x5x8xf32>, tensor<2x3x5x8xf32>) "
        "-> tensor<2x4x5x8xf32>",
        "mx.attention: 4 query heads do not share 3 key heads evenly",
    ),
    "attention: width": (
        "mx.attention %x, %w, %b, scale = 1.0 : (tensor<2x4x5x8xf32>, tensor<2x2x5x6xf32>, tensor<2x2x5x8xf32>) "
        "-> tensor<2x4x5x8xf32>",
        "mx.attention: query [2, 4, 5, 8] and key [2, 2, 5, 6] must have one width, the last dimension",
    ),
    "attention: padding": (
        "mx.attention %x, %w, %b, %m, scale = 1.0 : (tensor<2x4x5x8xf32>, tensor<2x2x5x8xf32>, "
        "tensor<2x2x5x8xf32>, tensor<2x9xi1>) -> tensor<2x4x5x8xf32>",
        "mx.attention: padding must be [batch, key positions] [2, 5], got [2, 9]",
    ),
    "rope": (
        "mx.rope %x, %w, %b, halves : (tensor<2x4x5x8xf32>, tensor<5x8xf32>, tensor<5x8xf32>) -> tensor<2x4x5x8xf32>",
        "mx.rope: an input of width 8 needs cos and sin of width 4, got [5, 8]",
    ),
    "rms_norm": (
        "mx.rms_norm %x, %w, eps = 1.0e-06 : (tensor<2x64xf32>, tensor<32xf32>) -> tensor<2x64xf32>",
        "mx.rms_norm: the weight must be [64], got [32]",
    ),
    "layer_norm": (
        "mx.layer_norm %x, normalized_shape = [32] : (tensor<2x64xf32>) -> tensor<2x64xf32>",
        "mx.layer_norm: the input [2, 64] does not end in the normalized shape [32]",
    ),
    "softmax": (
        "mx.softmax %x, dim = 2 : (tensor<2x64xf32>) -> tensor<2x64xf32>",
        "mx.softmax: dim 2 is not one of 2 dimensions",
    ),
    "add": (
        "mx.add %x, %w : (tensor<2x64xf32>, tensor<3x64xf32>) -> tensor<2x64xf32>",
        "mx.add: [2, 64] and [3, 64] do not broadcast",
    ),
    "add: both": (
        "mx.add %x, %w, scalar = 1.0 : (tensor<2x64xf32>, tensor<2x64xf32>) -> tensor<2x64xf32>",
        "mx.add: needs one second operand: either a tensor or scalar = number",
    ),
    "reshape": (
        "mx.reshape %x, shape = [3, 64] : (tensor<2x64xf32>) -> tensor<3x64xf32>",
        "mx.reshape: [2, 64] holds 128 elements, [3, 64] 192",
    ),
    "transpose": (
        "mx.transpose %x, dim0 = 0, dim1 = 3 : (tensor<2x64xf32>) -> tensor<64x2xf32>",
        "mx.transpose: dimension 3 is not one of the 2 there are",
    ),
    "permute": (
        "mx.permute %x, dims = [0, 0] : (tensor<2x64xf32>) -> tensor<2x2xf32>",
        "mx.permute: [0, 0] does not name each of 2 dimensions once",
    ),
    "concat": (
        "mx.concat [%x, %w], dim = 1 : (tensor<2x64xf32>, tensor<3x64xf32>) -> tensor<2x128xf32>",
        "mx.concat: [2, 64] and [3, 64] differ outside dimension 1",
    ),
    "split": (
        "mx.split %x, split_sizes = [16, 16], dim = 1 : (tensor<2x64xf32>) -> (tensor<2x16xf32>, tensor<2x16xf32>)",
        "mx.split: parts of [16, 16] do not make up the 64 of [2, 64]",
    ),
    "cast: shape": (
        "mx.cast %x : tensor<2x64xf32> to tensor<2x32xbf16>",
        "mx.cast: the operands give a result of shape [2, 64], but its type says [2, 32]",
    ),
    "cast: scale rule": (
        'mx.cast %x {scale_rule = "evn"} : tensor<2x64xf32> to tensor<2x64x!mx.block<32xf4E2M1FN>>',
        "mx.cast: unknown scale rule 'evn' (did you mean \"even\"?): "
        "one of floor, ceil, even, rceil, absmax, absmean, minmax",
    ),
    "cast: rounding": (
        'mx.cast %x {rounding = "rtne"} : tensor<2x64xf32> to tensor<2x64x!mx.block<32xf4E2M1FN>>',
        "mx.cast: unknown rounding 'rtne' (did you mean \"rne\"?): one of rne, rna, rtz, stochastic",
    ),
    "cast: clip": (
        "mx.cast %x {clip = 0.0} : tensor<2x64xf32> to tensor<2x64x!mx.block<32xf4E2M1FN>>",
        "mx.cast: clip is the part of the largest magnitude that is kept, in (0, 1], got 0.0",
    ),
    "cast: rule of another family": (
        'mx.cast %x {scale_rule = "even"} : tensor<2x64xf32> to tensor<2x64x!mx.block<32xi8, f32>>',
        'mx.cast: scale rule "even" does not fit !mx.block<32xi8, f32>; it takes absmax',
    ),
    "cast: seed": (
        'mx.cast %x {rounding = "stochastic", seed = -1 : i64} : tensor<2x64xf32> to tensor<2x64xf8E4M3FN>',
        "mx.cast: a seed is 0 or more, got -1",
    ),
    "cast: stochastic without a seed": (
        'mx.cast %x {rounding = "stochastic"} : tensor<2x64xf32> to tensor<2x64xf8E4M3FN>',
        "mx.cast: stochastic rounding needs a seed: {seed = 0 : i64}",
    ),
    "rms_norm: eps that is no number": (
        "mx.rms_norm %x, eps = <0x7FF8000000000000 : f64> : (tensor<2x64xf32>) -> tensor<2x64xf32>",
        "mx.rms_norm: eps is a number of 0 or more, got nan",
    ),
    "rms_norm: negative eps": (
        "mx.rms_norm %x, eps = -1.0e-06 : (tensor<2x64xf32>) -> tensor<2x64xf32>",
        "mx.rms_norm: eps is a number of 0 or more, got -1e-06",
    ),
    "layer_norm: infinite eps": (
        "mx.layer_norm %x, normalized_shape = [64], eps = <0x7FF0000000000000 : f64> "
        ": (tensor<2x64xf32>) -> tensor<2x64xf32>",
        "mx.layer_norm: eps is a number of 0 or more, got inf",
    ),
    "aten: unknown": (
        'mx.aten "aten.arrange.default"(%x) {self} : (tensor<2xf32>) -> tensor<2xf32>',
        'mx.aten: operator "aten.arrange.default" is not known to torch',
    ),
    "aten: in place": (
        'mx.aten "aten.relu_.default"(%x) {self} : (tensor<2xf32>) -> tensor<2xf32>',
        'mx.aten: operator "aten.relu_.default" changes its arguments or touches files',
    ),
    "aten: argument": (
        'mx.aten "aten.cos.default"(%x) {input} : (tensor<2xf32>) -> tensor<2xf32>',
        'mx.aten: "aten.cos.default" has no argument input; it has self',
    ),
    "aten: needed argument": (
        'mx.aten "aten.cumsum.default"(%x) {self} : (tensor<2xf32>) -> tensor<2xf32>',
        'mx.aten: "aten.cumsum.default" needs the argument dim',
    ),
    "aten: kind of an argument": (
        'mx.aten "aten.cumsum.default"(%x) {self, dim = "one"} : (tensor<2xf32>) -> tensor<2xf32>',
        'mx.aten: "aten.cumsum.default": its argument dim is int, got "one"',
    ),
    "aten: tensor for a number": (
        'mx.aten "aten.cumsum.default"(%x, %w) {self, dim} : (tensor<2xf32>, tensor<2xf32>) -> tensor<2xf32>',
        'mx.aten: "aten.cumsum.default": its argument dim is int, got an operand of another kind, or none',
    ),
    "aten: too few operands": (
        'mx.aten "aten.atan2.default"(%x) {self, other} : (tensor<2xf32>) -> tensor<2xf32>',
        'mx.aten: "aten.atan2.default": its argument other is Tensor, got an operand of another kind, or none',
    ),
    "aten: too many operands": (
        'mx.aten "aten.cos.default"(%x, %w) {self} : (tensor<2xf32>, tensor<2xf32>) -> tensor<2xf32>',
        'mx.aten: "aten.cos.default": 1 operands stand in no argument; `unit` marks the place of each',
    ),
    "aten: results": (
        'mx.aten "aten.cos.default"(%x) {self} : (tensor<2xf32>) -> (tensor<2xf32>, tensor<2xf32>)',
        'mx.aten: "aten.cos.default" has 1 results, got 2',
    ),
    "sym: unknown": (
        'mx.sym "os.system"(%x) {a0} : (index) -> index',
        'mx.sym: "os.system" is not arithmetic on sizes',
    ),
    "sym: names": (
        'mx.sym "operator.add"(%x) {a0, a2 = 1 : i64} : (index) -> index',
        'mx.sym: "operator.add" has no argument a2; they are called a0, a1, ... without a gap',
    ),
    "sym: count": (
        'mx.sym "operator.add"(%x) {a0} : (index) -> index',
        'mx.sym: "operator.add" does not take 1 arguments',
    ),
    "sym: a tensor": (
        'mx.sym "operator.neg"(%x) {a0} : (tensor<2xf32>) -> index',
        'mx.sym: "operator.neg": its argument a0 is no number',
    ),
    "expert_linear": (
        "mx.expert_linear %x, %w, %b : (tensor<6x64xf32>, tensor<4x16x32xf32>, tensor<6xi64>) -> tensor<6x16xf32>",
        "mx.expert_linear: weight [4, 16, 32] sums over 32 values, but the input [6, 64] ends in 64",
    ),
}


def in_function(operation: str) -> str:
    """The operation inside a function that gives it the operands it names."""
    types = operation.split(" : ")[-1]
    operands = [part for part in ("%x", "%w", "%b", "%m") if part in operation.split(" : ")[0]]
    listed = types[types.index("(") + 1 : types.index(") ->")] if "->" in types else types.split(" to ")[0]
    arguments = ", ".join(f"{o}: {t.strip()}" for o, t in zip(operands, listed.split(", "), strict=True))
    results = "%r, %s" if types.rstrip().endswith(")") else "%r"
    return f"func.func @f({arguments}) {{\n  {results} = {operation}\n  func.return\n}}"


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_operation_is_refused_in_plain_words(case: str) -> None:
    operation, message = REFUSED[case]
    with pytest.raises(VerifyException) as refused:
        parse_module(in_function(operation))
    assert message in str(refused.value)


def test_a_block_that_does_not_fit_the_tensor_is_refused_where_it_stands() -> None:
    with pytest.raises(VerifyException, match=r"rank|dimension|fit"):
        parse_module(in_function("mx.cast %x : tensor<64xf32> to tensor<64x!mx.block<32x32xf4E2M1FN>>"))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (
            "mx.linear %x, %w, bais = %b : (tensor<2x64xf32>, tensor<32x64xf32>, tensor<32xf32>) -> tensor<2x32xf32>",
            "mx.linear has no argument bais; it has input, weight, bias, transposed",
        ),
        (
            "mx.relu %x, %w : (tensor<2x64xf32>, tensor<2x64xf32>) -> tensor<2x64xf32>",
            "mx.relu takes 1 operands at most",
        ),
        (
            "mx.softmax %x, dim = %w : (tensor<2x64xf32>, index) -> tensor<2x64xf32>",
            "mx.softmax takes numbers here, not values",
        ),
    ],
)
def test_text_that_no_operation_has_is_refused(operation: str, message: str) -> None:
    with pytest.raises(ParseError) as refused:
        parse_module(in_function(operation))
    assert message in str(refused.value)
