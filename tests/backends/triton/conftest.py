"""Kernel tests run on a GPU where there is one, else through Triton's interpreter, small cases only."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from hf_asentmax.backends.triton import operators as op
from hf_asentmax.backends.triton import row_products
from hf_asentmax.backends.triton.common import launching
from hf_asentmax.backends.triton.decode import operator as decode_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and importlib.util.find_spec("triton") is not None:  # not everywhere: tests then skip
    import interpreted_bfloat16

    interpreted_bfloat16.mend()


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def every_call_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each call is made, made again with a record, and repeated from it, whose results are looked at."""
    launching.forget()  # tests change constants on which launches depend
    if DEVICE == "cuda":

        def thrice(*arguments: Any) -> Any:
            for _ in range(2):
                launching.run(*arguments)
            return launching.run(*arguments)

        for module in (op, decode_op, row_products):
            monkeypatch.setattr(module, "run", thrice)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    ran = sum("gpu" in report.keywords for report in reports)
    terminalreporter.write_line(f"kernel tests marked gpu that ran: {ran}; device: {DEVICE}")
