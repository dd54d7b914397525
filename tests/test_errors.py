"""Errors as they reach another process."""

from __future__ import annotations

import pickle

from megatron_m1.errors import ConfigError


def test_a_configuration_error_keeps_its_problems_on_the_way() -> None:
    arrived = pickle.loads(pickle.dumps(ConfigError(["one is wrong", "two too"])))
    assert arrived.problems == ["one is wrong", "two too"]
    assert str(arrived) == "one is wrong\ntwo too"
