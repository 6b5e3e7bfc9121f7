"""What multiplies and adds codes on a processor: one vector operation that sums a few products into each lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from xdsl.dialects import llvm
from xdsl.dialects.builtin import VectorType, f32, f64, i8, i16, i32

if TYPE_CHECKING:
    from xdsl.ir import Attribute, SSAValue

    from ..lowering import Writer

PANEL = 16
"""Columns of the result that one panel of packed weights makes: lanes are columns."""

Codes = Literal["i8", "i16", "f64"]
"""How the codes of activations lie in memory."""

CODE_BYTES: dict[Codes, int] = {"i8": 1, "i16": 2, "f64": 8}


@dataclass(frozen=True)
class Datapath:
    """One way to sum products of codes: in i32 of integers, or in f64 of any elements.

    bits: the width of its registers. depth: products summed into one lane at once. codes: the type of activation
    codes. unsigned: whether weights are unsigned bytes, which carry an offset. needs: the processor's features, by
    LLVM's names, without which LLVM ends the process. tile: rows and panels held in registers, as measured.
    intrinsic: the operation's name; it adds to a sum where `accumulates`, else a sum is added after it.
    """

    name: str
    bits: int
    depth: int
    codes: Codes
    needs: frozenset[str]
    tile: tuple[int, int]
    intrinsic: str = ""
    accumulates: bool = True
    unsigned: bool = False

    @property
    def is_integer(self) -> bool:
        return self.codes != "f64"

    @property
    def lanes(self) -> int:
        """Sums in one register."""
        return self.bits // (32 if self.is_integer else 64)

    @property
    def parts(self) -> int:
        """Registers that hold one row of a panel."""
        return PANEL // self.lanes

    @property
    def sums(self) -> VectorType:
        return VectorType(i32 if self.is_integer else f64, [self.lanes])

    @property
    def factors(self) -> VectorType:
        """The type of both factors: as many codes as products are formed."""
        element: dict[Codes, Attribute] = {"i8": i8, "i16": i16, "f64": f64}
        return VectorType(element[self.codes], [self.lanes * self.depth])

    def spread(self, writer: Writer, pointer: SSAValue) -> SSAValue:
        """As many codes of a row of activations as one lane takes, in every lane."""
        if not self.is_integer:
            return writer.spread(writer.load(pointer, f64), self.lanes)
        words = writer.spread(writer.load(pointer, i32), self.lanes)
        return writer.add(llvm.BitcastOp(words, self.factors))

    def packed(self, bits: int) -> VectorType:
        """What one register of packed weights of so many bits is loaded as."""
        match self.codes:
            case "i8":
                return self.sums
            case "i16":
                return VectorType(i8 if bits == 8 else i16, [self.lanes * 2])
        return VectorType(f32, [self.lanes])

    def dot(self, writer: Writer, sums: SSAValue, weights: SSAValue, codes: SSAValue) -> SSAValue:
        """`sums` plus the products of `weights` and `codes`, `depth` of them in each lane."""
        if not self.is_integer:
            return writer.intrinsic("llvm.fma", [weights, codes, sums], self.sums)
        arguments = [sums, weights, codes] if self.accumulates else [weights, codes]
        products = writer.add(llvm.CallIntrinsicOp(self.intrinsic, arguments, [self.sums]))
        return products if self.accumulates else writer.add(llvm.AddOp(sums, products))

    def to_f32(self, writer: Writer, sums: SSAValue) -> SSAValue:
        """The sums, each rounded to f32."""
        kind = VectorType(f32, [self.lanes])
        return writer.add(llvm.SIToFPOp(sums, kind) if self.is_integer else llvm.FPTruncOp(sums, kind))


def _needs(*features: str) -> frozenset[str]:
    return frozenset(features)


BYTES: Sequence[Datapath] = (
    Datapath(
        "avx512vnni",
        512,
        4,
        "i8",
        _needs("avx512vnni", "avx512bw", "avx512f"),
        (5, 2),
        "llvm.x86.avx512.vpdpbusd.512",
        unsigned=True,
    ),
    Datapath(
        "avxvnni", 256, 4, "i8", _needs("avxvnni", "avx2", "fma"), (3, 1), "llvm.x86.avx512.vpdpbusd.256", unsigned=True
    ),
    Datapath("dotprod", 128, 4, "i8", _needs("dotprod"), (4, 1), "llvm.aarch64.neon.sdot.v4i32.v16i8"),
)
"""For codes of one byte on both sides, the widest first."""

WORDS: Sequence[Datapath] = (
    Datapath(
        "avx512vnni-words",
        512,
        2,
        "i16",
        _needs("avx512vnni", "avx512bw", "avx512f"),
        (5, 2),
        "llvm.x86.avx512.vpdpwssd.512",
    ),
    Datapath("avx512bw", 512, 2, "i16", _needs("avx512bw", "avx512f"), (4, 2), "llvm.x86.avx512.pmaddw.d.512", False),
    Datapath("avx2", 256, 2, "i16", _needs("avx2", "fma"), (4, 1), "llvm.x86.avx2.pmadd.wd", False),
)
"""For codes of two bytes, and for those of one byte where nothing sums bytes."""

DOUBLES: Sequence[Datapath] = (
    Datapath("avx512f-f64", 512, 1, "f64", _needs("avx512f"), (4, 3)),
    Datapath("fma-f64", 256, 1, "f64", _needs("fma", "avx2"), (3, 1)),
    Datapath("neon-f64", 128, 1, "f64", _needs("neon"), (2, 1)),
)
"""For elements with more digits, whose products f64 sums exactly."""


def available(features: frozenset[str], codes: Codes) -> Datapath | None:
    """The widest datapath of a processor for codes of a type; bytes may also go through words."""
    ways = {"i8": (*BYTES, *WORDS), "i16": WORDS, "f64": DOUBLES}[codes]
    return next((way for way in ways if features >= way.needs), None)


def named(name: str) -> Datapath:
    """The datapath of a name."""
    return next(way for way in (*BYTES, *WORDS, *DOUBLES) if way.name == name)
