"""Sources, copies and ends of environments, with real disks: what comes in, and what stays."""

import base64
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests import house
from tests.fakes.storage import FakeStorage
from tests.house import KEY
from tests.resources.environments.stand import Stand, standing

from openinteractions.errors import Invalid
from openinteractions.resources.environments import sources
from openinteractions.resources.environments.sources import Repository, Sources, _last_line
from openinteractions.resources.keys import service as keys
from openinteractions.sandbox.port import Exit, Output


@pytest.fixture
async def storage() -> AsyncGenerator[FakeStorage]:
    fake = FakeStorage()
    async with fake.serve():
        yield fake


@pytest.fixture
async def stand(database_url: str, tmp_path: Path, storage: FakeStorage) -> AsyncGenerator[Stand]:
    skill = tmp_path / "skills" / "pdf"
    (skill / "scripts").mkdir(parents=True)
    (skill / "SKILL.md").write_text("# PDF")
    (skill / "scripts" / "run.sh").write_text("#!/bin/sh\n")
    (skill / "scripts" / "run.sh").chmod(0o755)
    (skill / "passwd").symlink_to("/etc/passwd")
    async with standing(
        database_url,
        tmp_path,
        sandbox={"skills_dir": tmp_path / "skills", "gcs_url": storage.url},
        network={"allow": ["127.0.0.0/8"]},
    ) as opened:
        yield opened


async def refused(stand: Stand, *given: dict[str, str]) -> str:
    status, answer = await stand.server.call("POST", "environments", {"sources": list(given)})
    assert status == 400, answer
    assert await house.rows(stand.server.database, "environments", "deleted_at is null") == 0
    assert await stand.disks.list() == []
    return answer["error"]["message"]


def inline(content: str, target: str, **more: str) -> dict[str, str]:
    return {"type": "inline", "content": content, "target": target, **more}


async def test_inline_files_lie_where_they_were_asked_for(stand: Stand):
    raw = base64.b64encode(bytes(range(256))).decode()
    given = [
        inline("one", "/workspace/a.txt"),
        inline("two\u00e9", ".agents/AGENTS.md", type="INLINE"),
        inline(raw, "home/deep/bin", encoding="base64"),
        inline("", "/home/agent/empty"),
    ]
    status, answer = await stand.server.call("POST", "environments", {"sources": given})
    assert status == 200, answer
    name = answer["id"]
    assert answer["file_count"] == "4"
    assert answer["size_bytes"] == str(3 + 5 + 256)
    assert answer["sources"][0] == {"type": "inline", "target": "/workspace/a.txt"}
    assert await stand.paths(name) == [
        ".agents/AGENTS.md", "home/deep/bin", "home/empty", "workspace/a.txt",
    ]  # fmt: skip
    assert await stand.read(name, ".agents/AGENTS.md") == "two\u00e9".encode()
    assert await stand.read(name, "home/deep/bin") == bytes(range(256))


async def test_a_source_that_cannot_be_put_there_leaves_nothing(stand: Stand):
    message = await refused(
        stand, inline("x", "workspace/a"), inline("y", "workspace/a/b"), inline("z", "workspace/z")
    )
    assert "sources[1]" in message
    assert any(one.startswith("DELETE") for one in stand.asked)


async def test_objects_come_from_cloud_storage(stand: Stand, storage: FakeStorage):
    storage.objects |= {
        ("data", "one.csv"): b"1",
        ("data", "dir/a"): b"A",
        ("data", "dir/sub/b c"): b"B",
        ("data", "dir/sub/"): b"",
        ("data", "dir/z"): b"Z" * 300_000,
        ("data", "dirt"): b"no",
    }
    given = [
        {"type": "gcs", "source": "gs://data/one.csv", "target": "workspace/x.csv"},
        {"type": "gcs", "source": "gs://data/dir/", "target": "workspace/dir"},
        {"type": "gcs", "source": "gs://data/dir", "target": "workspace/again"},
    ]
    name = await stand.made({"sources": given})
    assert await stand.paths(name) == [
        "workspace/again/a", "workspace/again/sub/b c", "workspace/again/z",
        "workspace/dir/a", "workspace/dir/sub/b c", "workspace/dir/z", "workspace/x.csv",
    ]  # fmt: skip
    assert await stand.read(name, "workspace/dir/z") == b"Z" * 300_000


