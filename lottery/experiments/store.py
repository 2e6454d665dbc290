"""The store: finished runs as data, append-only, readable with pandas.

`results/ours/*.parquet` are the shards, one row a run, committed. Beside them, ignored by git, lie `.spool/` (a file
per finished run, written by rename, until `merge` packs it into a shard) and `.artifacts/` (final weights, as
safetensors, that a child still needs). A run is found by its key; what is damaged is named on stderr, passed over and
trained again, never deleted.
"""

import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Container, Iterable, Iterator, KeysView, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lottery import files
from lottery.experiments.leases import Leases

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch

    from lottery.experiments.runs import Measurement, Run

SHARD = 300  # runs in one shard
MASK_LIMIT = 500_000  # masks of larger networks are not stored with the run
PARTS = (".spool", ".artifacts", ".checkpoints", ".failures", ".leases")
KEY = re.compile("[0-9a-f]{24}")
MOST = 2**28  # bytes that a file of runs may hold when it is unpacked; the largest here hold 4 MB

READING = {"step": "int64", "val_loss": "double", "val_acc": "double", "test_acc": "double", "train_acc": "double"}


@functools.cache
def schema() -> "pa.Schema":
    """The columns of a run, as a pyarrow schema."""
    import pyarrow as pa

    text = ("key", "parent", "model", "dataset", "fingerprint", "init", "status", "started", "device")
    columns = dict.fromkeys(text, pa.string())
    columns |= dict.fromkeys(("seed", "level", "draw", "iterations", "n_valid", "n_test"), pa.int64())
    columns |= {"density": pa.float64(), "wall_s": pa.float64(), "censored": pa.bool_()}
    for r in ("early_stop", "last"):
        columns |= {f"{r}_{name}": pa.type_for_alias(kind) for name, kind in READING.items()}
        columns[f"{r}_correct"] = pa.binary()
    columns |= {"step": pa.list_(pa.int32())}
    columns |= dict.fromkeys(("val_loss", "val_acc", "test_acc"), pa.list_(pa.float32()))
    columns |= {"mask": pa.binary()}
    columns |= dict.fromkeys(("spec", "layers", "train_loss", "certificate", "payload_sha"), pa.string())
    columns |= dict.fromkeys(("test_loss", "batch_loss"), pa.list_(pa.float32()))  # None in the first runs
    columns["moves"] = pa.string()  # of runs from "survivors", none in the first runs
    columns |= {"values": pa.string(), "sketch": pa.binary()}  # of measurements
    columns["numbers"] = pa.string()  # what a method keeps at each reading, JSON {name: values}
    return pa.schema(list(columns.items()))


def root() -> Path:
    """`results` of the clone around the working directory. Raises FileNotFoundError outside of a clone."""
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "results").is_dir() and (folder / "lottery").is_dir():
            return folder / "results"
    raise FileNotFoundError(f"No results folder around {here}: work inside a clone, or name one with --results-dir.")


class DamagedWeights(ValueError):
    """Weights that are not what was written; they are set aside when this is raised."""


