from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import Pool
from tests.inference.trained import train_and_save


@pytest.fixture(scope="package")
def checkpoint(ranks: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = ranks(1).run(train_and_save, str(tmp_path_factory.mktemp("run")))
    return path