@pytest.mark.parametrize("source", ["gs://data/no", "gs://none", "gs://data/no/", "gs://none/x"])
async def test_what_is_not_in_cloud_storage_is_named(stand: Stand, source: str):
    given = {"type": "gcs", "source": source, "target": "workspace/x"}
    if source == "gs://none":
        given["source"] = "gs://none-such"
    message = await refused(stand, given)
    assert "sources[0]" in message
    assert given["source"] in message


async def test_objects_cannot_climb_out(stand: Stand, storage: FakeStorage):
    storage.objects["data", "dir/../../up"] = b"x"
    given = {"type": "gcs", "source": "gs://data/dir", "target": "workspace/dir"}
    assert "'..'" in await refused(stand, given)


async def test_too_much_is_noticed_before_it_is_fetched(
    stand: Stand, storage: FakeStorage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "MAX_BUCKET_BYTES", 10)
    storage.objects |= {("data", "dir/a"): b"x" * 6, ("data", "dir/b"): b"x" * 6}
    storage.objects["data", "one"] = b"x" * 11
    for source in ("gs://data/dir", "gs://data/one"):
        given = {"type": "gcs", "source": source, "target": "workspace/dir"}
        assert "10 bytes" in await refused(stand, given)


async def test_a_skill_is_copied_without_its_links(stand: Stand):
    given = {"type": "skill_registry", "source": "pdf", "target": ".agents/skills/pdf"}
    name = await stand.made({"sources": [given]})
    assert await stand.paths(name) == [
        ".agents/skills/pdf/SKILL.md", ".agents/skills/pdf/scripts/run.sh",
    ]  # fmt: skip
    root = await stand.disks.open(name)
    assert (root / ".agents/skills/pdf/scripts/run.sh").stat().st_mode & 0o777 == 0o755


async def test_a_skill_has_a_largest_size(stand: Stand, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MAX_SKILL_BYTES", 10)
    given = {"type": "skill_registry", "source": "pdf", "target": ".agents/skills/pdf"}
    assert "10 bytes" in await refused(stand, given)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"Cloning\nfatal: no such repository\n\n", "fatal: no such repository"),
        (
            b"a\rfatal: 'https://me:hush@x.com/r/' not found.\n",
            "fatal: 'https://x.com/r/' not found",
        ),
        (b"\xff\x00bad\n", "\ufffd\ufffdbad"),
        (b"", ""),
    ],
)
def test_the_last_line_of_git_is_shown_without_secrets(said: bytes, shown: str):
    assert _last_line(said) == shown


# ---- more files for an existing one


async def mine(stand: Stand) -> UUID:
    caller = await keys.Keyring(stand.server.database)(KEY)
    assert caller is not None
    return caller.project_id


async def test_sources_are_added_to_an_existing_one(stand: Stand):
    environments, project = stand.server.process.environments, await mine(stand)
    first = {"type": "remote", "sources": [inline("a", "workspace/a"), inline("b", "workspace/b")]}
    found = await environments.resolve(project, first)
    more: dict[str, Any] = {
        "type": "remote",
        "environment_id": found.hex,
        "sources": [inline("B", "workspace/b"), inline("c", "workspace/c")],
        "network": "disabled",
    }
    assert await environments.resolve(project, more) == found
    assert await stand.read(found.hex, "workspace/b") == b"B"
    assert await stand.paths(found.hex) == ["workspace/a", "workspace/b", "workspace/c"]
    _, answer = await stand.server.call("GET", f"environments/{found.hex}")
    targets = [source["target"] for source in answer["sources"]]
    assert targets == ["workspace/a", "workspace/b", "workspace/c"]
    # A sandbox that runs has the new rules before anything else happens in it.
    puts = [one for one in stand.asked if "/files/" in one or "/refresh" in one]
    assert [one.rpartition("/")[2] for one in puts][2:5] == ["refresh", "b", "c"]
    bad = {**more, "network": {"allowlist": []}, "sources": [inline("x", "workspace/a/x")]}
    with pytest.raises(Invalid, match=r"sources\[0\]"):
        await environments.resolve(project, bad)
    _, after = await stand.server.call("GET", f"environments/{found.hex}")
    assert (after["network"], after["sources"]) == ("disabled", answer["sources"])


