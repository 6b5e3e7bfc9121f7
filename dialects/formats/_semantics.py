"""The IEEE formats that xDSL describes without a `FloatSemantics`."""

from xdsl.dialects.builtin import FloatSemantics

BF16 = FloatSemantics(exponent_bits=8, mantissa_bits=7, exponent_bias=127)
F16 = FloatSemantics(exponent_bits=5, mantissa_bits=10, exponent_bias=15)
F32 = FloatSemantics(exponent_bits=8, mantissa_bits=23, exponent_bias=127)
