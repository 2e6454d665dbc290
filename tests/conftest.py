"""The same examples, threads and order in every run: fast tests first."""

import os

import hypothesis
import torch

os.environ["MPLBACKEND"] = "agg"
torch.set_num_threads(1)
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("project")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
