"""The engine: trains the runs that the store does not have, parents first, on any `concurrent.futures.Executor`."""

import concurrent.futures as futures
import contextlib
import functools
import itertools
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing import resource_tracker
from numbers import Real
from typing import TYPE_CHECKING

import torch

from lottery import models, training
from lottery.experiments import PAPERS, pace, papers
from lottery.experiments.leases import Leases, running
from lottery.experiments.runs import Measurement, Run
from lottery.experiments.store import DamagedWeights, Store
from lottery.experiments.work import execute, start
from lottery.files import CannotWrite
from lottery.methods import NOTHING, whole

if TYPE_CHECKING:
    from joblib.externals.loky import ProcessPoolExecutor

STOPS = (signal.SIGINT, signal.SIGTERM)  # an interrupt, from a keyboard or from whoever ends a job
TOGETHER = 64  # runs side by side on a GPU
LOOK = 2.0  # seconds between two looks at what other processes are training
LATE = 60.0  # seconds after which a network's file system shows what another machine has written


class WorkerDied(futures.BrokenExecutor):
    """A worker process ended without a word, as the system ends one for want of memory."""


class NotHere(FileNotFoundError):
    """A run was trained, but its result is not where this process looks for it."""


def run(
    runs: Iterable[Run | Measurement],
    executor: futures.Executor | None = None,
    budget: float | None = None,
    store: Store | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: bool = True,
    compiled: bool = False,
    slots: int | None = None,
    report: Callable[[list[Run | Measurement]], object] | None = None,
) -> list[Run | Measurement]:
    """Train what is missing of `runs` and of the parents they need; returns the runs left undone.

    Args:
        runs: Runs, most decisive first; long chains are kept busy before their side branches.
        executor: any `concurrent.futures.Executor` whose workers see the store's folder; default: one process per
            `threads` of the cores that this process may use on the CPU, this process on a GPU or for a single run.
        slots: how many trainings the executor is given at once; default: its own number of workers where it tells it.
        budget: seconds; no run starts that is expected to end after it. Of a kind (`Run.kind`) that was never timed on
            such a device one run starts alone, and may end later.
        device, threads, compiled: of one training, see `training.fit`. A device has to be where the training is: with
            an executor not here, but with its workers.
        report: called with what this call has trained, whenever some of it is kept; what another process trains in the
            same store is not among it.

    On a GPU up to `TOGETHER` runs of one fully connected network and one recipe train side by side.
    A run is kept the moment it ends. What another process is training in the same store is left to it, and trained here
    only if that one dies. An interrupt waits for the trainings of other processes that are under way and is raised; a
    second one abandons them; an executor of the caller's that trains in `submit` holds both back until its run has
    ended. A run that raises stops its own descendants only; it is noted in the store's folder `.failures`, and the
    first such error is raised at the end. Where nothing can be written, `files.CannotWrite` is raised before anything
    is trained; where that comes later, as on a full disk, nothing more starts.
    Runs whose worker process dies are trained once more, each alone, in new processes; the one of which it dies again
    is a run that raises, `WorkerDied`. An executor of the caller's that is broken raises that at once, and notes none.
    """
    from joblib.externals.loky import cpu_count  # of cores that this process may use: a job of a cluster has a few

    own = executor is None
    if not isinstance(budget, Real | None):
        raise ValueError(f"Invalid budget {budget!r}: give a number of seconds, or None.")
    check(device, threads, slots, own)
    runs, store = list(runs), store or Store()
    if todo := missing(runs, store):
        store.check()
        store.sweep()
    if todo and (compiled or (not own and device != "cpu")):
        can = _can(device, compiled) if own else executor.submit(_can, device, compiled).result()
        if compiled and not can:
            where = "here" if own else "with the workers"
            warnings.warn(f"No C++ compiler is {where}: trained without torch.compile.", stacklevel=2)
        compiled = can
    slots = slots or getattr(executor, "_max_workers", None) or max(1, cpu_count() // threads)
    slots = 1 if device != "cpu" and own else min(slots, len(todo) or 1)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_bar(len(todo), progress))
        leases = stack.enter_context(contextlib.closing(Leases(store.leases)))  # until the pool below has ended
        renew = (lambda: stack.enter_context(_pool(slots))) if own else None
        executor = renew() if own else executor
        how = (device, threads, compiled)
        sweep = _Sweep(
            runs, todo, store, executor, renew, slots, leases, _Clock(budget, store, device), how, bar, report
        )
        try:
            sweep.run()
        except KeyboardInterrupt:
            sweep.wait_or_abandon(own)
            raise
    if sweep.errors:
        raise sweep.errors[0]
    return missing(runs, store)