class Store:
    """Runs under `results_dir` (default: `results/ours` of the clone), and read-only under `also`."""

    def __init__(self, results_dir=None, also=()):
        # Absolute: they are told to workers, which need not be where this process is or will be.
        self.dir = files.path_of(results_dir).absolute() if results_dir else root() / "ours"
        also = [also] if isinstance(also, str | Path) else also
        self.also = [files.path_of(folder).absolute() for folder in also]
        for folder in (self.dir, *self.dir.parents, *(self.dir / name for name in PARTS)):
            if folder.is_file():  # the null device is none: who has no home has results in no folder
                raise NotADirectoryError(f"Invalid results folder {folder}: it is a file; name a folder.")
        self._forget()

    def _forget(self):
        """Nothing has been read yet."""
        self._folders, self._tables, self._places, self._rows, self._from, self._compared = {}, {}, {}, {}, {}, {}

    def keys(self) -> KeysView[str]:
        """The keys that are stored, none of them checked; files that were read before are not read again."""
        for folder in (f for base in (self.dir, *self.also) for f in (base, base / ".spool")):
            changed = folder.stat().st_mtime_ns if folder.is_dir() else None
            if self._folders.get(folder) == changed:
                continue
            self._folders[folder] = changed
            for path in sorted(folder.glob("*.parquet")):
                self._note(path)
        return self._places.keys()

    def _note(self, path):
        """Where the runs of a file lie, unless it is gone: packed into a shard by another process."""
        with contextlib.suppress(FileNotFoundError):
            stamp = _stamp(path)
            if self._tables.get(path, (None,))[0] == stamp:
                return
            # A shard stays, so its runs are read when they are asked for; a file of the spool may be gone by then.
            table = _table(path) if path.parent.name == ".spool" else None
            self._tables[path] = stamp, table
            for i, key in enumerate(_keys(path, stamp) if table is None else table["key"].to_pylist()):
                self._places.setdefault(key, []).append((path, i))

    def columns(self, *names: str) -> dict[str, tuple[Any, ...]]:
        """`{key: values}` of a few columns of all that is stored. Unchecked: for counts and paces, not for results."""
        self.keys()
        found = {}
        for path, (_, table) in self._tables.items():
            with contextlib.suppress(FileNotFoundError):  # a shard that a checkout of another commit has taken
                table = _table(path, ["key", *names]) if table is None else table
                for key, *values in zip(*(table[name].to_pylist() for name in ("key", *names)), strict=True):
                    found.setdefault(key, tuple(values))
        return found

    def row(self, key: str) -> dict[str, Any] | None:
        """The sound row of a key, or None. It is read and checked when it is first asked for."""
        if key not in self._rows and not (key in self.keys() and self._places[key]):
            # A listing may be late, as a folder's time has ticks and NFS keeps it for a while: a name is asked for.
            for folder in (self.dir, *self.also):
                self._note(folder / ".spool" / f"{key}.parquet")
        while key not in self._rows and (places := self._places.get(key)):
            path, i = places.pop(0)  # a damaged one is named once
            stamp, table = self._tables[path]
            with contextlib.suppress(FileNotFoundError):  # a shard that a checkout of another commit has taken
                if table is None:
                    self._tables[path] = stamp, (table := _table(path))
                for row in _sound(table.slice(i, 1), path):
                    self._rows[row["key"]], self._from[row["key"]] = row, path
        return self._rows.get(key)

    def rows(self) -> dict[str, dict[str, Any]]:
        """`{key: row}` of all sound runs."""
        return {key: row for key in list(self.keys()) if (row := self.row(key))}

    def get(self, run: "Run | Measurement") -> dict[str, Any] | None:
        """The row of a run, or None. One that says it is another run's is damaged: it is named and passed over."""
        while (row := self.row(run.key)) and self._compared.get(run.key) is not row:
            if said := unlike(json.loads(row["spec"]), run.spec()):
                _name_damaged(run.key, self._from[run.key], f"it is stored with {said}.")
                del self._rows[run.key]
            else:
                self._compared[run.key] = row
        return row

    def put(self, row: dict[str, Any]) -> bool:
        """Keep a finished run, atomically; False when it is stored already and this copy is discarded.

        Raises `files.CannotWrite`, and ValueError as `find`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        def others(rows):
            return all(unlike(json.loads(found["spec"]), json.loads(row["spec"])) for found in rows)

        if not others(self.find(row["key"])):
            return False
        table = pa.Table.from_pylist([row], schema=schema())
        table = _signed(table)
        path = self.dir / ".spool" / f"{row['key']}.parquet"
        if path.exists() and others(read(path)):
            files.aside(path, "damaged")
        with files.temporary(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
            self._folders.clear()
            return files.publish(temporary, path, replace=False)

    def check(self) -> None:
        """Make the folder. Raises `files.CannotWrite` where a result could not be kept: before it is trained.

        What a training needs of the file system is tried: room, a link, a lock.
        """
        with files.temporary(self.leases / "probe") as probe, files.temporary(self.leases / "probe") as free:
            probe.write_bytes(bytes(2**16))
            free.unlink()
            files.publish(probe, free, replace=False)
        with files.locked(self.leases / ".lock"):
            pass

    def sweep(self) -> None:
        """Remove what killed processes left: their leases, half-written files, checkpoints of runs that are stored."""
        Leases(self.leases).sweep()
        for folder in (self.dir, *(self.dir / name for name in PARTS)):
            files.sweep(folder)
        # A week: a stored run may be one whose weights are trained again, in every clone for its children's sake.
        files.sweep(self.dir / ".checkpoints", "*.safetensors", lambda path: path.stem in self.keys(), times=7 * 24)

    def find(self, key: str) -> Iterator[dict[str, Any]]:
        """The sound rows of a key, looked for in the files: `row` without reading what else lies in the spool.

        The spool is asked first, from which a merge takes rows away. Raises ValueError for a row of a newer version,
        in whose place nothing may be trained.
        """
        folders = (self.dir, *self.also)
        spooled = [folder / ".spool" / f"{key}.parquet" for folder in folders]
        for path in itertools.chain(spooled, (shard for folder in folders for shard in folder.glob("*.parquet"))):
            with contextlib.suppress(FileNotFoundError):
                if path in spooled or key in _keys(path, _stamp(path)):
                    yield from read(path, {key}, newer=True)

    def artifact(self, key: str) -> Path:
        """Where the final weights of a run lie, or would lie."""
        paths = [folder / ".artifacts" / f"{key}.safetensors" for folder in (self.dir, *self.also)]
        own = paths[0]
        usable = paths[:1] if own.with_suffix(".damaged").exists() else paths
        return next((path for path in usable if path.exists()), own)

    @property
    def leases(self) -> Path:
        """The folder of what is being trained, see `leases`."""
        return self.dir / ".leases"

    def note_failure(self, key: str, error: BaseException | None) -> None:
        """Note why a run ended without a result, or with None that it has one now; nothing where the disk is full."""
        path = self.dir / ".failures" / f"{key}.json"
        with contextlib.suppress(OSError):
            if error is None:
                path.unlink(missing_ok=True)
                return
            said = f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]
            files.write(path, json.dumps({"reason": said, "when": now()}).encode())

    def failures(self) -> dict[str, dict[str, str]]:
        """`{key: {"reason", "when"}}` of the runs that ended without a result and have none since."""
        found = {}
        for path in sorted((self.dir / ".failures").glob("*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                said = json.loads(files.read(path))
                found[path.stem] = {"reason": str(said["reason"]), "when": str(said["when"])}
        return {key: said for key, said in found.items() if key not in self.keys()}

    def checkpoint(self, key: str) -> Path:
        """Where a training is kept while it is under way."""
        return self.dir / ".checkpoints" / f"{key}.safetensors"

    def save_artifact(self, key: str, tensors: "dict[str, torch.Tensor]") -> str:
        """Keep `{name: tensor}` under a run's key; returns the file's sha256."""
        from lottery import tensorfile

        return tensorfile.write(self.dir / ".artifacts" / f"{key}.safetensors", tensors, {"run": key})

    def load_artifact(self, key: str) -> "tuple[dict[str, torch.Tensor], str]":
        """What `save_artifact` kept, and the file's sha256.

        Raises DamagedWeights for those that are damaged, another run's or gone; the file is set aside, or under `also`
        passed over from now on, and the next call of `run` trains them again.
        """
        from lottery import tensorfile

        path = self.artifact(key)
        with contextlib.suppress(ValueError, FileNotFoundError):
            tensors, about, sha = tensorfile.read(path)
            if about == {"run": key}:
                return tensors, sha
        own, done = self.dir / ".artifacts" / f"{key}.safetensors", "set aside"
        if path != own:  # not ours to move: `artifact` passes it over where this lies
            files.write(own.with_suffix(".damaged"), f"{path}\n".encode())
            done = "passed over"
        else:
            try:
                files.aside(path, "damaged")
            except FileNotFoundError:
                raise DamagedWeights(f"No weights {path}: run again, and they are trained again.") from None
        raise DamagedWeights(f"Damaged weights {path}: {done}; run again, and they are trained again.")

    def merge(self, source: Path | str | None = None) -> int:
        """Pack finished runs, the spool's or those of another store, into new shards; returns how many were packed.

        A shard is complete, and was read again, before the spool files that it replaces are removed, so a kill loses
        nothing. Where a run is there with another result, the first stays: it is said on stderr, and the other file is
        kept, ours as .conflict. Raises `files.CannotWrite`.
        """
        self.check()
        self.sweep()
        with files.locked(self.dir / ".lock"):
            own = self.dir / ".spool"
            folders = [own] if source is None else [Path(source), Path(source) / ".spool"]
            sound = {path: read(path) for folder in folders for path in sorted(folder.glob("*.parquet"))}
            keys = {row["key"] for found in sound.values() for row in found}
            mine = [*self.dir.glob("*.parquet"), *(own.glob("*.parquet") if source else ())]
            first = {row["key"]: row for path in mine for row in read(path, keys)}
            rows, other = {}, set()
            for path, row in ((path, row) for path, found in sound.items() for row in found):
                if first.setdefault(row["key"], row) is row:
                    rows[row["key"]] = row
                elif said := _conflict(first[row["key"]], row):
                    other.add(path)
                    print(
                        f"Two results of run {row['key']}: {said}, the latter in {path}; the first stays.",
                        file=sys.stderr,
                    )
            self._pack([rows[key] for key in sorted(rows)])
            if source is None:
                for path in (path for path, found in sound.items() if found):
                    files.aside(path, "conflict") if path in other else path.unlink()
        return len(rows)

    def remove(self, keys: Container[str]) -> int:
        """Take out runs that are known to be wrong, or stale, so that they are trained again; returns how many.

        Nothing else does: a run that is stored is never replaced. What else their shards hold is in new ones before
        they go. Raises ValueError for a shard with damaged rows, which would go with it, and `files.CannotWrite`.
        """
        self.check()
        gone = 0
        with files.locked(self.dir / ".lock"):
            for path in [*self.dir.glob("*.parquet"), *(self.dir / ".spool").glob("*.parquet")]:
                found = _keys(path, _stamp(path))
                if not any(key in keys for key in found):
                    continue
                if len(rows := read(path)) < len(found):
                    raise ValueError(f"Damaged runs in {path}, which would go with those to take out: mend it first.")
                self._pack(left := [row for row in rows if row["key"] not in keys])
                path.unlink()
                gone += len(rows) - len(left)
        self._forget()
        return gone

    def _pack(self, rows):
        """Write rows as shards. Their names come from nothing that a row could choose but a date."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for part in _parts(rows):
            name = hashlib.sha256("".join(row["payload_sha"] for row in part).encode()).hexdigest()[:8]
            dates = [row["started"][:10] for row in part if re.match(r"\d{4}-\d\d-\d\d", row["started"] or "")]
            path = self.dir / f"{max(dates, default=now()[:10])}-{name}.parquet"
            with files.temporary(path) as temporary:
                pq.write_table(pa.Table.from_pylist(part, schema=schema()), temporary, compression="zstd")
                if [_digest(row) for row in _table(temporary).to_pylist()] != [row["payload_sha"] for row in part]:
                    raise OSError("what is read again is not what was written")
                files.publish(temporary, path)


