"""``benchmarks/published_bandwidth.py`` against the published table."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import published_bandwidth as bandwidth
from benchmarks.published_bandwidth import GRID, METHODS, PRESETS, PUBLISHED, places_in_grid, preset_table, printed

LABELS = [printed(float(value)) for value in GRID]


def test_the_published_table():
    distances = [
        min(abs(place - other) for other, label in enumerate(LABELS) if label == cell)
        for model, rows in PUBLISHED.items()
        for method, cells in rows.items()
        for place, cell in zip(places_in_grid(PRESETS[model], method), cells, strict=True)
    ]
    assert len(distances) == 75
    assert max(distances) <= 1
    assert distances.count(0) == 69


def test_every_published_number_is_of_the_grid():
    assert {cell for rows in PUBLISHED.values() for cells in rows.values() for cell in cells} <= set(LABELS)
    # Twice rounded, and not once: 0.954 is 0.95 and that is 0.9.
    assert printed(0.9541) == 0.9


@pytest.mark.parametrize("model", PRESETS)
def test_order_of_methods(model: str):
    table = preset_table(model)
    assert list(table) == list(METHODS)
    for better, worse in zip(METHODS[1:], METHODS, strict=False):
        assert all(one <= other for one, other in zip(table[better], table[worse], strict=True))
    for row in table.values():
        assert list(row) == sorted(row)


@pytest.mark.parametrize("method", METHODS)
def test_utilization_grows_with_the_bandwidth(method: str):
    shares = bandwidth.utilization_of(PRESETS["1b"], method, GRID)
    assert (np.diff(shares) >= -1e-12).all()
    assert 0 < shares[0] < shares[-1] <= 1 + 1e-12


def test_sequential_fragments_need_more():
    """Figure 7's effect: their layers are next to one another, so that what is waited for comes at once."""
    preset = PRESETS["100b"]
    strided, sequential = (places_in_grid(preset, "streaming", strided=one) for one in (True, False))
    assert all(one <= other for one, other in zip(strided, sequential, strict=True))
    assert (LABELS[strided[-1]], LABELS[sequential[-1]]) == (19.3, 33.9)


def test_data_parallel_at_infinite_speed_is_compute():
    shares = bandwidth.utilization_of(PRESETS["1b"], "data_parallel", np.array([1e9]))
    assert shares[0] == pytest.approx(1.0, abs=1e-6)
    # At a crawl the link is all there is: 16 bits a parameter in each step.
    share = bandwidth.utilization_of(PRESETS["1b"], "data_parallel", np.array([1.0]))[0]
    assert share == pytest.approx(0.1 / (16e9 * 1.02 / 1e9), rel=0.01)
