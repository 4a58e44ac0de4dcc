"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

os.environ["GIGATOME_INDEX_CACHE"] = ""  # the user's cache folder is left alone

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--parity-dir", type=Path, default=Path(__file__).parent / "parity" / "reference")
    parser.addoption("--parity-seed", type=int, default=0, help="case seed the reference outputs were made with")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch computes in one thread, as what is compared bit for bit must, and many small steps are fastest."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real slides, which only the project's developers have."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the developers' real slides are not on this machine")
    return folder
