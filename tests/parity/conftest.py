"""One random checkpoint of each variant, written once per test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from parity.random_models import VARIANTS, favour_skip, write_checkpoint
from zaya_convert.checkpoint import Checkpoint, open_source


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=sorted(VARIANTS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One checkpoint of each variant; every eighth token or so takes the skip expert."""
    folder = tmp_path_factory.mktemp("parity") / request.param
    config = VARIANTS[request.param]
    return open_source(write_checkpoint(folder, config, seed=3, change=favour_skip(config, 0.15)))
