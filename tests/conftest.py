"""The same examples, threads and order in every run: fast tests first.

Where processes share the files the notebooks come first: they take longest, and would be waited for.
"""

import os

import hypothesis
import torch

os.environ["MPLBACKEND"] = "agg"
torch.set_num_threads(1)
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("project")


def pytest_collection_modifyitems(items):
    shared = "PYTEST_XDIST_WORKER" in os.environ

    def when(item):
        return not (shared and item.path.name == "test_notebooks.py"), item.get_closest_marker("slow") is not None

    items.sort(key=when)
