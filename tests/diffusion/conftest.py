"""Every test here needs diffusers."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
