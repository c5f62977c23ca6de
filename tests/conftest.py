"""What tests share: hypothesis keeps no clock and no database; a file whose fixtures take long to make runs in one worker."""

import hypothesis
import pytest

hypothesis.settings.register_profile("default", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("default")

WHOLE = {"test_cuda_on_host", "test_sanitizers", "test_strips_on_host", "test_training", "test_triton_compile", "test_triton_interpreter"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in WHOLE:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
