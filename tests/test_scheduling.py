"""The engine: which runs are trained, when and in what order; failures, interrupts, budgets, pools."""

import concurrent.futures as futures
import contextlib
import hashlib
import json
import os
import signal
import types
from dataclasses import replace

import pandas as pd
import pytest
import torch
from small_runs import (
    DENSE,
    Inline,
    child,
    fake,
    message,
    seeds,
    train,
    tree,
)

from lottery import dynamic, experiments, files, training
from lottery.experiments import Run, Store, engine, grasp_init, load, pace, work
from lottery.experiments.leases import Leases, running
from lottery.training import Recipe


def test_what_is_stored_is_not_trained_again(tmp_path):
    chain = [DENSE, child(DENSE), child(child(DENSE))]
    assert train(chain[2:], tmp_path) == chain
    before = tree(tmp_path)
    assert train(chain, tmp_path) == []
    Store(tmp_path).merge()
    assert train(chain, tmp_path) == []
    for path, (content, _) in before.items():
        assert path.suffix == ".parquet" or path.read_bytes() == content


def test_a_parent_without_its_weights_is_trained_again_and_keeps_its_row(tmp_path):
    train([child(DENSE)], tmp_path)
    Store(tmp_path).merge()
    row = Store(tmp_path).get(DENSE)
    opened = Store(tmp_path)
    opened.artifact(DENSE.key).unlink()
    new = child(DENSE, rate=0.5)
    assert engine.missing([DENSE, child(DENSE)], opened) == []
    assert train([new], tmp_path) == [DENSE, new]
    assert Store(tmp_path).get(DENSE) == row
    sha = hashlib.sha256(opened.artifact(DENSE.key).read_bytes()).hexdigest()
    assert json.loads(Store(tmp_path).get(new)["certificate"])["parent_weights"] == sha
    Store(tmp_path).merge()
    assert sorted(pd.read_parquet(tmp_path)["key"]) == sorted(r.key for r in (DENSE, child(DENSE), new))


def test_weights_that_are_trained_again_and_come_out_others_are_told(tmp_path, monkeypatch):
    train([child(DENSE)], tmp_path)
    opened, save = Store(tmp_path), Store.save_artifact
    opened.artifact(DENSE.key).unlink()
    train([child(DENSE, rate=0.5)], tmp_path)  # the same weights: no warning, which would be an error
    opened.artifact(DENSE.key).unlink()

    def rounded(self, key, tensors):
        """As on a processor that adds in another order."""
        return save(self, key, {name: t * (1 + 1e-6) if t.is_floating_point() else t for name, t in tensors.items()})

    monkeypatch.setattr(Store, "save_artifact", rounded)
    monkeypatch.setattr(work, "processor", lambda: "another")
    with pytest.warns(UserWarning, match="^Other weights than the stored run's: .*, with processor another and not .*"):
        train([child(DENSE, rate=0.3)], tmp_path)


def test_a_parent_of_the_committed_store_is_trained_again_beside_it_and_keeps_its_row(tmp_path):
    committed, mine = tmp_path / "committed", tmp_path / "mine"
    train([child(DENSE)], committed)
    Store(committed).merge()
    Store(committed).artifact(DENSE.key).unlink()
    before, row = tree(committed), Store(committed).get(DENSE)
    both = Store(mine, also=[committed])
    new = child(DENSE, rate=0.5)
    assert experiments.run([new], Inline(), store=both, progress=False) == []
    for opened in (both, Store(mine, also=[committed])):
        assert opened.get(DENSE) == row
    assert tree(committed) == before
    assert set(Store(mine).rows()) == {new.key}
    assert Store(mine).artifact(DENSE.key).exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda content: b"", lambda content: b"\xff" * 99])