class _Sweep:
    """One call of `run`: what is to do, what is under way, what was given up."""

    def __init__(self, runs, todo, store, executor, renew, slots, leases, clock, how, bar, report=None):
        self.report = report or (lambda group: None)
        self.runs, self.todo, self.store, self.executor, self.renew = runs, todo, store, executor, renew
        self.slots, self.suspects = slots, set()  # suspects: during whose training a worker died, not yet trained alone
        self.leases, self.clock, self.how, self.bar = leases, clock, how, bar
        self.parents = {p for r in (*todo, *runs) if not getattr(r, "budget", None) for p in needs(r)}
        self.under_way, self.given_up, self.elsewhere, self.again, self.errors = {}, set(), set(), set(), []

    def run(self):
        while self.todo or self.under_way:
            self._drop()
            self._submit()
            if self.under_way:
                done, _ = futures.wait(self.under_way, LOOK if self.elsewhere else None, futures.FIRST_COMPLETED)
                for job in done:
                    self._finish(job)
            elif self.elsewhere:
                time.sleep(LOOK)
            self._look()

    def _drop(self):
        """Give up what needs a run that was given up; parents stand before their children."""
        for r in self.todo:
            if self.given_up.intersection(needs(r)):
                self.given_up.add(r)
        self.todo = _without(self.given_up, self.todo)

    def _submit(self):
        """Fill the free slots with what is ready and nobody else's."""
        waiting = {*self.todo, *(r for group in self.under_way.values() for r in group)}
        self.suspects &= waiting
        ready = [r for r in self.todo if r not in self.elsewhere and not waiting.intersection(needs(r))]
        ready = [r for r in ready if r in self.suspects] or ready
        while ready and len(self.under_way) < (1 if self.suspects else self.slots):
            device = self.how[0]
            group = [r for r in ready if _alike(r, device) == _alike(ready[0], device)][:TOGETHER]
            ready = _without(group, ready)
            if self.clock.is_timing(group, self.under_way.values()):
                continue
            if not self.clock.allows(group):
                self.given_up.update(group)
                self.todo = _without(group, self.todo)
                continue
            mine = self.leases.take([r.key for r in group])
            self.elsewhere.update(r for r in group if r.key not in mine)
            group = [r for r in group if r.key in mine]
            if done := [r for r in group if self._is_done(r)]:  # by another process, before its lease ended
                self._leave(done)
                group = _without(done, group)
            if group:
                self.todo = _without(group, self.todo)
                keep = [r in self.parents for r in group]
                # What an executor of the caller's starts meanwhile has to see the SIGTERM by which it may be ended.
                blocked = STOPS if self.renew else ()
                with contextlib.nullcontext() if isinstance(self.executor, _Here) else _uninterrupted(blocked):
                    job = self._start(execute, group, self.store.dir, self.store.also, keep, *self.how)
                    self.under_way[job] = group

    def _start(self, *call):
        try:
            return self.executor.submit(*call)
        except futures.BrokenExecutor:  # all that was under way has ended with that error, or will
            if not self.renew:
                raise WorkerDied(
                    "The executor's workers died, most likely for want of memory: run again with fewer side by side; "
                    "what is finished is kept."
                ) from None
            self.executor = self.renew()
            return self.executor.submit(*call)

    def _finish(self, job):
        group = self.under_way.pop(job)
        error = job.exception()
        if isinstance(error, DamagedWeights) and not self.again.intersection(group):
            self.leases.release([r.key for r in group])
            self._plan_again(group)
            return
        if _died(error) and not self.suspects.issuperset(group):
            self.suspects.update(group)
            self.todo = [*group, *self.todo]
            return
        if _died(error):
            error = WorkerDied(
                f"The process that trained {group[0]!r} died, and again when nothing else was trained, most likely for "
                "want of memory: give it more, then run again."
            )
        if not error and (lost := [r for r in group if not self._arrived(r)]):
            error = NotHere(
                f"No result of {lost[0]!r} is in {self.store.dir}, though it was trained: the worker wrote to another "
                "folder of that name; give the full path of one that this process and the workers share."
            )
        if error:
            self.errors.append(error)
            self.given_up.update(group)
            for r in group:
                self.store.note_failure(r.key, error)
            if isinstance(error, CannotWrite | NotHere):  # nor could what comes after it be kept
                self.given_up.update(self.todo)
        else:
            self.clock.finished(group, job.result())
            for r in group:
                self.store.note_failure(r.key, None)
            self.bar.update(len(group))
            self.report(group)
        self.leases.release([r.key for r in group])

    def _arrived(self, r):
        """Whether a result that a worker has written can be read here."""
        end = time.monotonic() + LATE
        while not (found := any(self.store.find(r.key))) and time.monotonic() < end:
            time.sleep(LOOK)
        return found

    def _plan_again(self, group):
        """The weights that a group starts from were damaged and are set aside: they are trained again first, once."""
        self.again.update(group)
        busy = self.given_up.union(*self.under_way.values())
        self.todo = [r for r in missing(self.runs, self.store) if r not in busy]
        self.parents.update(p for r in self.todo if not getattr(r, "budget", None) for p in needs(r))

    def _look(self):
        """What was another process's and is stored now, or free again."""
        self._leave([r for r in self.elsewhere if self._is_done(r)])
        self.elsewhere.clear()

    def _is_done(self, r):
        return self.store.get(r) and (r not in self.parents or self.store.artifact(r.key).exists())

    def _leave(self, done):
        self.todo = _without(done, self.todo)
        self.elsewhere.difference_update(done)
        self.leases.release([r.key for r in done])
        self.bar.update(len(done))

    def wait_or_abandon(self, own):
        """After an interrupt: wait for what is under way; after another one do not."""
        n = sum(map(len, self.under_way.values()))
        if n:
            what = f"{n} trainings under way have" if n > 1 else "training under way has"
            self.bar.write(f"Stopping when the {what} ended; interrupt again to abandon.")
        try:
            futures.wait(self.under_way)
        except KeyboardInterrupt:
            if own:
                self.executor.shutdown(wait=False, kill_workers=True)
            raise
        if n:
            ended = [job for job in self.under_way if not job.cancelled() and not job.exception()]
            for job in ended:
                self.report(self.under_way[job])
            kept = sum(len(self.under_way[job]) for job in ended)
            self.bar.write(f"Stopped: {kept} of {n} kept.")


