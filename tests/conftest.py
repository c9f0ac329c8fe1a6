"""What all tests share: the --full switch, the real-audio folder, and a count of the tests that used it."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT / "out" / ".real_audio_tests"  # one line per test that used real audio, whatever process ran it


def real_data_root() -> Path | None:
    "The folder of labelled audio: AASP_DATA, or a `shared/data` folder beside the checkout where there is one."
    for place in (os.environ.get("AASP_DATA"), ROOT.parent / "shared" / "data"):
        if place and Path(place).is_dir(): return Path(place)
    return None


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the long tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs only with --full")
    config.addinivalue_line("markers", "data: needs real audio (AASP_DATA)")
    config.addinivalue_line("markers", "cuda: needs a GPU")
    config.addinivalue_line("markers", "browser: needs chromium")


def pytest_collection_modifyitems(config, items):
    import torch
    for item in items:
        if "slow" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="SKIPPED: slow, run with --full (make test-full)"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="SKIPPED: no GPU"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    "Manifest of twenty generated clips of 0.6 s; never changed."
    from aasp_nb.clips import write_clips
    return write_clips(tmp_path_factory.mktemp("clips"), per_class=2, seed=0, seconds=0.6)


@pytest.fixture(scope="session")
def labelled_clips(tmp_path_factory) -> Path:
    "Manifest of sixty generated clips of 0.5 s with train, valid and test; never changed."
    from aasp_nb.clips import write_clips
    return write_clips(tmp_path_factory.mktemp("labelled"), per_class=6, seed=0, seconds=0.5)


@pytest.fixture
def real_data(request) -> Path:
    "Root of the real labelled audio; the test is skipped, loudly, where there is none."
    root = real_data_root()
    if root is None: pytest.skip("SKIPPED: no real audio; set AASP_DATA")
    with REAL.open("a") as f: f.write(request.node.nodeid + "\n")
    return root


def pytest_sessionstart(session):
    if hasattr(session.config, "workerinput"): return
    REAL.parent.mkdir(exist_ok=True)
    REAL.write_text("")


def pytest_terminal_summary(terminalreporter):
    if not REAL.exists() or not REAL.read_text(): terminalreporter.write_line("NO real-audio test ran (set AASP_DATA)")
