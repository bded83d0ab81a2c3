"""The tiny Llama that many tests patch, and a module without gradients."""

from __future__ import annotations

import pytest
import torch

import tokred


@pytest.fixture(scope="module")
def no_grad():
    """Ask for it by ``pytestmark = pytest.mark.usefixtures("no_grad")``."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def built():
    """One model for all tests of a module; :func:`model` hands it out."""
    from tests.kv.tiny import build

    return build("llama")


@pytest.fixture
def model(built):
    """Patched by whoever has it, and as it was afterwards."""
    yield built
    tokred.remove(built)
