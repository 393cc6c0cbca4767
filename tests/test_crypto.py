"""The master key: made once, changed beside running processes, nothing is lost."""

import base64
import threading
import time
from pathlib import Path

import pytest

from openinteractions import crypto
from openinteractions.crypto import (
    Sealer,
    add_master_key,
    drop_old_master_keys,
    master_key,
    sealer,
)
from openinteractions.errors import SetupError

OLD, NEW = bytes(32), bytes(range(32))


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def test_all_who_start_at_once_have_the_same_key(tmp_path: Path):
    for attempt in range(50):
        home = tmp_path / str(attempt)
        together = threading.Barrier(8)
        keys: list[bytes] = []

        def start(home: Path = home, together=together, keys=keys) -> None:
            together.wait()
            keys.append(master_key(None, home))

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(keys) == 8
        assert len(set(keys)) == 1
        assert [path.name for path in home.iterdir()] == ["master.key"]
        assert (home / "master.key").stat().st_mode & 0o777 == 0o600


def test_old_keys_open_and_the_current_one_seals():
    sealed = Sealer(OLD).seal(b"x", purpose="p")
    both = Sealer(NEW, [OLD])
    assert both.open(sealed, purpose="p") == b"x"
    fresh = both.seal(b"y", purpose="p")
    assert Sealer(NEW).open(fresh, purpose="p") == b"y"
    with pytest.raises(SetupError):
        Sealer(NEW).open(sealed, purpose="p")
    with pytest.raises(SetupError):
        both.open(sealed, purpose="q")


@pytest.mark.parametrize("junk", [b"", b"x", b"x" * 12, b"x" * 27, b"x" * 28, b"x" * 100])
def test_what_is_no_sealed_value_does_not_open(junk: bytes):
    with pytest.raises(SetupError, match="does not open"):
        Sealer(NEW, [OLD]).open(junk, purpose="p")


def test_a_value_is_sealed_anew_once():
    both = Sealer(NEW, [OLD])
    fresh = both.resealed(Sealer(OLD).seal(b"x", purpose="p"), purpose="p")
    assert fresh is not None
    assert Sealer(NEW).open(fresh, purpose="p") == b"x"
    assert both.resealed(fresh, purpose="p") is None
    with pytest.raises(SetupError):
        Sealer(NEW).resealed(Sealer(OLD).seal(b"x", purpose="p"), purpose="p")


def test_a_new_key_in_the_file_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crypto, "FOLLOWED_S", 0.05)
    running = sealer(None, [], tmp_path)
    old = master_key(None, tmp_path)
    before = running.seal(b"x", purpose="p")
    new = add_master_key(tmp_path, None)
    assert new != old
    assert master_key(None, tmp_path) == new
    assert sealer(None, [], tmp_path).open(before, purpose="p") == b"x"
    # Opened at once, sealed with a moment later.
    assert running.open(Sealer(new).seal(b"y", purpose="p"), purpose="p") == b"y"
    time.sleep(0.06)
    after = running.seal(b"z", purpose="p")
    assert Sealer(new).open(after, purpose="p") == b"z"
    assert running.open(before, purpose="p") == b"x"
    assert drop_old_master_keys(tmp_path, new) == 1
    with pytest.raises(SetupError):
        sealer(None, [], tmp_path).open(before, purpose="p")
    assert [path.name for path in tmp_path.iterdir()] == ["master.key"]
    assert (tmp_path / "master.key").stat().st_mode & 0o777 == 0o600


def test_a_process_seals_with_the_new_key_also_if_it_never_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(crypto, "FOLLOWED_S", 0.05)
    running = sealer(None, [], tmp_path)
    new = add_master_key(tmp_path, text(NEW))
    assert new == NEW
    time.sleep(0.06)
    assert Sealer(NEW).open(running.seal(b"x", purpose="p"), purpose="p") == b"x"


def test_a_change_that_was_broken_off_is_gone_on_with(tmp_path: Path):
    old = master_key(None, tmp_path)
    first = add_master_key(tmp_path, None)
    assert add_master_key(tmp_path, None) == first
    assert add_master_key(tmp_path, text(NEW)) == NEW
    known = (tmp_path / "master.key").read_text().split()
    assert known == [text(NEW), text(first), text(old)]
    with pytest.raises(SetupError, match="changed meanwhile"):
        drop_old_master_keys(tmp_path, first)
    assert drop_old_master_keys(tmp_path, NEW) == 2
    assert (tmp_path / "master.key").read_text() == text(NEW) + "\n"


def test_a_running_process_survives_a_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(crypto, "FOLLOWED_S", 0.0)
    running = sealer(None, [], tmp_path)
    key = master_key(None, tmp_path)
    for damage in ("", "nonsense"):
        (tmp_path / "master.key").write_text(damage)
        assert Sealer(key).open(running.seal(b"x", purpose="p"), purpose="p") == b"x"
    (tmp_path / "master.key").unlink()
    assert Sealer(key).open(running.seal(b"x", purpose="p"), purpose="p") == b"x"


def test_configured_keys_need_no_file(tmp_path: Path):
    made = sealer(text(NEW), [text(OLD)], tmp_path / "nowhere")
    assert made.open(Sealer(OLD).seal(b"x", purpose="p"), purpose="p") == b"x"
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(SetupError, match="a key of OI_OLD_MASTER_KEYS is not 32 bytes"):
        sealer(text(NEW), ["short"], tmp_path)


@pytest.mark.parametrize("damage", ["", "x", text(NEW) + "\nx", text(b"short")])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str):
    (tmp_path / "master.key").write_text(damage)
    with pytest.raises(SetupError, match=r"master\.key is not 32 bytes in base64"):
        sealer(None, [], tmp_path)
