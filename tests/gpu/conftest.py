"""What holds for every test on a GPU: the compiled kernels ran, and nothing else did."""

from __future__ import annotations

from pathlib import Path

import pytest

from zscore_kernels import backend_calls

HERE = Path(__file__).resolve().parent
SKIPPED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped:
        item.stash[SKIPPED] = True
    return report


@pytest.fixture(autouse=True)
def took_the_kernels(request):
    """Every test here fails if a call on CUDA took another path than the compiled kernels, or launched none."""
    before = backend_calls.copy()
    yield
    if request.node.stash.get(SKIPPED, False):  # half-way, for want of memory or of a second GPU
        return
    ran = {path for path, _ in backend_calls - before}
    assert "triton" in ran, "no kernel ran"
    assert ran == {"triton"}, "a GPU path took the reference"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.filterwarnings("ignore:.*FP_FUSION:UserWarning"))  # triton 3.9
