"""What torch says of itself while a model is captured is silent; what the model's code says is passed on."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mxloom.compiler._quiet import quiet_torch
from mxloom.compiler.capture import CaptureError, capture

PROGRAM = """
import sys
import torch
from torch import nn
from mxloom.compiler.capture import CaptureError, capture

class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

class Sliced(nn.Module):
    def forward(self, x):
        return x[: x.sum().int().item()]

class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = kind(8, 8, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]

recurrent = [Recurrent(kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)]
for model in (Branch(), Sliced(), *recurrent):
    try:
        capture(model, {"x": torch.ones(2, 4, 8)}, dynamic=False)
        print("captured")
    except CaptureError:
        print("refused")
"""


def test_capturing_prints_nothing(tmp_path: Path) -> None:
    """Only our error is there to be shown: torch's loggers and warnings would come before it."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    links = Path(__file__).parents[2] / ".links"
    environment = {"PYTHONPATH": str(links), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, timeout=120)
    assert result.stderr == ""
    assert result.stdout.split() == ["refused", *["captured"] * 4]


class Warns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("the model's own", stacklevel=1)
        return x + 1


def test_a_warning_of_the_models_code_is_passed_on_once() -> None:
    with pytest.warns(UserWarning, match="the model's own") as caught:
        capture(Warns(), {"x": torch.zeros(2, 3)})
    assert [warning.filename for warning in caught] == [__file__]


def test_warnings_that_are_errors_do_not_break_torch() -> None:
    """torch warns when it captures an LSTM; under the filter "error" the warning must not stop the capture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(nn.LSTM(4, 4), {"input": torch.zeros(2, 3, 4)}, dynamic=False)


def test_the_log_of_torch_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each logger of torch has its handlers and they their filters, after a failure too; TORCH_LOGS keeps them open."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    record = logger.makeRecord(logger.name, logging.WARNING, __file__, 1, "said", (), None)
    try:
        with quiet_torch():
            assert not handler.filter(record)
        assert handler.filter(record)
        with pytest.raises(CaptureError), quiet_torch():
            raise CaptureError("it failed")
        assert handler.filter(record)
        monkeypatch.setenv("TORCH_LOGS", "dynamic")
        with quiet_torch():
            assert handler.filter(record)
    finally:
        logger.removeHandler(handler)
