"""Fixtures of the data tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitnet.data.datamodule import TokenDataModule
from bitnet.data.tokens import TokenStore


@pytest.fixture
def run_prepare(tmp_path: Path) -> Callable[..., TokenStore]:
    """Prepare tokens of a path with small settings, in a cache of this test."""

    def prepare(path: Path | str | list[str], **options: Any) -> TokenStore:
        settings = {"vocab_size": 300, "seq_len": 16, "batch_size": 2, "cache_dir": str(tmp_path / "cache"), **options}
        return TokenDataModule(path if isinstance(path, list) else str(path), **settings).prepare_tokens()

    return prepare
