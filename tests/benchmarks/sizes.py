"""What a store of many runs costs: seconds and peak memory of `lottery status`, of loading all, of the scorecard.

    PYTHONPATH=.:tests python -m benchmarks.sizes 10000 50000

Each is a process of its own, after one that nobody counts; runs keep no masks, as in the sweeps that are this large.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import measure
from benchmarks.runs import fill

WAYS = {
    "status": "from typer.testing import CliRunner; from lottery.cli import app\n"
    "assert CliRunner().invoke(app, ['status', '--results-dir', folder]).exit_code == 0",
    "load of everything": "from lottery import experiments\n"
    "experiments.load(None, experiments.Store(folder))",
    "scorecard": "from lottery import scorecard\nscorecard.scorecard('lth', folder)",
}  # fmt: skip
CODE = """
import json, sys, time
folder = sys.argv[1]
began = time.perf_counter(), time.process_time()
{}
wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
print(json.dumps({{"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "MiB": peak}}))
"""


def cost(code, folder, cache):
    """{"wall_s", "cpu_s", "MiB"} of a process, imports included."""
    environment = {**os.environ, "PYTHONPATH": str(measure.ROOT), "XDG_CACHE_HOME": cache}
    words = [sys.executable, "-c", CODE.format(code), folder]
    told = subprocess.run(words, env=environment, cwd=measure.ROOT, check=True, capture_output=True, text=True)
    return json.loads(told.stdout.splitlines()[-1])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        for n in map(int, sys.argv[1:]):
            with tempfile.TemporaryDirectory() as folder:
                fill(Path(folder) / "ours", n, masks=False)
                size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
                print(json.dumps({"runs": n, "MB": round(size / 1e6)}), flush=True)
                cost(WAYS["status"], f"{folder}/ours", cache)  # lists what the code declares
                for name, code in WAYS.items():
                    told = {"runs": n, "what": name, **cost(code, f"{folder}/ours", cache)}
                    print(json.dumps(told | {"load": round(os.getloadavg()[0], 1)}), flush=True)
