"""What every test finds: no network, torchvision importable, vLLM tests in one process, the shared pictures."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before anything reads them, and inherited by every process that a test starts.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for name in (
    "ZSCORE_MODEL",
    "ZSCORE_DEBUG",
    "PYTHONDONTWRITEBYTECODE",
):  # the last costs 6 s a process that loads torch
    os.environ.pop(name, None)


def pytest_configure() -> None:
    from zscore._torchvision import ensure_importable

    ensure_importable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # First, because vLLM's start-up trips over Flask's proxies once moto has been imported in its process.
    items.sort(key=lambda item: item.get_closest_marker("vllm") is None)
    for item in items:
        if item.get_closest_marker("vllm"):  # one engine at a time: each takes all cores and gigabytes
            item.add_marker(pytest.mark.xdist_group("vllm"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real shards and ratings that lie beside a checkout, not in it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder.parent.name}/{folder.name} isn't beside the checkout")
    return folder


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that reasons (tests.trainers.talker); trained once, whichever process comes first.

    Its folder has the world it learned, for all processes to read and none to write.
    """
    from tests.trainers.talker import make

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with (shared / "talker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = shared / "talker" / "model" / "zscore.json"
        if not done.exists():
            (shared / "talker").mkdir(exist_ok=True)
            make(shared / "talker")
    return done.parent
