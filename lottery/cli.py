"""The command line: `lottery run | status | merge | scorecard | audit | bench | prune`."""

import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from pathlib import Path
from typing import Annotated

import typer

from lottery import __version__, files, names
from lottery.experiments import PAPERS

WATCH = 10  # seconds between two looks of `status --watch`
LEFT = 3  # exit status of `run` when runs are left, so that a script can go on until none are
TRACEBACK = "LOTTERY_TRACEBACK"  # set in the environment: errors with all that Python says of them

EXAMPLES = """For example: lottery run lth fig4 --scale smoke · lottery run grasp table1 --budget 20m ·
lottery scorecard --paper lth"""
app = typer.Typer(
    help=__doc__, epilog=EXAMPLES, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

ResultsDir = Annotated[Path | None, typer.Option(help="The store; default: results/ours of the clone around here.")]
Scale = Annotated[str, typer.Option(help="paper, primary (lth), laptop or smoke.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _version(asked: bool):
    if asked:
        typer.echo(f"lottery {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """What holds for every command."""


def kind_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Every error is one line on stderr and exit status 2, or LEFT where only workers are gone; never a traceback."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        # Of --out=~/x a shell does not make the home folder.
        kwargs = {name: files.path_of(v) if isinstance(v, Path) else v for name, v in kwargs.items()}
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:  # the reader, head or less, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:  # a training, a user's module: whatever they raise
            if isinstance(error, typer.Exit) or os.environ.get(TRACEBACK):
                raise
            gone = isinstance(error, BrokenExecutor | CancelledError)
            hint = "start it again for what is left" if gone else f"{TRACEBACK}=1 shows where"
            plain = isinstance(error, ValueError | OSError | ImportError) and str(error)
            text = _said(error).partition(": ")[2] if plain else f"{_said(error)} ({hint})"
            typer.echo(f"lottery: {text}", err=True)
            raise typer.Exit(LEFT if gone else 2) from None

    return wrapped


def _stoppable():
    """Be stopped as by ^C: by a batch system or a container, and in the background of a script, where ^C is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _said(error):
    """The kind of an error and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


@app.command()
@kind_errors
def run(
    paper: Annotated[str, typer.Argument(help=f"One of {', '.join(PAPERS)}.")],
    items: Annotated[
        list[str] | None,
        typer.Argument(help="fig3, table1, …, or claims by their ids, lth-fig4-accuracy-13, …; default: all figures."),
    ] = None,
    scale: Scale = "laptop",
    trials: Annotated[int | None, typer.Option(help="Seeds 0 … trials − 1; default: the scale's or claim's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of one training; more trainings run side by side.")] = 1,
    budget: Annotated[
        str | None,
        typer.Option(help="Such as 90s, 20m, 2h: starts nothing expected to end later; what was never timed, once."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Train torch.compile of convolutional networks; needs a C++ compiler.")
    ] = False,
    retry: Annotated[str | None, typer.Option(help="failed: only what ended without a result before.")] = None,
    where: Annotated[
        str | None,
        typer.Option("--executor", help="local:4 processes, dask://host:port, or module:attribute, an Executor."),
    ] = None,
    results_dir: ResultsDir = None,
) -> None:
    """Train what the store does not have yet of a paper's figures, tables or claims. Interrupt and repeat at will.

    Exit status 3 says that runs are left, and that nothing was wrong but a lack of time or a worker that was killed.
    """
    from lottery import experiments
    from lottery.experiments import engine

    runs, store = _asked(paper, items, scale, trials), experiments.Store(results_dir)
    if retry not in (None, "failed"):
        raise ValueError(f"Invalid retry {retry!r}: give 'failed', or leave it out to train all that is missing.")
    if retry:
        failed = store.failures()
        runs = [r for r in engine.missing(runs, store) if r.key in failed]
    executor, slots = _executor(where)
    seconds = None if budget is None else _seconds(budget)
    engine.check(device, threads, slots, here=executor is None)
    before, trained = {r for r in runs if store.get(r)}, set()
    _stoppable()
    try:
        how = {"device": device, "threads": threads, "compiled": compiled, "report": trained.update}
        experiments.run(runs, executor, budget=seconds, store=store, slots=slots, **how)
    except BrokenExecutor as error:
        if store.failures().keys() & {r.key for r in engine.missing(runs, store)}:  # a run that ends any worker
            raise ValueError(error) from error
        raise
    finally:
        new = {r for r in runs if store.get(r)} - before
        left, others = len(runs) - len(before) - len(new), len(new - trained)
        elsewhere = f", {others} trained by others meanwhile" if others else ""
        counts = f"{len(before)} were stored, {len(new & trained)} trained now{elsewhere}, {left} left"
        typer.echo(f"{len(runs)} runs: {counts}.")
    if left:
        raise typer.Exit(LEFT)


@app.command()
@kind_errors
def status(
    paper: Annotated[str | None, typer.Option(help=f"One of {', '.join(PAPERS)}; default: all.")] = None,
    scale: Annotated[str | None, typer.Option(help="paper, primary (lth), laptop or smoke; default: all.")] = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every ten seconds, until interrupted.")] = False,
    results_dir: ResultsDir = None,
) -> None:
    """What is stored, under way, failed and missing, per paper, item and scale, and how long the rest would take."""
    while True:
        told = _progress(_stored(results_dir), paper, scale)
        lines = [json.dumps(told)] if as_json else _progress_lines(told)
        clear = "\033[H\033[2J" if watch and not as_json and sys.stdout.isatty() else ""
        typer.echo(clear + "\n".join(lines))
        if not watch:
            return
        time.sleep(WATCH)


def _progress(store, paper, scale):
    """What `status --json` prints."""
    from lottery.experiments import leases, pace

    stored, failed, paces = store.columns("status"), store.failures(), pace.paces(store)
    running, items, (declared, graph) = leases.running(store.leases), [], _declared()
    for what, asked in (("paper", paper), ("scale", scale)):
        known = list(dict.fromkeys(line[what] for line, _ in declared))
        if asked not in (None, *known):
            raise ValueError(f"Unknown {what} {asked!r}: choose from {', '.join(known)}.")
        declared = [one for one in declared if asked in (None, one[0][what])]
    weights = functools.cache(lambda key: store.artifact(key).exists())
    for line, runs in declared:
        found = [stored[key][0] for key in runs if key in stored]
        todo = pace.missing(
            runs,
            lambda key: [(p, graph[key][3]) for p in graph[key][2]],
            lambda key, by_weights: key not in stored or (by_weights and not weights(key)),
        )
        left = [pace.expected(paces, tuple(graph[key][0]), graph[key][1]) for key in todo]
        items.append(
            {
                **line,
                "stored": len(found),
                "runs": len(runs),
                "diverged": found.count("diverged"),
                "running": sum(key in running for key in runs),
                "failed": sum(key in failed for key in runs),
                "core_seconds_left": None if None in left else round(sum(left)),
            }
        )
    under_way = [{"key": key, **owner} for key, owner in running.items()]
    failures = [{"key": key, **said} for key, said in failed.items()]
    head = {"schema": 1, "stored": len(stored), "folder": str(store.dir)}
    return {**head, "items": items, "running": under_way, "failed": failures}


def _progress_lines(told):
    """The same for a terminal."""
    lines = [f"{told['stored']} runs are stored in {told['folder']}."]
    for line in told["items"]:
        more = [f"{line[what]} {what}" for what in ("running", "failed", "diverged") if line[what]]
        if line["stored"] < line["runs"] and line["core_seconds_left"] is not None:
            more.append(f"{_hours(line['core_seconds_left'])} of one core left")
        head = f"{line['paper']} {line['item']:22} {line['scale']:7} {line['stored']:4} of {line['runs']:4} runs"
        lines.append(", ".join([head, *more]))
    lines += [f"running {r['key']} on {r['host']}, process {r['pid']}, since {r['since']}" for r in told["running"]]
    lines += [f"failed {r['key']} at {r['when']}: {r['reason']}" for r in told["failed"]]
    return lines


def _hours(seconds):
    """7,260 → "2.0 hours", 90 → "2 minutes"."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{max(1, round(seconds / 60))} minutes"


@app.command()
@kind_errors
def merge(
    source: Annotated[Path | None, typer.Argument(help="Another store; default: this store's own spool.")] = None,
    drop_weights: Annotated[
        bool, typer.Option("--drop-weights", help="Remove weights that no missing run of the papers starts from.")
    ] = False,
    results_dir: ResultsDir = None,
) -> None:
    """Pack finished runs into shards that can be committed."""
    from lottery import experiments
    from lottery.experiments import engine

    if source is not None and not source.is_dir():
        raise FileNotFoundError(f"No folder {source}: name the results folder to take runs from.")
    store = experiments.Store(results_dir) if source else _stored(results_dir)
    if source and source.resolve() == store.dir.resolve():
        source = None
    typer.echo(f"{store.merge(source)} runs packed into {store.dir}.")
    if drop_weights:
        typer.echo(f"{engine.drop_weights(store)} files of weights removed.")


@app.command()
@kind_errors
def scorecard(
    paper: Annotated[str | None, typer.Option(help=f"One of {', '.join(names.PAPERS)}; default: all.")] = None,
    as_json: Json = False,
    results_dir: ResultsDir = None,
) -> None:
    """Every claim: the paper's value, ours, interval, verdict."""
    from lottery import scorecard as cards

    card = cards.scorecard(paper, _stored(results_dir))
    typer.echo(json.dumps(card, allow_nan=False) if as_json else cards.text(card))


@app.command()
@kind_errors
def audit(
    key: Annotated[str | None, typer.Argument(help="One stored run; default: a sample.")] = None,
    n: Annotated[
        int | None,
        typer.Option("--runs", help="How many are drawn, by turns from each paper and evidence; default: 30."),
    ] = None,
    by: Annotated[
        str | None, typer.Option("--commit", help="The hash to draw by; default: the clone's commit.")
    ] = None,
    prefix: Annotated[
        bool, typer.Option("--prefix", help="Only the first 500 steps of what is drawn; its parents in full.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Chains of trainings side by side.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    look: Annotated[bool, typer.Option("--list", help="Only name what is drawn and the time it takes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything that came out.")] = None,
    results_dir: ResultsDir = None,
) -> None:
    """Train stored results again, from nothing, and compare. Exit status 1: one does not come out, unexplained."""
    from lottery.experiments import audit as audits
    from lottery.experiments import engine

    _stoppable()
    engine.check(device)
    for name, value in (("runs", n), ("jobs", jobs)):
        if value is not None and value < 1:
            raise ValueError(f"Invalid {name} {value}: give a whole number from 1.")
    if key and n:
        raise ValueError(f"Invalid runs {n} with a key: that run alone is trained, nothing is drawn; leave one out.")
    if json_file:
        _check_file(json_file)
    store = _stored(results_dir)
    known, by = audits.declared(store), by or ("" if key else audits.commit())
    if key and key not in known:
        raise ValueError(f"No declared run is stored under {key!r}: `lottery audit --list` names some.")
    keys, began = [key] if key else audits.draw(known, n or 30, by), time.monotonic()
    for name in keys if look else ():
        typer.echo(f"{name} {known[name].paper} {known[name].item}, {known[name].evidence}: {known[name].run!r}")
    todo = [known[name].run for name in keys]
    typer.echo(f"{len(audits.needed(todo))} trainings, {_hours(audits.seconds(todo, store, prefix))} of one core.")
    if look:
        return

    def keep(found):
        kept = audits.record(found, store, by, prefix, time.monotonic() - began, device)
        if json_file:
            audits.write(kept, json_file)
        return kept

    tell = lambda run: typer.echo(f"{run['key']} {run['outcome']}{run['reason'] and ': '}{run['reason']}")  # noqa: E731
    found = audits.audit(keys, known, store, prefix, jobs, device, tell, keep)
    typer.echo(audits.said(keep(found)))
    if any(run["outcome"] in audits.BAD for run in found):
        raise typer.Exit(1)


@app.command()
@kind_errors
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks; default: all but the slow ones.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything that was measured.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Repeats of each measurement, in turn with what it is compared to.")] = 3,
    small: Annotated[bool, typer.Option("--small", help="Minutes in all: to see that everything runs.")] = False,
) -> None:
    """Time everything beside plain reference loops, in the same run: 10 minutes in which the machine is left alone."""
    from lottery.experiments import engine

    tests = Path(__file__).parents[1] / "tests"
    if not (tests / "benchmarks").is_dir():
        raise FileNotFoundError("No benchmarks here: they come with a clone of the repository, in tests/benchmarks.")
    engine.check(device)
    if repeats < 1:
        raise ValueError(f"Invalid repeats {repeats}: give a whole number from 1.")
    if json_file:
        _check_file(json_file)
    sys.path.insert(0, str(tests))
    from benchmarks import workloads

    for found in workloads.run(names or [], workloads.Options(device, repeats, small), typer.echo):
        if json_file:  # after each benchmark, so that an interrupt loses only the one under way
            files.write(json_file, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


@app.command()
@kind_errors
def prune(
    model: Annotated[
        str, typer.Argument(help="module:factory, a function or class without arguments, or a model here.")
    ],
    data: Annotated[str, typer.Option(help="A folder of images by class, a parquet file or folder, or a set: digits.")],
    method: Annotated[str, typer.Option(help="lth, gmp, str, …; an unknown one is answered with the list.")] = "lth",
    density: Annotated[float, typer.Option(help="Fraction of the weights to keep.")] = 0.1,
    out: Annotated[
        Path, typer.Option(help="Folder for the model, the ticket and the report, in the place of earlier ones.")
    ] = Path("pruned"),
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to start from: a state dict or safetensors.")] = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels that images of a folder are resized to.")] = None,
    grey: Annotated[bool, typer.Option("--grey", help="One channel instead of three.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="A layer to leave alone, or a pattern; repeat.")] = None,
    options: Annotated[list[str] | None, typer.Option("--option", help="name=value of the method; repeat.")] = None,
    epochs: Annotated[int, typer.Option(help="Of one training.")] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate of SGD.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the order of examples and what the method draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too, checked in onnxruntime.")] = False,
) -> None:
    """Prune a model of your own on data of your own to a density, train it, and write it without lottery in it."""
    import dataclasses

    from lottery import data as sets
    from lottery import export, own, training
    from lottery.experiments import engine

    engine.check(device)
    chosen = dict(_option(text) for text in options or ())
    own.check_options(method, chosen)
    for name, value in (("epochs", epochs), ("size", size)):
        if value is not None and value < 1:
            raise ValueError(f"Invalid {name} {value}: give a whole number from 1.")
    pictures = {name: value for name, value in (("size", size), ("grey", grey)) if value}
    if pictures and data in sets.SETS:
        raise ValueError(f"Invalid {next(iter(pictures))}: the pictures of {data} stay as they are; leave it out.")
    if onnx:
        export.runtime()
    _check_folder(out)
    examples = sets.of(data, **pictures)
    net = _model(model, examples)
    training.check_tensors(net)
    if checkpoint:
        own.load(net, checkpoint)
    default = own.default_recipe(examples)
    recipe = dataclasses.replace(default, lr=lr, iterations=epochs * default.lr_every)
    found = own.prune(
        net.to(device), examples, method, density, recipe=recipe, skip=tuple(skip or ()), seed=seed, **chosen
    )
    written = ["model.safetensors", "report.json", "ticket.safetensors"]
    found.save(out)
    (out / "model.onnx").unlink(missing_ok=True)  # it is of an earlier network
    if onnx:
        try:
            written.insert(0, found.export(out / "model.onnx").name)
        except Exception as error:  # the exporter raises whatever it likes
            raise ValueError(f"No {out / 'model.onnx'} ({_said(error)}); {', '.join(written)} are there.") from error
    typer.echo(found)
    typer.echo(f"written: {', '.join(written)} in {out}")


def _model(name, examples):
    """A model by `module:factory`, or by its name in `lottery.models`."""
    from torch import nn

    from lottery import models

    if name in models.MODELS:
        return models.create(name, in_shape=tuple(examples.train.x.shape[1:]), classes=examples.classes)
    known = ", ".join(models.MODELS)
    return _named(name, nn.Module, "model", f"module:factory, such as mynet:Net, or one of {known}")


def _named(text, kind, what, hint):
    """What `module:name` is: a `kind`, or what makes one when it is called.

    The module may lie in the working directory, which stays on the path as with `python -m`: workers look there too.
    Raises ValueError with one line for whatever its import or the call raises.
    """
    import importlib

    module, _, name = text.partition(":")
    if not (module and name):
        raise ValueError(f"Invalid {what} {text!r}: give {hint}.")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
        found = found if isinstance(found, kind) else found()
    except (Exception, SystemExit) as error:  # a script that parses arguments exits
        raise ValueError(f"Invalid {what} {text!r}: {_said(error)}.") from error
    if not isinstance(found, kind):
        raise ValueError(f"Invalid {what} {text!r}: a {type(found).__name__} is no {kind.__module__}.{kind.__name__}.")
    return found


def _check_file(path):
    """Raise ValueError or OSError where a file cannot be written; nothing is left there."""
    if path.is_dir():
        raise ValueError(f"Invalid json {path}: it is a folder; name a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"No folder {path.parent}: make it first, or name another file.")
    with files.temporary(path):
        pass


def _check_folder(out):
    """Raise `files.CannotWrite` where a folder cannot be made or written into; nothing is left there."""
    there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    with files.temporary(there / "model.safetensors"):
        pass


def _option(text):
    """'rounds=3' → ("rounds", 3): a number, true, false or a word."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"Invalid option {text!r}: give name=value, such as rounds=3.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _stored(results_dir):
    """The store to read from: one that is not there is a typing error, not an empty one."""
    from lottery.experiments import Store

    store = Store(results_dir)
    if not store.dir.exists():
        raise FileNotFoundError(f"No folder {store.dir}: name one that `lottery run --results-dir` has made.")
    return store


def _declared():
    """[{paper, item, scale, iterations}, keys of its runs] of all that is declared; what these and their parents are.

    What one is, by its key: kind, work, the keys of what it starts from, and whether from their weights.

    A process of its own finds them in the user's cache while the code is the same: declaring imports PyTorch.
    """
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))))
    cache = files.of_user("cache") / "declared.json"
    if "torch" in sys.modules:
        return _declare()
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads(files.read(cache))
        if kept["code"] == code.hexdigest():
            return kept["declared"]
    declared = _declare()
    with contextlib.suppress(OSError):
        files.write(cache, json.dumps({"code": code.hexdigest(), "declared": declared}).encode())
    return declared


def _declare():
    from lottery.experiments import engine, papers

    declared, graph = [], {}
    for paper in PAPERS:
        module = papers.paper(paper)
        for scale in module.scales:
            for item in module.items:
                runs = module.runs(item, scale)
                line = {"paper": paper, "item": item, "scale": scale, "iterations": sum(r.work for r in runs)}
                todo = [*runs]
                while todo:
                    if (r := todo.pop()).key not in graph:
                        todo += (starts := engine.needs(r))
                        graph[r.key] = r.kind, r.work, [p.key for p in starts], not getattr(r, "budget", None)
                declared.append((line, [r.key for r in runs]))
    return declared, graph


def _asked(paper, items, scale, trials):
    """The Runs of a paper's figures, tables and claims at a scale; trials: another number than their own."""
    from lottery import scorecard
    from lottery.experiments import papers

    module = papers.paper(paper)
    at = module.override(module.setting(scale), trials=trials)
    claims = [item for item in items or () if item.startswith(f"{paper}-")]
    figures = [item for item in items or () if item not in claims]
    runs = module.runs(figures, at) if figures or not claims else []
    return list(dict.fromkeys([*runs, *(scorecard.runs(paper, claims, scale, trials) if claims else ())]))


def _executor(text):
    """(executor, slots) of `--executor`; None for this machine's processes.

    Raises ValueError with one line for what cannot be had.
    """
    if text is None:
        return None, None
    kind, _, rest = text.partition(":")
    if kind == "local":
        if not re.fullmatch(r"[1-9]\d{0,3}", rest):
            raise ValueError(f"Invalid executor {text!r}: give local: and a number of processes, such as local:4.")
        return None, int(rest)
    if text.startswith("dask://"):
        return _dask(text.removeprefix("dask://"))
    return _named(text, Executor, "executor", "local:4, dask://host:port or module:attribute"), None


def _dask(address, timeout="10s"):
    """The executor of a Dask cluster, and how many threads its workers have."""
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("Invalid executor: Dask is not installed; in the clone, pip install '.[cluster]'.") from None
    try:
        client = Client(f"tcp://{address}", timeout=timeout)
    except OSError as error:
        raise ValueError(f"No Dask scheduler at {address}: {error}") from None
    if not (slots := sum(client.nthreads().values())):
        start = f"dask worker tcp://{address} --nthreads 1 --nworkers N"
        raise ValueError(f"The Dask scheduler at {address} has no worker: start one for each core, {start}.")
    return client.get_executor(pure=False), slots


def _seconds(text):
    """'90s', '20m', '2h' → seconds."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)):
        raise ValueError(f"Invalid budget {text!r}: give a number and s, m or h, such as 20m.")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
