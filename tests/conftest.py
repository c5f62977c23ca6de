"""What tests share: hypothesis keeps no clock and no database; the files that take longest are the first to start."""

import hypothesis
import pytest

hypothesis.settings.register_profile("default", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("default")

# one worker takes a whole file, so that what its fixtures compile is compiled once; with short files last, workers end together
LONGEST = ["sanitizers", "numerics", "training", "layer", "cuda_on_host", "triton_compile"]
LONGEST += ["strips_on_host", "triton_interpreter", "axial_conv"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
