"""pytest-benchmark on the same clock as `python -m benchmarks`: CPU time of the thread."""

import time

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("benchmark") is None:
            item.add_marker(pytest.mark.benchmark(timer=time.thread_time))