def test_damaged_weights_are_set_aside_named_and_trained_again(tmp_path, damage):
    train([child(DENSE)], tmp_path)
    path = Store(tmp_path).artifact(DENSE.key)
    sound = path.read_bytes()
    path.write_bytes(broken := damage(sound))
    new = child(DENSE, rate=0.5)
    with pytest.raises(ValueError, match=message(f"Damaged weights {path}: set aside; run again, ")):
        train([new], tmp_path)
    assert not path.exists()
    assert path.with_suffix(".damaged").read_bytes() == broken
    assert train([new], tmp_path) == [DENSE, new]
    assert path.read_bytes() == sound


def test_weights_are_dropped_that_nothing_declared_and_missing_starts_from(tmp_path, monkeypatch):
    """The others are trained again when somebody asks; nothing is dropped beside a training."""
    mine, [done, begun, apart] = Store(tmp_path), seeds(3)
    train([child(done), child(begun), child(apart)], tmp_path)
    declared = [child(done), child(begun), child(begun, rate=0.5)]
    paper = types.SimpleNamespace(scales=("smoke",), runs=lambda items, scale: declared)
    monkeypatch.setattr(engine, "PAPERS", {"one": "one"})
    monkeypatch.setattr(engine.papers, "paper", {"one": paper}.get)
    with contextlib.closing(Leases(mine.leases)) as leases:
        leases.take([done.key])
        with pytest.raises(ValueError, match=message(f"Trainings under way in {tmp_path}, 1 of them: ")):
            engine.drop_weights(mine)
    assert engine.drop_weights(mine) == 2
    assert [path.stem for path in tmp_path.glob(".artifacts/*")] == [begun.key]
    new = child(apart, rate=0.5)
    assert train([new], tmp_path) == [apart, new]


class Failing(Inline):
    """Some runs fail, as an exception in a worker does."""

    def __init__(self, *failing, error=RuntimeError):
        super().__init__()
        self.failing, self.error = failing, error

    def submit(self, fn, runs, *args):
        [r] = runs
        if r not in self.failing:
            return super().submit(fn, runs, *args)
        future = futures.Future()
        future.set_exception(self.error(f"seed {r.seed} failed"))
        return future


def test_a_run_that_fails_stops_its_descendants_only(tmp_path):
    """The others are trained and kept, and the first error is raised at the end."""
    chains = [[r := replace(DENSE, seed=seed), child(r), child(child(r))] for seed in range(3)]
    executor = Failing(chains[0][1], chains[1][0])
    with pytest.raises(RuntimeError, match="seed 1 failed"):
        train([r for chain in chains for r in chain], tmp_path, executor)
    assert set(executor.ran) == {chains[0][0], *chains[2]}
    assert set(Store(tmp_path).rows()) == {r.key for r in executor.ran}


class Mortal(futures.Executor):
    """Two workers, both of which die when one trains a certain run; `submitted` lists what each pool was given."""

    def __init__(self, deadly, submitted):
        self.deadly, self.broken, self.held = deadly, False, []
        submitted.append(mine := [])
        self.mine, self.first = mine, len(submitted) == 1

    def submit(self, fn, runs, *args):
        if self.broken:
            raise futures.BrokenExecutor("A child process terminated abruptly")
        [r], future = runs, futures.Future()
        self.mine.append(r.seed)
        self.held.append(future)
        if r.seed == self.deadly:
            self.broken = True
            for future in self.held:
                future.set_exception(futures.BrokenExecutor("A process in the process pool was terminated"))
        elif not self.first:  # in the first pool it is under way until the other one dies
            self.held.remove(future)
            future.set_result(fn(runs, *args))
        return future


def test_the_run_that_ends_its_process_is_found_and_the_others_are_trained(tmp_path, monkeypatch):
    """Both that were under way are tried alone; only the one of which a process dies again has failed."""
    submitted = []
    monkeypatch.setattr(engine, "_pool", lambda slots: Mortal(1, submitted))
    runs = [child(DENSE), *seeds(4)]  # the longest chain begins first
    with pytest.raises(engine.WorkerDied, match=r"^The process that trained <Run .* seed 1 .*> died, and ") as told:
        experiments.run(runs, store=Store(tmp_path), progress=False, slots=2)
    assert "\n" not in str(told.value)
    assert submitted[0] == [0, 1]
    assert submitted[1] in ([0, 1], [1])
    assert len(submitted) == 3
    assert set(Store(tmp_path).rows()) == {r.key for r in runs if r.seed != 1}
    assert set(Store(tmp_path).failures()) == {r.key for r in runs if r.seed == 1}
    assert not list(Store(tmp_path).leases.glob("[!.]*"))


