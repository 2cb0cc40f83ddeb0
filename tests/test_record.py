"""What a result is recorded with, and files that are written whole or not at all."""

import hashlib
import json
import os
import platform
import subprocess

import pytest

import record
from record import check_out, checksum, command, commit, machine, write_atomically, write_json


def test_the_machine_says_its_name_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("subprocess.check_output", lambda words, text: "Apple M2\n" if words[0] == "sysctl" else "")
    assert machine().startswith("Apple M2, ")
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: open("no such file"))
    monkeypatch.setattr("platform.processor", lambda: "")
    assert machine().startswith(f"{platform.machine()} CPU, ")


def test_the_command_is_what_starts_the_run_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["some/where/ddpm_sfd.py", "--forget", "0", "--out", "my runs"])
    for processes, start in (("1", "python"), ("4", "torchrun --nproc-per-node 4")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert command() == f"{start} ddpm_sfd.py --forget 0 --out 'my runs'"


def test_a_result_that_could_not_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    check_out("")
    check_out(tmp_path / "a.json")
    (tmp_path / "b.json").mkdir()
    for name, says in (("a.txt", "a .json file"), ("b.json", "a .json file"), ("nowhere/a.json", "no folder")):
        with pytest.raises(ValueError, match=says):
            check_out(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))  # root may everything
    with pytest.raises(ValueError, match="may not be written in"):
        check_out(tmp_path / "a.json")


def test_what_is_written_is_flushed_through_a_handle_that_may_write(tmp_path, monkeypatch):
    """Windows refuses any other."""
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.write(handle, b"")), fsync(handle)))
    write_json(tmp_path / "a.json", {"new": 1})
    assert flushed == [0] and json.loads((tmp_path / "a.json").read_text()) == {"new": 1}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def half(temporary):
        open(temporary, "w").write("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert json.loads(path.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_commit_is_the_clones_with_a_plus_where_files_differ(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == "unknown"
    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "-a", "v1", "-m", "a name, which is not asked for")
    assert commit() == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "a.py").write_text("2")
    assert commit() == git("rev-parse", "--short=12", "HEAD") + "+"


def test_the_checksum_is_of_the_bytes_on_disk(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert checksum(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert checksum(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4
