"""Kernel tests run on a GPU where there is one, else through Triton's interpreter, small cases only."""

from __future__ import annotations

import pytest
import torch

from hf_asentmax.kernels import launching

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def forget_launches() -> None:
    """Tests change constants on which launches depend."""
    launching.forget()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    ran = sum("gpu" in report.keywords for report in reports)
    terminalreporter.write_line(f"kernel tests marked gpu that ran: {ran}; device: {DEVICE}")