def test_workers_of_an_executor_of_the_callers_that_die_are_one_line_and_no_runs_failure(tmp_path):
    with pytest.raises(engine.WorkerDied, match=r"^The executor's workers died, .*; what is finished is kept\.$"):
        experiments.run(seeds(3), Mortal(1, []), store=Store(tmp_path), progress=False, slots=2)
    assert not Store(tmp_path).failures()
    assert not list(Store(tmp_path).leases.glob("[!.]*"))


class KilledWorker(Exception):
    """As `distributed` says that a run's worker has died four times."""


def test_a_run_that_dask_gives_up_is_tried_alone(tmp_path):
    executor = Failing(replace(DENSE, seed=1), error=KilledWorker)
    with pytest.raises(engine.WorkerDied, match="seed 1"):
        train(seeds(3), tmp_path, executor)
    assert set(Store(tmp_path).rows()) == {r.key for r in executor.ran} == {r.key for r in seeds(3) if r.seed != 1}
    assert set(Store(tmp_path).failures()) == {replace(DENSE, seed=1).key}


def deadly(runs, *args):
    """`work.execute` of all but one run, whose process ends as it does when the system has no memory left."""
    if runs[0].seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return work.execute(runs, *args)


@pytest.mark.slow
@pytest.mark.endurance
def test_a_sweep_in_processes_survives_one_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "execute", deadly)
    with pytest.raises(engine.WorkerDied, match="seed 1"):
        experiments.run([child(r) for r in seeds(3)], store=Store(tmp_path), progress=False, slots=2)
    done = [x for r in seeds(3) if r.seed != 1 for x in (r, child(r))]
    assert set(Store(tmp_path).rows()) == {r.key for r in done}
    assert set(Store(tmp_path).failures()) == {replace(DENSE, seed=1).key}


def test_the_progress_counts_what_was_trained(tmp_path, monkeypatch):
    lines, failing = engine._Lines(6), Failing(replace(DENSE, seed=1))
    monkeypatch.setattr(engine, "_bar", lambda total, progress: contextlib.nullcontext(lines))
    with pytest.raises(RuntimeError, match="seed 1 failed"):
        train([replace(DENSE, seed=seed) for seed in range(6)], tmp_path, failing)
    assert (lines.done, lines.total) == (5, 6)


def test_a_log_is_told_once_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(engine.time, "monotonic", iter([0, 30, 59, 60, 60, 100, 121, 121]).__next__)
    with engine._bar(6, True) as lines:  # nothing here is a terminal
        for _ in range(5):
            lines.update(1)
    told = [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()]
    assert told == ["3 of 6 runs", "5 of 6 runs"]


def test_an_interrupt_is_raised_when_the_trainings_under_way_are_kept(tmp_path, capsys):
    class Interrupted(futures.ThreadPoolExecutor):
        def submit(self, fn, runs, *args):
            if runs[0].seed == 2:
                raise KeyboardInterrupt
            return super().submit(fn, runs, *args)

    with Interrupted(3) as pool:
        with pytest.raises(KeyboardInterrupt):
            experiments.run(seeds(5), pool, store=Store(tmp_path), progress=False)
        stored = set(Store(tmp_path).rows())  # before the pool itself waits for its threads
    assert stored == {r.key for r in seeds(2)}
    assert capsys.readouterr().out.splitlines() == [
        "Stopping when the 2 trainings under way have ended; interrupt again to abandon.",
        "Stopped: 2 of 2 kept.",
    ]


