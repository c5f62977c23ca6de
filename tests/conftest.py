"""What tests share: hypothesis keeps no clock and no database; the files that take longest are the first to start."""

import hypothesis
import pytest

hypothesis.settings.register_profile("default", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("default")

# one worker takes a whole file, so that what its fixtures compile is compiled once; with short files last, workers end together
LONGEST = ("test_sanitizers", "test_cuda_on_host", "test_strips_on_host", "test_numerics", "test_nvcc", "test_triton_compile", "test_layer")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
