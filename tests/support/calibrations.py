"""A calibration to save, to refuse and to choose levels by."""

from __future__ import annotations

import math

from edgecloud_sd.forecast.budgets import LevelCost
from edgecloud_sd.forecast.calibration import Calibration, Conditions

CALIBRATION = Calibration(
    "zh.yaml",
    Conditions(
        pair="pocket",
        edge_weights="12e34",
        cloud_weights="2b",
        edge_dtype="float32",
        cloud_dtype="float32",
        language="chinese",
        prompt="3c",
        strategy="speculative-risk_f0-k1-greedy",
        max_new_tokens=64,
    ),
    ("a", "010", "~", "d"),
    (LevelCost(-1.0, 2.1, 0.07), LevelCost(0.1 + 0.2, 1.0, 0.03)),
    (0.5, 0.25, math.inf, 5e-324 + 0.75),
)
