"""The master key's file: made once, also by several processes that start together."""

import threading
from pathlib import Path

from openinteractions.crypto import master_key


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
