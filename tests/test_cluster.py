"""A Dask cluster of real processes on this machine: a sweep survives the death of a worker; a run is kept once."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from small_runs import child

from lottery import cli, experiments
from lottery.experiments import Run, Store, load
from lottery.training import Recipe

pytest.importorskip("distributed", reason="needs the extra lottery[cluster]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.endurance,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
RECIPE = Recipe(iterations=150, eval_every=50)
SERIAL = ("density", "last_test_acc", "last_correct", "early_stop_step", "val_loss", "train_loss", "layers")


def chains(n):
    """n dense runs with a ticket each."""
    dense = [Run(dataset="digits", recipe=RECIPE, seed=seed) for seed in range(n)]
    return [r for run in dense for r in (run, child(run, recipe=RECIPE))]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(*words):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", *map(str, words)], **quiet)


@pytest.fixture(scope="module")
def cluster():
    """(host:port, worker processes): a scheduler and two workers of one thread, on the loopback address."""
    port = free_port()
    processes = [start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")]
    try:
        worker = ("distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}", "--host", "127.0.0.1", "--nthreads", 1)
        processes += [start(*worker, "--no-nanny", "--no-dashboard") for _ in range(2)]
        for _ in range(300):
            with contextlib.suppress(ValueError):
                executor, slots = cli._executor(f"dask://127.0.0.1:{port}")
                executor._client.close()
                if slots == 2:
                    break
            time.sleep(0.2)
        yield f"127.0.0.1:{port}", processes[1:]
    finally:
        for p in processes:
            p.kill()
            p.wait()


def test_a_sweep_survives_the_death_of_a_worker(tmp_path, cluster):
    """A worker is killed as soon as something is stored: all is stored in the end, as the serial sweep has it."""
    (address, workers), runs = cluster, chains(4)
    executor, slots = cli._executor(f"dask://{address}")
    assert slots == 2
    mine = Store(tmp_path / "dask")

    def kill_one():
        while not list((mine.dir / ".spool").glob("*.parquet")):
            time.sleep(0.02)
        workers[0].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    assert experiments.run(runs, executor, store=mine, slots=slots, progress=False) == []
    killer.join(30)
    workers[0].wait(30)
    executor._client.close()
    assert experiments.run(runs, store=Store(tmp_path / "serial"), progress=False) == []
    ours, serial = (load(runs, Store(tmp_path / name)) for name in ("dask", "serial"))
    assert len(list((mine.dir / ".spool").glob("*.parquet"))) == len(runs)
    for name in SERIAL:
        for a, b in zip(ours[name], serial[name], strict=True):
            np.testing.assert_equal(a, b)
    assert not list(mine.leases.glob("[!.]*"))
    assert not mine.failures()


def test_no_scheduler_is_one_line():
    with pytest.raises(ValueError, match=r"^No Dask scheduler at 127\.0\.0\.1:\d+: "):
        cli._dask(f"127.0.0.1:{free_port()}", timeout="1s")
