"""How the paths of restarts are read."""

from __future__ import annotations

import pytest
import torch

from bench.restart import COLUMNS, at_last_passage, path_of


def test_a_run_that_ended_sooner_stays_where_it_ended():
    rows = [
        {c: 10.0 * part + k for c in COLUMNS} | {"iterate": float(k), "part": part, "animal": "fox"}
        for part, length in ((0, 2), (1, 3))
        for k in range(length)
    ]
    images, path = path_of(rows)
    assert images == [(0, "fox"), (1, "fox")]
    assert path[0].tolist() == [[0, 10], [1, 11], [1, 12]]


def test_a_path_is_read_at_its_last_passage():
    rewards = torch.tensor([0.0, 2.0, 0.0, 2.0, 1.0])
    path = torch.stack([torch.arange(5.0), rewards])
    assert at_last_passage(path, 1.5) == pytest.approx([2.75, 1.5])
    assert at_last_passage(path, 3.0) is None
