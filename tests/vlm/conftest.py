"""Every test here needs transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
