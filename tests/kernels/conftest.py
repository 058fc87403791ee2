"""Kernel tests run on a GPU where there is one, else through Triton's interpreter, small cases only."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any test module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    ran = sum("gpu" in report.keywords for report in reports)
    terminalreporter.write_line(f"kernel tests marked gpu that ran: {ran}; device: {DEVICE}")
