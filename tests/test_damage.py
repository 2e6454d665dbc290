"""What a store is given that no training wrote, and where nothing can be written: a line each, and the rest goes on."""

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import subprocess
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_runs import DENSE, Inline, child, fake, seeds, spool, train, tree
from typer.testing import CliRunner

from lottery import cli, data, experiments, files, tensorfile, training
from lottery.experiments import Store, leases, load, papers, store, work
from lottery.training import Recipe


def nested(depth=100_000):
    return "[" * depth + "]" * depth


@pytest.fixture
def status(monkeypatch):
    """`lottery status` of a folder, without the seconds of listing what the papers declare."""
    monkeypatch.setattr(cli, "_declared", lambda: ([], {}))

    def look(folder):
        told = CliRunner().invoke(cli.app, ["status", "--json", "--results-dir", str(folder)])
        assert told.exit_code == 0, told.output
        return json.loads(told.stdout)

    return look


@pytest.mark.parametrize(
    ("nonsense", "said"),
    [
        ({"last_test_acc": 5.0, "last_correct": None}, "last_test_acc is 5.0, no share."),
        ({"val_acc": [0.5, -0.25, 0.8]}, "val_acc is -0.25, no share."),
        ({"density": 1.5}, "density is 1.5, no share."),
        ({"n_test": 2**34}, "n_test is 17179869184, it has 24 bits at most."),
        ({"n_test": -1}, "n_test is -1, it has 24 bits at most."),
        ({"started": None}, "it does not say when it was started."),
        ({"certificate": "{}"}, "it does not say what it is of."),
        ({"certificate": None}, "it does not say what it is of."),
        ({"certificate": "no json"}, "certificate is no JSON object."),
        ({"spec": None}, "it does not say what it is of."),
        ({"spec": nested()}, "spec is no JSON object."),
        ({"layers": "[1, 2]"}, "layers is no JSON object."),
        ({"key": "../../x"}, "that is no key."),
        ({"key": None}, "that is no key."),
    ],
)
def test_a_row_that_says_what_cannot_be_is_named_whoever_signed_it(tmp_path, capsys, status, nonsense, said):
    """All that reads a store goes on with the other run."""
    good = replace(DENSE, seed=1)
    Store(tmp_path).put(fake(good))
    row = store._signed(pa.Table.from_pylist([fake() | nonsense], schema=store.schema()))
    pq.write_table(row, tmp_path / "2026-01-01-00000000.parquet")
    assert load(None, Store(tmp_path))["key"].tolist() == [good.key]
    err = capsys.readouterr().err
    assert err.startswith("Damaged run ")
    assert err.endswith(f"2026-01-01-00000000.parquet: {said} It is passed over; run it again.\n")
    assert err.count("\n") == 1
    assert status(tmp_path)["stored"] == 2
    assert Store(tmp_path).merge() == 1


def test_a_row_of_a_newer_version_is_called_that(tmp_path, capsys, monkeypatch):
    """Its hash is right when the columns that are not known here are counted; a changed one is damaged all the same."""
    with monkeypatch.context() as later:
        newer = store.schema().append(pa.field("noise", pa.float64()))
        later.setattr(store, "schema", lambda: newer)
        for run in seeds(2):
            Store(tmp_path).put(fake(run, noise=0.5))
    path = tmp_path / ".spool" / f"{DENSE.key}.parquet"
    [row] = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"noise": 0.75}], schema=newer), path)
    assert len(load(None, Store(tmp_path))) == 0
    damaged, later = sorted(capsys.readouterr().err.splitlines())
    assert damaged.startswith(f"Damaged run {DENSE.key} in {path}: its content does not match its hash.")
    assert re.fullmatch(r"Run [0-9a-f]{24} in .* was written by a newer version of lottery\. .*; update\.", later)
    assert Store(tmp_path).merge() == 0
    assert len(spool(tmp_path)) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_of_a_newer_version_stays_and_its_run_is_refused_before_it_is_trained(tmp_path, monkeypatch, packed):
    with monkeypatch.context() as later:
        newer = store.schema().append(pa.field("noise", pa.float64()))
        later.setattr(store, "schema", lambda: newer)
        Store(tmp_path).put(fake(noise=0.5))
        assert not packed or Store(tmp_path).merge() == 1
    before = tree(tmp_path)
    said = rf"^Run {DENSE.key} in .*\.parquet was written by a newer version of lottery: update, or name another --resu"
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", None)
        with pytest.raises(ValueError, match=said):
            work.execute([DENSE], tmp_path)
    with pytest.raises(ValueError, match=said):
        Store(tmp_path).put(fake())
    assert tree(tmp_path) == before


def bomb(path, value, n):
    """A small file that would be large: one value in every row, which is written once."""
    columns = {"key": [f"{i:024x}" for i in range(n)], "mask": pa.DictionaryArray.from_arrays([0] * n, [value])}
    pq.write_table(pa.table(columns), path, compression="zstd")


