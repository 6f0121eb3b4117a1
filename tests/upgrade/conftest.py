from __future__ import annotations

import pytest

from tests.upgrade.previous import Release, build


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The previous release, built once."""
    return build(tmp_path_factory.mktemp("previous"))
