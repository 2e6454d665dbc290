"""The landing page in a real browser, where there is one; `.ci/browser/run` installs one and checks every page."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKS = Path(__file__).parents[1] / ".ci/browser"
PAGES = Path(__file__).parents[1] / "book/_build/html"
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.mark.slow
def test_the_landing_page_in_a_browser():
    missing = {
        "Chromium": CHROMIUM,
        "Node.js": shutil.which("node"),
        "its packages": (CHECKS / "node_modules").exists(),
        "a built book": (PAGES / "book/index.html").exists(),
    }
    if lacking := [name for name, there in missing.items() if not there]:
        pytest.skip(
            f"no {', no '.join(lacking)}: after `make book`, .ci/browser/run installs them and checks every page"
        )
    command = ["node", str(CHECKS / "check.mjs"), str(PAGES), "book/index.html"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CHROMIUM": CHROMIUM})
    assert done.returncode == 0, done.stdout + done.stderr
