"""Claims: who makes a run, when several processes and machines share a comparison's folder."""

import errno
import json
import multiprocessing
import os
import time
from queue import Empty

import pytest

from distill_lightning.studies.compare import claims
from distill_lightning.studies.compare.claims import Claim, ClaimLostError, Neighbours, Presence, claimed


def hold(folder, queue):
    """Take the claim, and never let go of it."""
    claim = Claim(folder)
    queue.put(claim.take())
    time.sleep(600)


@pytest.fixture
def holder(tmp_path, start_method):
    """A process that holds the claim of a folder."""
    context = multiprocessing.get_context(start_method)
    queue = context.Queue()
    process = context.Process(target=hold, args=(tmp_path / "runs/kd", queue))
    process.start()
    assert queue.get(timeout=60) is None
    yield process
    process.kill()
    process.join()


def test_a_claim_is_held_by_one_process_and_taken_over_when_that_is_dead(tmp_path, holder):
    claim = Claim(tmp_path / "runs/kd")
    assert claim.take().startswith(f"process {holder.pid} on ")
    other = Claim(tmp_path / "runs/ft")
    assert other.take() is None
    neighbours = Neighbours(tmp_path, other)
    holder.kill()
    holder.join()
    assert (tmp_path / "runs/kd/claim.json").exists()
    # It was there when it was asked last.
    assert [neighbours.were_there(), neighbours.were_there()] == [True, False]
    assert claim.take() is None
    claim.check()
    claim.release()
    other.release()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def note(folder, *, age, machine="another", token="theirs"):
    """A claim as another machine leaves it."""
    folder.mkdir(exist_ok=True)
    file = folder / "claim.json"
    file.write_text(json.dumps({"token": token, "machine": machine, "process": 7, "host": "far"}))
    os.utime(file, (time.time() - age,) * 2)
    return file


@pytest.mark.parametrize(("age", "holder"), [(1, "process 7 on far"), (600, None)])
def test_another_machines_claim_is_alive_as_long_as_it_is_touched(tmp_path, age, holder):
    note(tmp_path, age=age)
    claim = Claim(tmp_path)
    assert claim.take() == holder
    assert (tmp_path / "filling.lock").exists() != (holder is not None)
    claim.release()
    assert (tmp_path / "claim.json").exists() == (holder is not None)


def test_what_a_killed_process_has_half_written_is_a_claim_too(tmp_path):
    file = tmp_path / "claim.json"
    file.touch()
    assert Claim(tmp_path).take() == "process ? on another machine"
    os.utime(file, (0, 0))
    claim = Claim(tmp_path)
    assert claim.take() is None
    claim.release()


def test_a_claim_appears_with_its_content(tmp_path, monkeypatch):
    """Whoever is killed before it is whole leaves none, which would hold others up."""

    def killed(partial, file):
        assert json.loads(partial.read_text())["process"] == os.getpid()
        raise KeyboardInterrupt

    monkeypatch.setattr(claims.os, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        Claim(tmp_path).take()
    monkeypatch.undo()
    assert not (tmp_path / "claim.json").exists()
    assert Claim(tmp_path).take() is None


def test_a_file_system_without_links_has_claims(tmp_path, monkeypatch):
    def refused(partial, file):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(claims.os, "link", refused)
    first = Claim(tmp_path)
    assert first.take() is None
    with pytest.raises(FileExistsError):
        Claim(tmp_path)._publish("another's")
    first.check()
    first.release()
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_of_two_machines_that_find_a_claim_dead_one_gets_it(tmp_path, monkeypatch):
    """The slower one has read the dead claim before the quicker one has put its own in its place."""
    note(tmp_path, age=600)
    read, slow = claims._read, Claim(tmp_path)
    quick = []

    def slowly(file):
        known = read(file)
        if not quick:
            quick.append(known)
            note(tmp_path, age=0, token="quicker")
        return known

    monkeypatch.setattr(claims, "_read", slowly)
    monkeypatch.setattr(claims, "_is_fresh", lambda file: False)
    assert slow.take() == "process 7 on far"
    assert json.loads((tmp_path / "claim.json").read_text())["token"] == "quicker"


def test_a_claim_that_was_taken_over_is_noticed(tmp_path):
    claim = Claim(tmp_path)
    assert claim.take() is None
    note(tmp_path, age=0)
    with pytest.raises(ClaimLostError, match="is another's by now"):
        claim.check()
    claim.release()
    assert (tmp_path / "claim.json").exists()


def test_a_holder_touches_its_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_BEAT", 0.01)
    with claimed(tmp_path):
        os.utime(tmp_path / "claim.json", (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / "claim.json").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def come(folder, queue):
    with Presence(folder) as presence:
        queue.put(presence.is_alone)
        time.sleep(600)


def test_who_comes_first_is_alone_until_he_lets_others_in(tmp_path, start_method):
    context = multiprocessing.get_context(start_method)
    queue = context.Queue()
    process = context.Process(target=come, args=(tmp_path, queue))
    with Presence(tmp_path) as first:
        assert first.is_alone
        process.start()
        with pytest.raises(Empty):
            queue.get(timeout=0.5)
        first.admit()
        assert queue.get(timeout=60) is False
        with Presence(tmp_path / "elsewhere") as other:
            assert other.is_alone
    process.kill()
    process.join()
    with Presence(tmp_path) as last:
        assert last.is_alone


def test_claims_of_other_machines_are_company(tmp_path):
    (tmp_path / "runs").mkdir()
    note(tmp_path / "runs/kd", age=1)
    with Presence(tmp_path) as presence:
        assert not presence.is_alone
    note(tmp_path / "runs/kd", age=600)
    with Presence(tmp_path) as presence:
        assert presence.is_alone