def check(device: str, threads: int = 1, slots: int | None = None, here: bool = True) -> None:
    """Raises ValueError for a device that is none or, with `here`, not here, and for numbers of threads or slots.

    here: whether this machine trains, not an executor's.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise ValueError(f"Invalid device {device!r}: give cpu, or cuda where a GPU is present.")
    for name, value in (("threads", threads), ("slots", 1 if slots is None else slots)):
        whole(name, value)
    if here and device != "cpu" and slots not in (None, 1):
        raise ValueError(f"Invalid slots {slots} with device {device}: here a GPU trains in one process; leave it out.")
    if here and device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"Invalid device {device!r}: give cpu, or cuda where a GPU is present.")


def _can(device, compiled):
    """Whether `compiled` can be had where this runs; raises ValueError where the device cannot."""
    check(device)
    return compiled and training.can_compile(device)


def needs(r: Run | Measurement) -> set[Run]:
    """The runs whose final weights this one starts from or is measured against."""
    if isinstance(r, Measurement):
        return set(r.trained)
    return ({r.parent, r.root} if r.init == "survivors" else {r.parent}) - {None}


def missing(runs: Iterable[Run | Measurement], store: Store) -> list[Run | Measurement]:
    """Runs to train so that all of `runs` are stored, longest chain first.

    A missing run needs its parent's weights, or only what is stored of it where it takes the budget."""
    todo = pace.missing(
        runs,
        lambda r: [(p, not getattr(r, "budget", None)) for p in needs(r)],
        lambda r, weights: not store.get(r) or (weights and not store.artifact(r.key).exists()),
    )
    depth = dict.fromkeys(todo, 0)
    for r in reversed(todo):
        for p in needs(r) & depth.keys():
            depth[p] = max(depth[p], depth[r] + 1)
    return sorted(todo, key=lambda r: -depth[r])


def drop_weights(store: Store) -> int:
    """Remove the final weights from which no declared run that is missing starts; returns how many there were.

    What starts from them later, such as another paper's item or a run of one's own, has them trained again. Raises
    ValueError while a training is under way in the store.
    """
    if busy := running(store.leases):
        raise ValueError(f"Trainings under way in {store.dir}, {len(busy)} of them: drop weights when they have ended.")
    declared = (m.runs(None, scale) for m in map(papers.paper, PAPERS) for scale in m.scales)
    left = missing(itertools.chain.from_iterable(declared), store)
    wanted = {p.key for r in left if not getattr(r, "budget", None) for p in needs(r)}
    gone = [path for path in (store.dir / ".artifacts").glob("*.safetensors") if path.stem not in wanted]
    for path in gone:
        path.unlink(missing_ok=True)
    return len(gone)


