"""Every rule against torch's for-loop."""

from __future__ import annotations

SHAPES = [(), (1,), (5,), (17, 33), (0, 3), (4099,), (2, 3, 4, 5)]
