"""Settings and fixtures of all tests: offline, one thread, seeded, and the log of transformers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

# Set before transformers is imported: no test uses the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, which must be chosen before anything imports Triton (transformers does).
    os.environ["TRITON_INTERPRET"] = "1"

from transformers.utils import logging

from tiny_models import FAMILIES

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerator_from_another_test() -> Iterator[None]:
    """accelerate keeps one state per process and refuses a second one with other settings."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each model family in turn."""
    return str(request.param)


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    """The messages that transformers and the plugin log during the test, including those logged once per process."""
    import logging as python_logging

    messages: list[str] = []

    class Collect(python_logging.Handler):
        def emit(self, record: python_logging.LogRecord) -> None:
            messages.append(record.getMessage())

    def forget_warned_once() -> None:
        for name in ("warning_once", "info_once"):
            getattr(getattr(python_logging.Logger, name, None), "cache_clear", lambda: None)()

    handler: Any = Collect(level=python_logging.INFO)
    level = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.add_handler(handler)
    ours = python_logging.getLogger("hf_asentmax")
    ours.addHandler(handler)
    forget_warned_once()
    yield messages
    ours.removeHandler(handler)
    logging.remove_handler(handler)
    logging.set_verbosity(level)
