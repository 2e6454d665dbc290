"""Leases: no run is trained twice at once, the dead hold nothing, the living keep what they have."""

import errno
import json
import multiprocessing
import os
import time

import pytest

from lottery import files
from lottery.experiments import leases
from lottery.experiments.leases import Leases, running

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def taken_by_another(folder, keys):
    """What another process of this machine gets; it is gone afterwards and has released nothing."""

    def take(queue):
        queue.put(Leases(folder).take(keys))
        queue.close()
        queue.join_thread()
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=take, args=(queue,))
    process.start()
    found = queue.get(timeout=30)
    process.join()
    return found


def test_a_lease_is_held_by_one_process(tmp_path):
    mine = Leases(tmp_path)
    assert mine.take(["a", "b"]) == {"a", "b"}
    assert mine.take(["a"]) == {"a"}
    assert taken_by_another(tmp_path, ["a", "b", "c"]) == {"c"}
    assert Leases(tmp_path).take(["a"]) == set(), "a second holder in this process is another holder"
    mine.release(["a"])
    assert taken_by_another(tmp_path, ["a", "b"]) == {"a"}
    mine.close()
    assert taken_by_another(tmp_path, ["b"]) == {"b"}


def test_the_dead_of_this_machine_are_seen_at_once_and_others_by_their_age(tmp_path):
    assert taken_by_another(tmp_path, ["a"]) == {"a"}
    assert (tmp_path / "a").exists()
    assert running(tmp_path) == {}
    assert Leases(tmp_path).take(["a"]) == {"a"}
    path = tmp_path / "b"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "in": "x", "since": "2026-01-01T00:00:00+00:00"}))
    assert Leases(tmp_path).take(["b"]) == set()
    assert running(tmp_path)["b"] == {"host": "elsewhere", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}
    age(path, leases.EXPIRES + 1)
    assert "b" not in running(tmp_path)
    assert Leases(tmp_path).take(["b"]) == {"b"}


def test_a_lease_from_the_future_ages_from_when_it_is_seen(tmp_path):
    """The clock was set back: its owner elsewhere, dead or alive, does not hold the run until it is there again."""
    path = tmp_path / "a"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "in": "x", "since": "2026-01-01T00:00:00+00:00"}))
    age(path, -86_400)
    assert Leases(tmp_path).take(["a"]) == set()
    assert path.stat().st_mtime < time.time() + leases.EXPIRES
    age(path, leases.EXPIRES + 1)
    assert Leases(tmp_path).take(["a"]) == {"a"}
    assert taken_by_another(tmp_path, ["b"]) == {"b"}
    age(tmp_path / "b", -86_400)
    assert Leases(tmp_path).take(["b"]) == {"b"}, "of this machine's dead nobody has to wait for the age"


def test_the_living_keep_their_leases_young(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.05)
    mine = Leases(tmp_path)
    mine.take(["a"])
    age(tmp_path / "a", 1000)
    for _ in range(100):
        time.sleep(0.05)
        if time.time() - (tmp_path / "a").stat().st_mtime < 100:
            break
    else:
        pytest.fail("no heartbeat in five seconds")
    mine.close()
    assert not (tmp_path / "a").exists()


def test_what_was_taken_over_is_not_given_back(tmp_path):
    """A process that slept too long must not remove the lease of the one that went on."""
    mine = Leases(tmp_path)
    mine.take(["a"])
    other = {"host": "elsewhere", "pid": 1, "in": "x", "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "a").write_text(json.dumps(other))
    mine.close()
    assert json.loads((tmp_path / "a").read_text()) == other


MINE = {**leases._me(), "since": "2026-01-01T00:00:00+00:00"}
ODD = [json.dumps(MINE | {"pid": pid}) for pid in (10**30, 0, -1, True)]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3, "pid": "x", "in": "", "since": ""}', "\x00", *ODD])
def test_an_unreadable_lease_holds_nothing(tmp_path, content):
    (tmp_path / "a").write_text(content)
    assert running(tmp_path) == {}
    assert Leases(tmp_path).take(["a"]) == {"a"}


def test_of_many_takers_each_run_has_one(tmp_path):
    """Eight processes at once over twenty stale leases: every key goes to exactly one of them."""
    keys = [f"k{i}" for i in range(20)]
    other = json.dumps({"host": "elsewhere", "pid": 1, "in": "x", "since": "2026-01-01T00:00:00+00:00"})
    for key in keys:
        (tmp_path / key).write_text(other)
        age(tmp_path / key, leases.EXPIRES + 1)
    fork = multiprocessing.get_context("fork")
    barrier, queue, done = fork.Barrier(8), fork.Queue(), fork.Event()

    def take():
        mine = Leases(tmp_path)
        barrier.wait(30)
        got = [key for key in keys if mine.take([key])]
        queue.put(got)
        done.wait(30)

    processes = [fork.Process(target=take) for _ in range(8)]
    for p in processes:
        p.start()
    got = [queue.get(timeout=30) for _ in processes]
    done.set()
    for p in processes:
        p.join()
    assert sorted(key for some in got for key in some) == sorted(keys)


def test_leases_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    assert taken_by_another(tmp_path, ["dead"]) == {"dead"}
    mine = Leases(tmp_path)
    mine.take(["mine"])
    (tmp_path / "cut").write_text('{"host": "x"')
    Leases(tmp_path).sweep()
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["mine"]
    mine.close()
    Leases(tmp_path / "none").sweep()
    assert not (tmp_path / "none").exists()


def test_what_was_taken_before_the_disk_was_full_is_given_back(tmp_path, monkeypatch):
    mine, write, written = Leases(tmp_path), leases._write, []

    def full(path):
        if written:
            raise files.CannotWrite(errno.ENOSPC, "full", str(path))
        write(path)
        written.append(path)

    monkeypatch.setattr(leases, "_write", full)
    with pytest.raises(files.CannotWrite):
        mine.take(["a", "b", "c"])
    assert len(running(tmp_path)) == 1
    mine.close()
    assert running(tmp_path) == {}


def test_a_lock_that_another_user_has_made_is_enough(tmp_path):
    Leases(tmp_path).sweep()
    (tmp_path / ".lock").chmod(0o444)
    tmp_path.chmod(0o777)

    def sweep(queue):
        os.chdir(tmp_path)
        try:
            if not os.getuid():  # the superuser may open anything
                os.setuid(65534)
            Leases(".").sweep()
            queue.put(None)
        except OSError as error:
            queue.put(str(error))

    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=sweep, args=(queue := fork.Queue(),))
    process.start()
    assert queue.get(timeout=30) is None
    process.join()