# ---- copies


async def test_a_copy_has_the_files_and_goes_its_own_way(stand: Stand):
    parent = await stand.made({"sources": [inline("old", "workspace/a")]})
    fork = await stand.made({"from_environment": f"environments/{parent}"})
    await stand.put(parent, "workspace/a", b"new", "?overwrite=true")
    await stand.put(fork, "workspace/b", b"b")
    assert await stand.read(fork, "workspace/a") == b"old"
    assert await stand.paths(parent) == ["workspace/a"]
    _, row = await stand.server.call("GET", f"environments/{fork}")
    assert (row["file_count"], row["size_bytes"]) == ("2", "4")
    # Nothing was ever put into this one.
    empty = await stand.made()
    assert await stand.paths(await stand.made({"from_environment": empty})) == []


async def test_a_copy_that_fails_leaves_nothing(stand: Stand):
    parent = await stand.made({"sources": [inline("old", "workspace/a")]})
    await stand.disks.delete(parent)
    status, _ = await stand.server.call("POST", "environments", {"from_environment": parent})
    assert status >= 400
    assert await house.rows(stand.server.database, "environments", "deleted_at is null") == 1


# ---- ends


async def test_files_go_with_their_environment(stand: Stand):
    name = await stand.made({"sources": [inline("x", "workspace/a")]})
    assert await stand.disks.list() == [name]
    assert (await stand.server.call("DELETE", f"environments/{name}"))[0] == 200
    assert await stand.disks.list() == []
    row = "id = $1 and not has_disk and deleted_at is not null"
    assert await house.rows(stand.server.database, "environments", row, name) == 1


async def test_the_upkeep_removes_files_of_what_expired(stand: Stand):
    old = await stand.made({"sources": [inline("x", "workspace/a")]})
    new = await stand.made({"sources": [inline("x", "workspace/a")]})
    async with stand.server.database.hot() as connection:
        await connection.execute(
            "update environments set expires_at = now() - interval '1 s' where id = $1", old
        )
    assert await stand.server.process.environments.expire() == 1
    assert await stand.disks.list() == [new]


async def test_files_that_could_not_be_removed_are_removed_later(stand: Stand):
    name = await stand.made({"sources": [inline("x", "workspace/a")]})
    async with stand.server.database.hot() as connection:
        await connection.execute("update brokers set seen = now() - interval '1 minute'")
    assert (await stand.server.call("DELETE", f"environments/{name}"))[0] == 200
    assert await stand.disks.list() == [name]
    async with stand.server.database.hot() as connection:
        await connection.execute("update brokers set seen = now() + interval '1 hour'")
    await stand.server.process.environments.expire()
    assert await stand.disks.list() == []


def test_a_secret_in_a_repositorys_url_is_refused():
    source = {"type": "repository", "target": "workspace/r"}
    for url in ("https://user:token@x.com/o/r", "https://token@x.com/o/r"):
        with pytest.raises(Invalid, match="credential"):
            sources.checked([{**source, "source": url}], skills_dir=None)
    sources.checked([{**source, "source": "https://x.com/o/r"}], skills_dir=None)


async def test_what_a_clone_says_is_bounded(monkeypatch):
    said: list[int] = []

    class Client:
        @asynccontextmanager
        async def execute(self, *_):
            async def pieces():
                for _ in range(100):
                    yield Output(2, b"x" * 65_000 + b"\n")
                yield Output(2, b"fatal: no\n")
                yield Exit(outcome="exited", code=128)

            yield pieces()

    def last_line(text: bytearray) -> str:
        said.append(len(text))
        return _last_line(text)

    monkeypatch.setattr(sources, "_last_line", last_line)
    fresh = Sources(Client(), None, gcs_url="")
    with pytest.raises(Invalid, match="git clone failed: fatal: no"):
        await fresh._clone("", uuid4(), Repository("workspace/a", "https://h.example/r"))
    assert said == [65_536]
