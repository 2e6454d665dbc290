"""The store under processes that are killed or race each other."""

import json
import subprocess
import sys
import textwrap

import pytest
from small_runs import ROOT, fake, spool

from lottery.experiments import Store

KILLS = """
    import contextlib, io, itertools, json, os, random, signal, sys, time
    from pathlib import Path
    import pyarrow.parquet as pq
    from lottery.experiments import store
    from lottery.experiments.store import Store

    base, template = Path(sys.argv[1]), store.read(Path(sys.argv[2]))[0]
    rng, result = random.Random(0), {}

    def row(i):
        return {**template, "key": f"{i:024x}"}

    def fork(work):
        pid = os.fork()
        if not pid:
            try:
                work()
            finally:
                os._exit(0)
        return pid

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def after(n, function):
        calls = itertools.count()
        def patched(*args, **kwargs):
            if next(calls) == n:
                die()
            return function(*args, **kwargs)
        return patched

    def half(table, where, **kwargs):
        with io.BytesIO() as buffer:
            true_write(table, buffer, **kwargs)
            Path(where).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        die()

    true_write = pq.write_table

    def state(folder):
        # keys that a fresh reader sees, how often pandas sees each, what it complains about
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            keys = sorted(Store(folder).rows())
        packed = sorted(key for p in folder.glob("*.parquet") for key in pq.read_table(p)["key"].to_pylist())
        return {"keys": keys, "packed": packed, "err": err.getvalue()}

    # 1. killed at random moments while it puts one run after the other
    folder, acknowledged, reports = base / "random", [], []
    for trial in range(12):
        r, w = os.pipe()
        def victim():
            opened = Store(folder)
            for i in itertools.count(1000 * trial):
                opened.put(row(i))
                os.write(w, i.to_bytes(4, "big"))
        pid = fork(victim)
        os.close(w)
        for _ in range(rng.randrange(1, 5)):
            acknowledged.append(int.from_bytes(os.read(r, 4), "big"))
        moment = time.perf_counter() + rng.random() * 0.01
        while time.perf_counter() < moment:
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(r, 4):
            acknowledged.append(int.from_bytes(more, "big"))
        os.close(r)
    result["random"] = {**state(folder), "acknowledged": [row(i)["key"] for i in acknowledged]}

    # 2. killed at each step of a put
    for name, patch in {
        "half written": lambda: setattr(pq, "write_table", half),
        "before fsync": lambda: setattr(os, "fsync", die),
        "before link": lambda: setattr(os, "link", die),
        "after link": lambda: setattr(Path, "unlink", die),
    }.items():
        folder = base / name
        Store(folder).put(row(0))
        os.waitpid(fork(lambda: (patch(), Store(folder).put(row(1)))), 0)
        found = state(folder)
        again = Store(folder).put(row(1))
        result[name] = {"found": found, "again": again, "after": state(folder)}

    # 3. killed at each step of a merge
    store.SHARD = 2
    for name, patch in {
        "merge half written": lambda: setattr(pq, "write_table", half),
        "merge before its first shard": lambda: setattr(os, "replace", die),
        "merge between its shards": lambda: setattr(os, "replace", after(1, os.replace)),
        "merge before removing": lambda: setattr(Path, "unlink", after(6, Path.unlink)),
        "merge while removing": lambda: setattr(Path, "unlink", after(8, Path.unlink)),
    }.items():
        folder = base / name
        for i in range(5):
            Store(folder).put(row(i))
        os.waitpid(fork(lambda: (patch(), Store(folder).merge())), 0)
        found = state(folder)
        n = Store(folder).merge()
        left = len(list((folder / ".spool").glob("*.parquet")))
        result[name] = {"found": found, "again": n, "after": state(folder), "left": left}

    # 4. races, started together by closing a pipe
    def together(*works):
        r, w = os.pipe()
        def wait(work):
            os.close(w)
            os.read(r, 1)
            work()
        pids = [fork(lambda work=work: wait(work)) for work in works]
        os.close(r), os.close(w)
        for pid in pids:
            os.waitpid(pid, 0)

    folder, wins = base / "same run", base / "wins"
    wins.mkdir()
    def put(who):
        for i in range(10):
            if Store(folder).put({**row(i), "wall_s": float(who)}):
                (wins / f"{i}-{who}").touch()
    together(*(lambda who=who: put(who) for who in range(3)))
    result["same run"] = {**state(folder), "wins": sorted(p.name for p in wins.iterdir()),
                          "kept": [Store(folder).rows()[row(i)["key"]]["wall_s"] for i in range(10)]}

    folder = base / "two merges"
    for i in range(9):
        Store(folder).put(row(i))
    together(*[lambda: Store(folder).merge()] * 3)
    result["two merges"] = {**state(folder), "left": len(list((folder / ".spool").glob("*.parquet")))}

    folder = base / "put and merge"
    def puts():
        for i in range(12):
            Store(folder).put(row(i))
    def merges():
        for _ in range(6):
            Store(folder).merge()
    def reads():
        seen = 0
        opened = Store(folder)
        for _ in range(12):
            now = len(Store(folder).rows())
            assert now >= seen, "a finished run was out of sight"
            assert len(opened.rows()) >= now, "an open store lost a run"
            seen = now
        (base / "reader done").touch()
    together(puts, merges, reads)
    Store(folder).merge()
    result["put and merge"] = {**state(folder), "reader": (base / "reader done").exists()}
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    # Of a class that is not known: keys can be made up.
    Store(folder / "template").put(fake(spec=json.dumps({"measurement": "?", "model": "?", "dataset": "?"})))
    [template] = spool(folder / "template")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLS), str(folder), str(template)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def keys(*numbers):
    return [f"{i:024x}" for i in numbers]


def test_sigkill_at_random_moments_loses_no_finished_run(kills):
    found = kills["random"]
    assert found["err"] == ""
    assert len(found["acknowledged"]) >= 12
    assert set(found["acknowledged"]) <= set(found["keys"])


@pytest.mark.parametrize("step", ["half written", "before fsync", "before link", "after link"])
def test_sigkill_at_each_step_of_a_put(kills, step):
    case = kills[step]
    assert case["found"]["err"] == ""
    assert case["found"]["keys"] == keys(0, 1) if step == "after link" else keys(0)
    assert case["again"] is (step != "after link")
    assert case["after"]["keys"] == keys(0, 1)


@pytest.mark.parametrize(
    "step", ["half written", "before its first shard", "between its shards", "before removing", "while removing"]
)
def test_sigkill_at_each_step_of_a_merge(kills, step):
    case = kills[f"merge {step}"]
    assert case["found"]["err"] == ""
    assert case["found"]["keys"] == keys(*range(5)), "a run was lost"
    assert len(set(case["found"]["packed"])) == len(case["found"]["packed"]), "a key is in two shards"
    assert case["after"]["packed"] == case["after"]["keys"] == keys(*range(5))
    assert case["left"] == 0
    packed = {"between its shards": 2, "before removing": 5, "while removing": 5}.get(step, 0)
    assert len(case["found"]["packed"]) == packed
    assert case["again"] == 5 - packed


def test_of_processes_that_put_the_same_run_one_is_kept(kills):
    race = kills["same run"]
    assert race["keys"] == keys(*range(10))
    assert race["err"] == ""
    assert [int(win.split("-")[0]) for win in race["wins"]] == list(range(10)), "exactly one winner each"
    assert [float(win.split("-")[1]) for win in race["wins"]] == race["kept"]


def test_merges_at_once_pack_every_run_once(kills):
    race = kills["two merges"]
    assert race["packed"] == race["keys"] == keys(*range(9))
    assert (race["err"], race["left"]) == ("", 0)


def test_merging_while_others_put_and_read(kills):
    race = kills["put and merge"]
    assert race["packed"] == race["keys"] == keys(*range(12))
    assert race["err"] == ""
    assert race["reader"]
