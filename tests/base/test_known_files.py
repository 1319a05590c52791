import hashlib
import os
import time

import pytest

from saejax.base import known_files
from saejax.base.known_files import sha256_of


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that counts as large and has not changed for long."""
    monkeypatch.setattr(known_files, "LEAST", 4)
    monkeypatch.setattr(known_files, "_SETTLED", -1.0)
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.bin").write_bytes(b"some bytes")
    return tmp_path / "a.bin"


def digest(data):
    return hashlib.sha256(data).hexdigest()


def test_a_large_file_is_read_once(file, monkeypatch):
    assert sha256_of(file) == digest(b"some bytes")
    monkeypatch.setattr(known_files, "file_sha256", lambda path: pytest.fail("read again"))
    assert sha256_of(file) == sha256_of(str(file)) == digest(b"some bytes")


def test_a_change_is_seen_also_where_the_time_is_put_back(file):
    sha256_of(file)
    before = file.stat()
    time.sleep(0.02)
    file.write_bytes(b"othr bytes")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256_of(file) == digest(b"othr bytes")


def test_what_has_just_changed_is_not_kept(file, monkeypatch):
    monkeypatch.setattr(known_files, "_SETTLED", 60.0)
    sha256_of(file)
    assert not list(file.parent.glob("cache/digests/*"))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"state": 1}'])
def test_a_spoilt_cache_costs_time_only(file, text, monkeypatch):
    sha256_of(file)
    [kept] = file.parent.glob("cache/digests/*")
    kept.write_text(text)
    assert sha256_of(file) == digest(b"some bytes")
    monkeypatch.setattr(known_files, "write_json", lambda *_: 1 / 0)
    kept.unlink()
    assert sha256_of(file) == digest(b"some bytes")
