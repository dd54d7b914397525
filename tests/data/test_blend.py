from __future__ import annotations

import numpy as np
import pytest

from megatron_m1.data.blend import Blend


def test_each_source_stays_within_one_sample_of_its_share():
    weights = [5, 0.5, 2.5]
    blend = Blend(weights)
    counts = np.zeros(3)
    for i in range(500):
        source, within = blend.locate(i)
        assert within == counts[source]  # a source's samples come in order, none left out
        counts[source] += 1
        assert np.abs(counts - (i + 1) * np.array(weights) / 8).max() <= 1


def test_far_samples_agree_with_a_walk():
    walked = Blend([1, 2])
    sequence = [walked.locate(i) for i in range(5000)]
    assert Blend([1, 2]).locate(4999) == sequence[4999]
    jumped = Blend([1, 2])
    jumped.locate(4000)
    assert [jumped.locate(i) for i in range(5000)] == sequence


def test_one_source_takes_all():
    assert Blend([0.3]).locate(10**12) == (0, 10**12)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_unfit_weights(weights):
    with pytest.raises(ValueError, match="blend weights are"):
        Blend(weights)