@pytest.mark.parametrize("own", [True, False])
def test_an_interrupt_while_a_run_is_given_to_a_worker_waits_for_it(tmp_path, monkeypatch, capsys, own):
    """The thread that renews the leases is given the signal, and its handler runs in the middle of `submit`.

    What a caller's executor starts there is not kept from a signal by which it may be ended.
    """
    blocked = []

    class Interrupted(futures.ThreadPoolExecutor):
        def submit(self, *args):
            blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            os.kill(os.getpid(), signal.SIGINT)
            return super().submit(*args)

    monkeypatch.setattr(engine, "_pool", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with contextlib.nullcontext() if own else Interrupted(2) as pool:
            with pytest.raises(KeyboardInterrupt):
                experiments.run(seeds(5), pool, store=Store(tmp_path), slots=2, progress=False)
            stored = set(Store(tmp_path).rows())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGINT, before)
    assert stored == {seeds(5)[0].key}
    assert blocked == [set(engine.STOPS) if own else set()]
    assert capsys.readouterr().out.splitlines() == [
        "Stopping when the training under way has ended; interrupt again to abandon.",
        "Stopped: 1 of 1 kept.",
    ]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_a_callers_executor_is_ended_by_a_signal_that_waits_here():
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with engine._uninterrupted(()):
            if not (pid := os.fork()):
                with contextlib.suppress(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGTERM)
                    os._exit(1)
                os._exit(0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert os.waitpid(pid, 0)[1] == 0


def test_what_is_under_way_is_this_processs_until_its_workers_have_ended(tmp_path, monkeypatch):
    """Whatever ends the sweep: another process would train it at the same time."""
    held, mine = [], Store(tmp_path)

    class Full(futures.ThreadPoolExecutor):
        def submit(self, fn, runs, *args):
            if runs[0].seed == 1:
                raise files.CannotWrite(28, "", "somewhere")
            return super().submit(fn, runs, *args)

        def shutdown(self, *args, **options):
            super().shutdown(*args, **options)
            held.append(set(running(mine.leases)))

    monkeypatch.setattr(engine, "_pool", Full)
    with pytest.raises(files.CannotWrite):
        experiments.run(seeds(3), store=mine, slots=2, progress=False)
    assert held == [{r.key for r in seeds(2)}]
    assert not running(mine.leases)


def test_long_chains_go_before_side_branches(tmp_path):
    trunk = [DENSE, child(DENSE), child(child(DENSE))]
    side = [child(DENSE, init="reinit", draw=i) for i in range(3)]
    other = replace(DENSE, seed=1)
    assert engine.missing([*side, other, *trunk], Store(tmp_path)) == [*trunk[:2], *side, other, trunk[2]]


def test_runs_are_taken_out_by_their_keys_and_not_compared_one_by_one(monkeypatch):
    runs, again, compared = seeds(50), seeds(60), []
    equal = Run.__eq__
    monkeypatch.setattr(Run, "__eq__", lambda one, other: compared.append(1) or equal(one, other))
    assert engine._without(runs, again) == again[50:]
    assert len(compared) <= 2 * 60


def test_a_thread_pool_will_do(tmp_path):
    with futures.ThreadPoolExecutor(1) as pool:
        train([child(DENSE)], tmp_path, pool)
    assert len(load(None, Store(tmp_path))) == 2


def test_two_threads_train_two_runs_as_one_after_the_other(tmp_path):
    chains = [child(r) for r in seeds(3)]
    train(chains, tmp_path / "alone")
    with futures.ThreadPoolExecutor(2) as pool:
        train(chains, tmp_path / "together", pool)
    alone, together = (Store(tmp_path / name).rows() for name in ("alone", "together"))
    assert alone.keys() == together.keys()
    for key, row in alone.items():
        for column in ("step", "val_loss", "train_loss", "mask", "early_stop_correct", "last_correct"):
            assert together[key][column] == row[column]


def test_budget_0_starts_nothing(tmp_path, capsys):
    left = experiments.run([child(DENSE)], Inline(), budget=0, store=Store(tmp_path / "new"), progress=False)
    assert left == [DENSE, child(DENSE)]
    assert not tree(tmp_path)


def test_children_of_a_run_that_the_budget_refuses_are_not_started(tmp_path):
    opened, executor = Store(tmp_path), Inline()
    opened.put(fake(replace(DENSE, seed=5), wall_s=40.0))  # a second an iteration
    slow = replace(DENSE, recipe=Recipe(iterations=1000))
    quick = child(slow, recipe=Recipe(iterations=2, eval_every=1))
    left = experiments.run([quick, child(quick)], executor, budget=20, store=opened, progress=False)
    assert left == [slow, quick, child(quick)]
    assert executor.ran == []


def test_a_budget_stops_before_runs_that_would_end_after_it(tmp_path):
    """It is long enough that a busy machine changes nothing."""
    opened, executor = Store(tmp_path), Inline()
    opened.put(fake(replace(DENSE, seed=5), wall_s=4e6))  # 1e5 seconds an iteration
    quick, slow = replace(DENSE, recipe=Recipe(iterations=10, eval_every=5)), replace(DENSE, seed=1)
    left = experiments.run([quick, slow], executor, budget=2e6, store=opened, progress=False, slots=2)
    assert executor.ran == [quick]
    assert left == [slow]


def test_a_pace_is_that_of_a_kind_on_such_a_device(tmp_path):
    """Not of other batches, another method or another device; where none was timed, an estimate takes what is near."""
    opened, gmp = Store(tmp_path), replace(DENSE, method=dynamic.GMP())
    large = replace(DENSE, recipe=replace(DENSE.recipe, batch_size=600))
    for run, seconds, device in ((DENSE, 4, "CPU x"), (large, 40, "CPU x"), (gmp, 400, "CPU x"), (gmp, 8, "NVIDIA x")):
        opened.put(fake(replace(run, seed=len(opened.keys())), wall_s=seconds, device=device))
    found, on_gpu = pace.paces(opened), pace.paces(opened, "cuda")
    of = ("lenet_300_100", "digits")
    assert found == {(*of, 60, "Method"): 0.1, (*of, 600, "Method"): 1, (*of, 60, "GMP"): 10, of: 1}
    assert on_gpu == {(*of, 60, "GMP"): 0.2, of: 0.2}
    assert [pace.expected(found, r.kind, 2) for r in (DENSE, large, gmp)] == [0.2, 2, 20]
    assert pace.expected(on_gpu, large.kind, 2) == 0.4
    assert pace.expected(found, replace(DENSE, dataset="mnist").kind, 2) is None


@pytest.mark.parametrize(
    ("rows", "weights", "left"),
    [("", "", "abcd"), ("abc", "c", "d"), ("abc", "", "abcd"), ("abc", "b", "cd"), ("c", "", "abcd"), ("d", "", "")],
)
def test_what_is_left_is_counted_with_what_it_starts_from(rows, weights, left):
    """A chain a → b → c → d, of which d is wanted."""
    found = pace.missing(
        "d", lambda one: [(chr(ord(one) - 1), True)] if one > "a" else [],
        lambda one, by_weights: one not in rows or (by_weights and one not in weights),
    )  # fmt: skip
    assert "".join(found) == left
    assert pace.missing("b", lambda one: [("a", False)] if one > "a" else [], lambda one, _: one not in "a") == ["b"]


def test_a_measurement_on_more_images_has_no_pace_of_one_on_few(tmp_path):
    opened, few = Store(tmp_path), grasp_init.Pruning("resnet8", "digits", (), criterion="dense", images=16)
    assert experiments.run([few], store=opened, progress=False) == []
    found, whole = pace.paces(opened), replace(few, images=50_000)
    assert pace.expected(found, replace(few, seed=1).kind, 1) == opened.get(few)["wall_s"]
    assert pace.expected(found, whole.kind, 1) is None
    assert pace.kind_of(whole.spec()) == whole.kind


def test_a_budget_does_not_take_the_pace_of_another_kind(tmp_path):
    opened, executor = Store(tmp_path), Inline()
    opened.put(fake(DENSE, wall_s=4e6))
    quick = replace(DENSE, recipe=replace(DENSE.recipe, batch_size=30))  # never timed: once
    assert experiments.run([quick], executor, budget=2e6, store=opened, progress=False) == []
    assert executor.ran == [quick]


# Where it is trained --------------------------------------------------------------------------------------------------


def test_a_worker_that_writes_to_another_folder_is_told_at_once(tmp_path, monkeypatch):
    class Astray(Inline):
        def submit(self, fn, runs, folder, *args):
            return super().submit(fn, runs, tmp_path / "worker", *args)

    monkeypatch.setattr(engine, "LATE", 0)
    mine, executor = Store(tmp_path / "mine"), Astray()
    with pytest.raises(FileNotFoundError, match=rf"^No result of <Run .*> is in {tmp_path}/mine, though ") as told:
        experiments.run(seeds(3), executor, store=mine, progress=False, slots=1)
    assert "\n" not in str(told.value)
    assert executor.ran == seeds(1)
    assert set(mine.failures()) == {DENSE.key}


def test_a_result_that_a_network_shows_late_is_waited_for(tmp_path, monkeypatch):
    find, late = Store.find, [True, True]
    monkeypatch.setattr(engine, "LOOK", 0)

    class Late(Inline):
        def submit(self, fn, *args):
            future = super().submit(fn, *args)
            monkeypatch.setattr(Store, "find", lambda self, key: iter(()) if late and late.pop() else find(self, key))
            return future

    train([DENSE], tmp_path, Late())
    assert not late


def test_workers_are_as_many_as_this_process_may_use_cores(tmp_path, monkeypatch):
    slots = []
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")  # as an affinity or a container's share limits it
    monkeypatch.setattr(engine, "_pool", lambda n: slots.append(n) or Inline())
    experiments.run(seeds(3), store=Store(tmp_path), progress=False)
    experiments.run(seeds(6), store=Store(tmp_path), progress=False, threads=2)
    assert slots == [2, 1]


class Remote(futures.Executor):
    """Workers of another machine, with a GPU or without; they train nothing, but a row is there."""

    def __init__(self, gpu, monkeypatch):
        self.gpu, self.monkeypatch, self.ran = gpu, monkeypatch, []

    def submit(self, fn, *args):
        future = futures.Future()
        with self.monkeypatch.context() as there:
            there.setattr(torch.cuda, "is_available", lambda: self.gpu)
            try:
                future.set_result(fn(*args) if fn is not work.execute else self.train(*args))
            except ValueError as error:
                future.set_exception(error)
        return future

    def train(self, runs, folder, also, keep, device, threads, compiled):
        self.ran += [(r, device, compiled) for r in runs]
        return sum(Store(folder).put(fake(r)) for r in runs)


def test_a_device_has_to_be_where_it_is_used(tmp_path, monkeypatch):
    """Not where the sweep is started; one look at a worker says so before anything is trained."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training, "can_compile", lambda device: True)
    here, how = {"store": Store(tmp_path), "progress": False}, {"device": "cuda", "compiled": True}
    without, there = Remote(False, monkeypatch), Remote(True, monkeypatch)
    for executor in (None, without):
        with pytest.raises(ValueError, match=message("Invalid device 'cuda': give cpu, or cuda where a GPU is ")):
            experiments.run([DENSE], executor, **how, **here)
    assert without.ran == []
    assert experiments.run([DENSE], there, **how, **here) == []
    assert there.ran == [(DENSE, "cuda", True)]
    with pytest.raises(ValueError, match=message("Invalid device 'cudaX': ")):
        experiments.run([DENSE], there, device="cudaX", **here)
