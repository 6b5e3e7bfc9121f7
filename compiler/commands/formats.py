"""List the named number formats with their bits per element (scales included), scale rule, type and note.

A recipe takes these names, `fixed<width,fraction>`, and the text of any type, such as "!mx.block<64xf4E2M1FN>".

With --kernel print the code that rounds into a format instead: in mlir, llvm (what runs on CPUs), triton (on GPUs) or
torch.

  mxloom formats
  mxloom formats --kernel triton mxfp4
"""

import argparse

from . import _json

summary = "list the number formats"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", nargs=2, metavar=("LANGUAGE", "FORMAT"), help="print a format's kernel")
    _json.add_option(parser)


def run(args: argparse.Namespace) -> int:
    if args.kernel is not None:
        from ...backends.kernels.emitters.text import kernel_text

        print(kernel_text(*args.kernel), end="")
        return 0
    from ...dialects.numbers import formats

    _json.write([_entry(instance) for instance in formats().values()]) if args.json else print(formats())
    return 0


def _entry(instance: object) -> dict[str, object]:
    fields = ("name", "bits", "default_scale_rule", "text", "note", "source")
    return {field: getattr(instance, field) for field in fields}
