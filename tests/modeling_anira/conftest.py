"""The tests of the model, on a CPU, or on a GPU: `ANIRA_TEST_DEVICE=cuda python -m pytest tests/modeling_anira`."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def tests_device() -> Iterator[None]:
    """That the model's own code names a device wherever it makes a tensor is tested in test_devices.py."""
    device = os.environ.get("ANIRA_TEST_DEVICE")
    if device:
        torch.set_default_device(device)
    yield
    if device:
        torch.set_default_device(None)