def _alike(r, device):
    """What runs have in common that may train side by side; on a CPU processes are faster, so nothing."""
    if device == "cpu" or isinstance(r, Measurement) or r.method != NOTHING:
        return r.key
    if not _fully_connected(r.model, r.dataset, r.options, r.recipe):
        return r.key
    split = (r.valid, r.balanced, r.split_seed, r.train_fraction)
    return r.model, r.dataset, r.options, split, r.recipe, start(r)


@functools.cache
def _fully_connected(model, dataset, options, recipe):
    return training.populations([models.on_set(model, dataset, options)], recipe)


def _without(some, runs):
    some = set(some)
    return [r for r in runs if r not in some]


def _died(error):
    """Whether a future's error is that its process ended; Dask's own class is known by its name."""
    return isinstance(error, futures.BrokenExecutor) or type(error).__name__ == "KilledWorker"


class _Clock:
    """Expected duration of a run: seconds per unit of work of the last of its kind in this call, or of those stored."""

    def __init__(self, budget, store, device):
        self.end = None if budget is None else time.monotonic() + budget
        self.pace = {} if budget is None else pace.paces(store, device)

    def is_timing(self, group, under_way):
        """Whether a run like these, which nobody has timed, is under way: they wait, so that no more is overrun."""
        unknown = {r.kind for r in group} - self.pace.keys()
        return self.end is not None and any(r.kind in unknown for others in under_way for r in others)

    def allows(self, group):
        expected = sum(self.pace.get(r.kind, 0) * r.work for r in group)
        return self.end is None or time.monotonic() + expected <= self.end

    def finished(self, group, wall_s):
        for r in group:
            self.pace[r.kind] = wall_s / len(group) / r.work


class _Here(futures.Executor):
    """Runs at once, in this process."""

    def submit(self, fn, /, *args, **kwargs):
        future = futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _pool(slots):
    return _Here() if slots == 1 else processes(slots)


def processes(n: int) -> "ProcessPoolExecutor":
    """Worker processes; loky's do not import the caller's __main__, so an unguarded script or stdin works too."""
    from joblib.externals.loky import ProcessPoolExecutor

    resource_tracker.ensure_running()  # lets signals through when it starts, else in `submit` with the first worker

    class Pool(ProcessPoolExecutor):
        def submit(self, *args, **kwargs):
            with _uninterrupted():  # a worker that still starts would die of a signal, and its run with it
                return super().submit(*args, **kwargs)

    return Pool(n, initializer=_worker, initargs=(os.getpid(),))


@contextlib.contextmanager
def _uninterrupted(blocked=STOPS):
    """A signal to stop waits until the end; processes that are started meanwhile never see one that is blocked.

    They inherit the mask. Here it is not enough: another thread is given the signal, and this one runs its handler.
    """
    arrived, handlers, here = [], {}, os.getpid()

    def later(number, frame):
        arrived.append(number) if os.getpid() == here else handlers[number](number, frame)  # as before in a fork

    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        for stop in STOPS if threading.current_thread() is threading.main_thread() else ():
            if callable(handler := signal.getsignal(stop)):
                handlers[stop] = handler
                signal.signal(stop, later)
        yield
    finally:
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for stop in dict.fromkeys(arrived):
            signal.raise_signal(stop)


def _worker(parent):
    for stop in STOPS:  # the parent decides; a batch system signals every process of a job
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent):
    """End this process when its parent has gone, killed without a word: nobody would, and it holds a GB."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class _Lines:
    """What tqdm draws on a terminal, in a log: a line a minute at most."""

    def __init__(self, total):
        self.total, self.done, self.last = total, 0, time.monotonic()

    def update(self, n):
        self.done += n
        if time.monotonic() - self.last >= 60:
            self.last = time.monotonic()
            self.write(f"{time.strftime('%H:%M:%S')}  {self.done} of {self.total} runs")

    def write(self, text):
        print(text, file=sys.stderr, flush=True)


def _bar(total, progress):
    from tqdm import tqdm

    if progress and not sys.stderr.isatty():
        return contextlib.nullcontext(_Lines(total))
    return tqdm(total=total, unit="run", disable=not progress)
