"""Kernel tests run on a GPU where there is one, else through Triton's interpreter, small cases only."""

from __future__ import annotations

import os

import pytest
import torch

os.environ["HF_ASENTMAX_LISTS"] = "1"  # both regimes are tested; lists are off by default

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    ran = sum("gpu" in report.keywords for report in reports)
    terminalreporter.write_line(f"kernel tests marked gpu that ran: {ran}; device: {DEVICE}")