def _parts(rows):
    """Rows as they come into shards: SHARD of them at most, and far fewer bytes than `read` takes, or one alone.

    A quarter, as `_parquet` counts 8 bytes for each value, which may take 4, and the file's own.
    """
    import pyarrow as pa

    part, left = [], 0
    for row in rows:
        size = pa.Table.from_pylist([row], schema=schema()).nbytes
        if part and (size > left or len(part) == SHARD):
            yield part
            part = []
        if not part:
            left = MOST // 4
        part.append(row)
        left -= size
    if part:
        yield part


def load(runs: "Iterable[Run | Measurement] | None" = None, store: Store | None = None) -> "pd.DataFrame":
    """The stored ones of `runs` (None: everything stored), one row a run, in order, as a pandas.DataFrame.

    Columns: `schema()`, and `stale` (trained by an older algorithm version). Accuracies are fractions, losses
    means per image; `*_correct` are `numpy.packbits` of per-image correctness on the test set.
    """
    import pandas as pd

    store = store or Store()
    rows = list(store.rows().values()) if runs is None else [row for run in runs if (row := store.get(run))]
    frame = pd.DataFrame(rows, columns=schema().names)
    return frame.assign(stale=[stale(row) for row in rows])


class Rows(Mapping):
    """`{key: row}` of a store, as the rows of `load`: each is looked for and checked once, when it is asked for.

    Those whose key nothing here can recompute are left out: no paper's run has a method that is unknown here.
    """

    def __init__(self, store):
        self.store, self.found = store, {}
        self.numbers = dict.fromkeys((f"{r}_{name}" for r in ("early_stop", "last") for name in READING), math.nan)

    def __getitem__(self, key):
        if key not in self.found:
            row = self.store.row(key)
            self.found[key] = row = row and _key_of(row) and row
            if row:
                known = {name: value for name, value in row.items() if value is not None}
                self.found[key] = row | self.numbers | known | {"stale": stale(row)}
        if self.found[key] is None:
            raise KeyError(key)
        return self.found[key]

    def __iter__(self):
        return iter(self.store.keys())

    def __len__(self):
        return len(self.store.keys())