def test_a_small_file_that_expands_to_gigabytes_is_not_unpacked(tmp_path, capsys, monkeypatch):
    """With a limit of 1 MiB: 20 kB in each of 2,000 rows, which is 40 MB; and one value of 10 MB."""
    Store(tmp_path).put(fake())
    bomb(tmp_path / ".spool" / "many.parquet", bytes(20_000), 2_000)
    bomb(tmp_path / "large.parquet", bytes(10**7), 1)
    assert all(path.stat().st_size < 100_000 for path in tmp_path.rglob("*.parquet"))
    monkeypatch.setattr(store, "MOST", 2**20)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        assert len(Store(tmp_path).rows()) == 1
    finally:
        pa.set_memory_pool(before)
    assert 0 < pool.max_memory() < 4 * 2**20
    many, large = sorted(capsys.readouterr().err.splitlines())
    assert re.search(r"Damaged result .*large\.parquet: it holds \d{8} bytes, more than 1048576\.", large)
    assert re.search(r"Damaged result .*many\.parquet: it holds more than 1048576 bytes\.", many)


@pytest.mark.parametrize("by", [0x01, 0x06, 0x80])
def test_a_footer_with_any_byte_changed_ends_no_process(tmp_path, by, capsys):
    """pyarrow's own look at a column ends the process where statistics of a list's levels are damaged."""
    table = pa.table({"key": ["a" * 24, "b" * 24], "val_acc": [[0.5, None], []]})
    pq.write_table(table, path := tmp_path / "t.parquet")
    content, footer = path.read_bytes(), pq.ParquetFile(path).metadata
    for i in range(len(content) - 8 - footer.serialized_size, len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ by]) + content[i + 1 :])
        store.read(path)
    assert "Damaged result" in capsys.readouterr().err


def test_a_footer_tells_what_each_column_holds(tmp_path):
    table = pa.table({"n": range(1000), "of": [[{"text": "ä"}] * 3] * 1000, "given": [True, None] * 500})
    pq.write_table(table, path := tmp_path / "t.parquet", row_group_size=300)
    about = pq.ParquetFile(path).metadata
    columns = [about.row_group(i).column(j) for i in range(4) for j in range(3)]
    wanted = [(c.path_in_schema.split(".")[0], c.num_values, c.total_uncompressed_size) for c in columns]
    assert [tuple(chunk) for chunk in files.chunks(path)] == wanted
    cut = path.read_bytes()[-about.serialized_size // 2 - 8 : -8]
    path.write_bytes(cut + len(cut).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match=r"^its footer is damaged \("):
        files.chunks(path)


def test_what_is_no_ordinary_file_is_passed_over(tmp_path, capsys):
    """A pipe that nobody writes to would be read for ever."""
    Store(tmp_path).put(fake())
    for name in (".leases", ".failures", ".artifacts", ".checkpoints"):
        (tmp_path / name).mkdir(exist_ok=True)
    names = ["pipe.parquet", ".spool/pipe.parquet", f".failures/{'a' * 24}.json", f".leases/{'b' * 24}"]
    names += [f".artifacts/{'c' * 24}.safetensors", f".checkpoints/{'d' * 24}.safetensors"]
    for name in names:
        os.mkfifo(tmp_path / name)
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "loop.parquet").symlink_to("loop.parquet")
    mine = Store(tmp_path)
    assert len(mine.rows()) == 1
    said = capsys.readouterr().err.splitlines()
    assert sum(line.endswith("is no ordinary file; it is passed over.") for line in said) == 3
    assert len(said) == 4
    assert mine.merge() == 1
    assert mine.failures() == {}
    assert leases.running(mine.leases) == {}
    assert leases.Leases(mine.leases).take(["b" * 24]) == {"b" * 24}
    with pytest.raises(ValueError, match=r"^Damaged weights "):
        mine.load_artifact("c" * 24)
    with pytest.raises(ValueError, match=r"is no ordinary file\.$"):
        tensorfile.read(mine.checkpoint("d" * 24))


def old(path, seconds=files.STALE + 10):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_what_killed_processes_left_is_swept_when_it_is_old(tmp_path):
    mine = Store(tmp_path)
    mine.put(fake())
    other = "e" * 24
    gone = [old(tmp_path / name / ".x.tmp") for name in ("", ".spool", ".artifacts", ".checkpoints", ".leases")]
    gone += [old(mine.checkpoint(DENSE.key), 7 * 24 * files.STALE + 10)]
    stay = [old(tmp_path / ".spool/.y.tmp", 60), old(mine.checkpoint(other)), old(tmp_path / "mine.tmp")]
    mine.merge()
    assert not [path for path in gone if path.exists()]
    assert all(path.exists() for path in stay)
    for path in (*gone[:1], mine.checkpoint(DENSE.key)):
        old(path)
    experiments.run([DENSE], Inline(), store=Store(tmp_path), progress=False)  # its weights are not asked for
    experiments.run([child(DENSE)], Inline(), store=Store(tmp_path), progress=False, budget=0)
    assert not gone[0].exists()