def stale(row: Mapping[str, Any]) -> bool:
    """True for a run trained by an older algorithm version."""
    return not json.loads(row["certificate"])["versions"].items() <= versions().items()


def versions() -> dict[str, int]:
    """The algorithms' versions; a certificate has those that its run used."""
    from lottery import baselines, cs, dynamic, grasp, lth, soft_threshold, stochastic, training

    modules = (training, lth, grasp, baselines, cs, soft_threshold, dynamic, stochastic)
    return {module.__name__.split(".")[-1]: module.VERSION for module in modules}


def unlike(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first field in which a stored spec is not another one, in words, or ""; fields that came later do not count.

    Without what tells two classes apart, {"is": …}, it is the base class.
    """
    for name, value in wanted.items():
        its = stored.get(name, value)
        if isinstance(value, dict) and isinstance(its, dict):
            if said := unlike({"is": None, **its}, {"is": None, **value}):
                return said
        elif its != value:
            return f"{name} = {its!r}, not {value!r}"
    return ""


def read(path: Path, keys: Container[str] | None = None, newer: bool = False) -> list[dict[str, Any]]:
    """The sound rows of a shard or spool file, or those of some keys; damaged ones are named on stderr.

    newer: raise ValueError for a row that a newer version wrote, which is else named and passed over as well.
    """
    if keys is None:
        return _sound(_table(path), path, newer)
    places = [i for i, key in enumerate(_table(path, ["key"])["key"].to_pylist()) if key in keys]
    return _sound(_table(path).take(places), path, newer) if places else []


def _stamp(path):
    """What tells whether a file is still the one that was read."""
    found = path.lstat()
    return found.st_mtime_ns, found.st_size, found.st_ino


@functools.cache
def _keys(path, stamp):
    """The keys of a shard, in order; read once a process, as a sweep asks for each of its runs."""
    return tuple(_table(path, ["key"])["key"].to_pylist())


def _table(path, columns=None):
    """The columns of `schema`, or some, of a parquet file, and with all of them any that a newer version has added.

    Without rows when it is damaged, or expands to more than MOST bytes, which is told on stderr.
    """
    import pyarrow as pa

    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            print(f"{path} is no ordinary file; it is passed over.", file=sys.stderr)
            return schema().empty_table()
        table = _parquet(path, columns)
        if why := _foreign(table):
            print(f"{path} is no result: {why}; it is passed over.", file=sys.stderr)
            return schema().empty_table()
        for field in (field for field in schema() if columns is None or field.name in columns):
            if field.name not in table.column_names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        table.validate(full=True)  # also that text is text
        return table
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        print(f"Damaged result {path}: {why} It is passed over; run it again.", file=sys.stderr)
        return schema().empty_table()


def _foreign(table):
    """Why a table is nobody's runs, in words, or None: each of its rows would be told of as a damaged one."""
    if "key" not in table.column_names:
        return "it has no column 'key'"
    keys = [str(key) for key in table["key"].to_pylist()]
    return "no key in it is that of a run" if len(keys) > 1 and not any(map(KEY.fullmatch, keys)) else None


def _parquet(path, columns):
    """Columns of a parquet file, those of `schema` in its types, or ValueError for more than MOST bytes of them.

    What a column holds is in the file's footer, but for text that is there once and stands in every row: such a row may
    be as large as the whole column. So where all rows might be too many, few are unpacked at a time.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile  # `read_table` would import pandas first

    with ParquetFile(path) as file:
        chunks = [chunk for chunk in files.chunks(path) if columns is None or chunk.column in columns]
        size = sum(max(chunk.size, 8 * chunk.values) for chunk in chunks)
        if size * file.metadata.num_rows <= MOST:
            return _plain(file.read(columns))
        if size > MOST:
            raise ValueError(f"it holds {size} bytes, more than {MOST}.")
        parts, left = [], MOST
        for batch in file.iter_batches(max(1, MOST // size), columns=columns):
            parts.append(_plain(pa.Table.from_batches([batch])))
            if (left := left - parts[-1].nbytes) < 0:
                raise ValueError(f"it holds more than {MOST} bytes.")
        return pa.concat_tables(parts)


def _plain(table):
    """The columns of `schema` in its types, and others as they are, but none as numbers that stand for values."""
    import pyarrow as pa

    types = {field.name: field.type for field in schema()}
    for i, name in enumerate(table.column_names):
        given = table.schema.field(i).type
        wanted = types.get(name, given.value_type if pa.types.is_dictionary(given) else given)
        if given != wanted:
            table = table.set_column(i, name, table[i].cast(wanted))
    return table


def _sound(table, path, newer=False):
    """The sound rows of a table; others are named on stderr: damaged ones, and those that a newer version wrote."""
    names, sound = schema().names, []
    for whole in table.to_pylist():
        row = {name: whole[name] for name in names}
        key = row["key"]
        if not (problem := _problem(row)):
            sound.append(row)
        elif _digest(whole) == row["payload_sha"] != _digest(row):
            said = f"Run {key} in {path} was written by a newer version of lottery"
            if newer:
                raise ValueError(f"{said}: update, or name another --results-dir.")
            print(f"{said}. It is passed over; update.", file=sys.stderr)
        else:
            _name_damaged(key, path, problem)
    return sound


def _name_damaged(key, path, problem):
    print(f"Damaged run {key} in {path}: {problem} It is passed over; run it again.", file=sys.stderr)


def _problem(row):
    """What is wrong with a stored row, or None: every accuracy is recomputed from the packed correctness."""
    if not KEY.fullmatch(row["key"] or ""):
        return "that is no key."
    for r in ("early_stop", "last"):
        packed, stated, n = row[f"{r}_correct"], row[f"{r}_test_acc"], row["n_test"]
        if packed and n and stated is not None:
            if not 0 < n <= 8 * len(packed):
                return f"n_test is {n}, it has {8 * len(packed)} bits at most."
            accuracy = int(unpack(packed, n).sum()) / n
            if abs(accuracy - stated) > 1e-9:
                return f"{r}_test_acc is {stated:.4f}, its test images give {accuracy:.4f}."
    if _digest(row) != row["payload_sha"]:
        return "its content does not match its hash."
    return _nonsense(row)


SHARES = ("density", *(f"{r}_{name}" for r in ("early_stop", "last") for name in READING if name.endswith("acc")))
OBJECTS = ("spec", "layers", "train_loss", "certificate", "moves", "values", "numbers")


def _nonsense(row):
    """What cannot be in a row, whoever signed it, or None."""
    for name in (*SHARES, "val_acc", "test_acc"):
        values = row[name] if isinstance(row[name], list) else [row[name]]
        if wrong := [value for value in values if value is not None and (value < 0 or value > 1)]:
            return f"{name} is {wrong[0]}, no share."
    for name in OBJECTS:
        try:
            if row[name] is not None and not isinstance(json.loads(row[name]), dict):
                return f"{name} is no JSON object."
        except (ValueError, RecursionError):
            return f"{name} is no JSON object."
    spec = json.loads(row["spec"] or "{}")
    if not {"model", "dataset"} <= spec.keys() or not isinstance(
        json.loads(row["certificate"] or "{}").get("versions"), dict
    ):
        return "it does not say what it is of."
    if not row["started"]:
        return "it does not say when it was started."
    return None if (key := _key_of(row)) in (None, row["key"]) else f"what it says it is has the key {key}."


def _key_of(row):
    from lottery.experiments.runs import key_of  # imports PyTorch

    return key_of(json.loads(row["spec"]))


def unpack(packed: bytes, n: int) -> np.ndarray:
    """Packed bits → bool [n]."""
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n).astype(bool)


def pack_masks(masks: "dict[str, torch.Tensor]") -> bytes | None:
    """All mask bits in module order, packed and deflated; None above MASK_LIMIT weights."""
    if not masks or sum(m.numel() for m in masks.values()) > MASK_LIMIT:
        return None
    bits = np.concatenate([m.cpu().numpy().ravel() for m in masks.values()])
    return zlib.compress(np.packbits(bits).tobytes(), 9)


def unpack_masks(row: Mapping[str, Any]) -> "dict[str, torch.Tensor] | None":
    """The masks of a stored row, `{layer: bool [weights]}` of the layers that it prunes; None where none are kept."""
    import torch

    if not row["mask"]:
        return None
    sizes = {name: size for name, (_, size) in json.loads(row["layers"]).items()}
    bits = torch.from_numpy(unpack(zlib.decompress(row["mask"]), sum(sizes.values())))
    return dict(zip(sizes, bits.split([*sizes.values()]), strict=True))


def _digest(row):
    """sha256 of a row's content; empty columns do not count, so that a column can be added later."""
    content = {name: value.hex() if isinstance(value, bytes) else value for name, value in row.items()}
    content = {name: value for name, value in content.items() if value is not None and name != "payload_sha"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _conflict(one, other):
    """In which result two rows of one run differ, or None; two copies of one training may differ in their times."""
    results = (f"{r}_{what}" for r in ("early_stop", "last") for what in ("test_acc", "step", "correct"))
    for name in ("status", *results, "values"):
        if one[name] != other[name]:
            both = ["others" if isinstance(row[name], bytes) else row[name] for row in (one, other)]
            return f"{name} is {both[0]} and {both[1]}"
    return None


def _signed(table):
    """The one-row table with its own digest in `payload_sha`, taken after float32 columns were rounded."""
    import pyarrow as pa

    row = table.to_pylist()[0]
    return pa.Table.from_pylist([{**row, "payload_sha": _digest(row)}], schema=schema())


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