@contextlib.contextmanager
def mounted(folder, *options):
    """A file system of its own on a folder. Needs root, else the test says so."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not run: no file system can be mounted here ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def one_line(why, path):
    do = "Make room, or name" if why == "No space left on device" else "Name"
    return rf"^Cannot write {re.escape(str(path))}[^\n]*: {why}\. {do} another folder; what is finished is kept\.$"


def refused(monkeypatch, module, name, error, when=lambda *_: True):
    """A call of the system that is refused where `when` is true of its arguments."""
    call = getattr(module, name)

    def refusing(*args, **kwargs):
        if when(*args):
            raise OSError(error, os.strerror(error))
        return call(*args, **kwargs)

    monkeypatch.setattr(module, name, refusing)


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        ((os, "link"), errno.EPERM, r"its file system makes no hard links \(Operation not permitted\)"),
        ((fcntl, "flock"), errno.ENOSYS, r"its file system grants no lock, `flock` \(Function not implemented\)"),
        ((os, "fsync"), errno.EIO, "Input/output error"),
    ],
)
def test_what_the_file_system_cannot_do_is_said_before_anything_is_trained(tmp_path, monkeypatch, call, error, why):
    executor = Inline()
    refused(monkeypatch, *call, error)
    with pytest.raises(files.CannotWrite, match=one_line(why, tmp_path)):
        experiments.run(seeds(2), executor, store=Store(tmp_path), progress=False)
    assert executor.ran == []
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_folder_that_cannot_be_synchronised_keeps_results_all_the_same(tmp_path, monkeypatch):
    refused(monkeypatch, os, "fsync", errno.EINVAL, lambda f: stat.S_ISDIR(os.fstat(f).st_mode))
    Store(tmp_path).check()
    assert Store(tmp_path).put(fake())
    assert Store(tmp_path).merge() == 1


def test_a_read_only_store_is_refused_before_anything_is_trained_and_can_be_looked_at(tmp_path, status):
    executor = Inline()
    with mounted(tmp_path / "disk") as folder:
        Store(folder).put(fake())
        leases.Leases(Store(folder).leases).take(["a" * 24])
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        with pytest.raises(files.CannotWrite, match=one_line("Read-only file system", folder)):
            experiments.run(seeds(2), executor, store=Store(folder), progress=False)
        assert experiments.run([DENSE], executor, store=Store(folder), progress=False) == []
        assert len(status(folder)["running"]) == 1
        told = CliRunner().invoke(cli.app, ["merge", "--results-dir", str(folder)])
        assert (told.exit_code, told.stdout) == (2, "")
        assert re.match(one_line("Read-only file system", folder), told.stderr.removeprefix("lottery: ").strip())
    assert executor.ran == []


def test_a_full_disk_stops_the_sweep_and_loses_nothing_that_was_finished(tmp_path):
    """Room for the first result; the second cannot be kept, the third is not begun; with room again all are there."""
    runs, executor = seeds(3), Inline()

    def fill_after_one(group, *args):
        if executor.ran[1:]:
            left = os.statvfs(folder)
            (folder / "others").write_bytes(bytes(left.f_bavail * left.f_bsize))
        return run(group, *args)

    with mounted(tmp_path / "disk", "-o", "size=2m") as folder:
        run, submit = None, executor.submit

        def submit_and_fill(fn, *args):
            nonlocal run
            run = fn
            return failing(submit, fill_after_one, *args)

        executor.submit = submit_and_fill
        with pytest.raises(files.CannotWrite, match=one_line("No space left on device", folder)):
            experiments.run(runs, executor, store=Store(folder), progress=False)
        assert executor.ran == runs[:2]
        (folder / "others").unlink()
        assert load(runs, Store(folder))["key"].tolist() == [runs[0].key]
        assert not list(folder.rglob(".*.tmp"))
        assert train(runs, folder) == runs[1:]
        assert len(load(runs, Store(folder))) == 3


def failing(submit, fn, *args):
    """A future that has the error which `Inline` would raise."""
    import concurrent.futures

    future = concurrent.futures.Future()
    try:
        future.set_result(submit(fn, *args).result())
    except (OSError, ValueError) as error:
        future.set_exception(error)
    return future


def test_a_training_outlives_a_checkpoint_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    kept = training.Checkpoint(tmp_path / "file" / "c.safetensors", {}, every=0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.warns(UserWarning, match="^No checkpoint: Cannot write"):
        history = training.fit(net, data.load("digits"), Recipe(iterations=20, eval_every=10), checkpoint=kept)
    assert history.last.step == 20


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.unlink()])
def test_a_sweep_trains_a_parents_damaged_weights_again_and_goes_on(tmp_path, damage):
    """They are damaged when the child is about to read them, as by a disk or by another process."""
    executor, submit = Inline(), Inline.submit

    def submit_after_damage(fn, runs, *args):
        if runs == [child(DENSE)] and executor.ran == [DENSE]:
            damage(Store(tmp_path).artifact(DENSE.key))
        return failing(lambda *given: submit(executor, *given), fn, runs, *args)

    executor.submit = submit_after_damage
    assert experiments.run([child(DENSE)], executor, store=Store(tmp_path), progress=False) == []
    assert executor.ran == [DENSE, child(DENSE), DENSE, child(DENSE)]
    train([child(DENSE)], tmp_path / "undisturbed")
    mine, other = (Store(folder).get(child(DENSE)) for folder in (tmp_path, tmp_path / "undisturbed"))
    assert (mine["last_correct"], mine["mask"]) == (other["last_correct"], other["mask"])
    assert not Store(tmp_path).failures()


def test_damaged_weights_of_a_store_beside_are_left_there_and_trained_again_here(tmp_path):
    train([child(DENSE)], tmp_path / "its")
    its = Store(tmp_path / "its").artifact(DENSE.key)
    its.write_bytes(its.read_bytes()[:-5] + b"12345")
    before, other = tree(tmp_path / "its"), replace(child(DENSE), rate=0.5)
    mine, executor = Store(tmp_path / "mine", also=[tmp_path / "its"]), Inline()
    with pytest.raises(store.DamagedWeights, match=rf"^Damaged weights {re.escape(str(its))}: passed over; run again,"):
        Store(mine.dir, mine.also).load_artifact(DENSE.key)  # as a worker does, of which this process need not know
    assert experiments.run([other], executor, store=mine, progress=False) == []
    assert executor.ran == [DENSE, other]
    assert mine.artifact(DENSE.key) == tmp_path / "mine/.artifacts" / its.name
    assert tree(tmp_path / "its") == before


# Budgets and bounds ---------------------------------------------------------------------------------------------------


def test_with_a_budget_the_first_of_a_kind_is_timed_alone(tmp_path, monkeypatch):
    """Of four runs that nobody has timed one starts, takes an hour, and the others are left."""
    from concurrent.futures import Future

    from lottery.experiments import engine

    clock, under_way, most = [0.0], [], []
    monkeypatch.setattr(engine.time, "monotonic", lambda: clock[0])

    class Slow:
        def submit(self, fn, runs, folder, *args):
            under_way.append((future := Future(), runs, folder))
            most.append(len(under_way))
            return future

    def wait(jobs, timeout, when):
        clock[0] += 3600
        done, [run], folder = under_way.pop(0)
        Store(folder).put(fake(run))
        done.set_result(3600.0)
        return {done}, set()

    monkeypatch.setattr(engine.futures, "wait", wait)
    left = experiments.run(seeds(4), Slow(), budget=600, store=Store(tmp_path), slots=4, progress=False)
    assert most == [1]
    assert left == seeds(4)[1:]
    experiments.run(seeds(4), Slow(), store=Store(tmp_path / "other"), slots=4, progress=False)
    assert max(most) == 4, "without a budget nothing waits"


@pytest.mark.parametrize("paper", list(experiments.PAPERS))
@pytest.mark.parametrize("name", ["trials", "rounds"])
def test_a_number_of_trials_that_cannot_be_is_refused_at_once(paper, name):
    module = papers.paper(paper)
    with pytest.raises(ValueError, match=rf"^Invalid {name} 999999999: give 1,000 at most\.$"):
        module.override(module.setting("smoke"), **{name: 999_999_999})


def test_runs_that_are_left_are_another_exit_status(tmp_path):
    words = ["run", "lth", "fig12", "--scale", "smoke", "--budget", "0s", "--results-dir", str(tmp_path)]
    told = CliRunner().invoke(cli.app, words)
    assert told.exit_code == cli.LEFT == 3
    assert re.search(r"0 trained now, \d+ left\.\n$", told.stdout)


@pytest.mark.parametrize("paper", list(experiments.PAPERS))
@pytest.mark.parametrize("name", ["model", "dataset"])
@pytest.mark.parametrize("value", ["snip", 5, ["digits"]])
def test_an_unknown_model_or_data_set_is_refused_by_every_paper(paper, name, value):
    module = papers.paper(paper)
    with pytest.raises(ValueError, match=rf"^Invalid {name} {re.escape(repr(value))}: give one of [^\n]*\.$"):
        module.override(module.setting("smoke"), **{name: value})
