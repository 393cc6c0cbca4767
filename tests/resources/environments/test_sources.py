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


async def test_sources_may_lie_beside_the_three_folders(stand: Stand, storage: FakeStorage):
    storage.objects |= {("data", "one.csv"): b"1", ("data", "dir/a"): b"A"}
    given = [
        inline("x", "data/x.csv"),
        inline("# Rules", "/AGENTS.md"),
        inline("s", "/.agent/skills/a/SKILL.md"),
        {"type": "gcs", "source": "gs://data/one.csv", "target": "/data/one.csv"},
        {"type": "gcs", "source": "gs://data/dir", "target": "/bucket"},
        {"type": "skill_registry", "source": "pdf", "target": "/pdf"},
    ]
    name = await stand.made({"sources": given})
    assert await stand.paths(name) == [
        ".agent/skills/a/SKILL.md", ".agents/AGENTS.md", "bucket/a", "data/one.csv", "data/x.csv",
        "pdf/SKILL.md", "pdf/scripts/run.sh",
    ]  # fmt: skip
    # All at once, before any source.
    assert [one for one in stand.asked if "/folders" in one] == [
        f"PUT /v1/environments/{name}/folders"
    ]
    assert "/folders" in stand.asked[stand.asked.index(f"PUT /v1/environments/{name}") + 1]
    status, answer = await stand.server.call("GET", f"environments/{name}")
    assert (status, answer["file_count"]) == (200, "7")
    assert [one["target"] for one in answer["sources"]][:2] == ["data/x.csv", "/AGENTS.md"]
    await stand.put(name, "data/new.txt", b"new")
    assert await stand.read(name, "data/new.txt") == b"new"
    fork = await stand.made({"from_environment": f"environments/{name}"})
    assert await stand.read(fork, "data/new.txt") == b"new"
    assert (await stand.server.call("DELETE", f"environments/{fork}/files/data/new.txt"))[0] == 405


async def test_only_sources_make_a_folder_beside_the_three(stand: Stand):
    name = await stand.made({"sources": [inline("x", "data/x")]})
    url = f"/upload/v1beta/environments/{name}/files/"
    for path, words in (
        ("other/x", "no folder 'other' at its top, and only its sources make one"),
        ("x.csv", "use '/workspace/x.csv'"),
        ("data", "use '/workspace/data'"),
        ("etc/x", "the sandbox's own"),
    ):
        status, body, _ = await stand.call("PUT", f"{url}{path}", b"x")
        assert (status, words in body.decode()) == (400, True), body
    status, body, _ = await stand.call("GET", f"/v1beta/environments/{name}/files/other/x")
    assert (status, b"Path 'other/x' not found" in body) == (404, True)


async def test_an_object_is_no_folder_at_the_top(stand: Stand, storage: FakeStorage):
    storage.objects |= {("data", "one.csv"): b"1"}
    message = await refused(
        stand, {"type": "gcs", "source": "gs://data/one.csv", "target": "/one.csv"}
    )
    assert message.startswith("Cannot set up 'sources[0]':")
    assert "use '/workspace/one.csv'" in message


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


def test_a_clones_reason_is_kept_whatever_stands_before_it():
    url = "https://me:hush@example.com/" + "folder/" * 60
    why = "CONNECT tunnel failed, response 403"
    told = _last_line(f"Cloning …\nfatal: unable to access '{url}': {why}\n".encode())
    assert told.startswith("…")
    assert told.endswith(f"': {why}")
    assert "hush" not in told
    assert len(told) < 400
    near = f"fatal: unable to access 'https://h.example/{'a' * 60}/': {why}"
    assert _last_line(near.encode()) == near
    assert _last_line(b"a\x1b[2Jb") == "a\ufffd[2Jb"


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
        await fresh.put("", uuid4(), [Repository("workspace/a", "https://h.example/r")])
    assert said == [65_536]


# ---- nothing is laid before all was fetched


async def test_a_change_that_cannot_be_fetched_replaces_nothing(stand: Stand):
    environments, project = stand.server.process.environments, await mine(stand)
    name = await stand.made({"sources": [inline("old", "workspace/data.csv")]})
    sources_given: list[dict[str, str]] = [
        inline("new", "workspace/data.csv"),
        {"type": "skill_registry", "source": "pdf", "target": ".agents/skills/pdf"},
        {"type": "gcs", "source": "gs://data/absent", "target": "workspace/x"},
    ]
    change = {"type": "remote", "environment_id": name, "sources": sources_given}
    with pytest.raises(Invalid, match=r"sources\[2\]") as refusal:
        await environments.resolve(project, change)
    assert "laid" not in refusal.value.message
    assert await stand.read(name, "workspace/data.csv") == b"old"
    assert await stand.paths(name) == ["workspace/data.csv"]
    # What was fetched for it is not kept either.
    (taken,) = {
        one.rpartition("/")[2] for one in stand.asked if "PUT" in one and "/uploads/" in one
    }
    assert f"DELETE /v1/environments/{name}/uploads/{taken}" in stand.asked


async def test_what_was_laid_before_another_could_not_be_is_named(
    stand: Stand, storage: FakeStorage
):
    environments, project = stand.server.process.environments, await mine(stand)
    storage.objects |= {("data", "dir/a"): b"A", ("data", "dir/empty"): b""}
    name = await stand.made({"sources": [inline("old", "workspace/data.csv")]})
    change = {
        "type": "remote",
        "environment_id": name,
        "sources": [
            inline("new", "workspace/data.csv"),
            {"type": "gcs", "source": "gs://data/dir", "target": "workspace/dir"},
            inline("x", "workspace/data.csv/x"),
        ],
    }
    with pytest.raises(Invalid, match=r"sources\[2\]") as refusal:
        await environments.resolve(project, change)
    said = "Already laid, and left: 'workspace/data.csv', 'workspace/dir/a', 'workspace/dir/empty'."
    assert refusal.value.message.endswith(said)
    assert await stand.read(name, "workspace/data.csv") == b"new"
    assert await stand.read(name, "workspace/dir/empty") == b""


# ---- how many there are


async def test_counts_are_right_as_soon_as_files_change(stand: Stand):
    name = await stand.made({"sources": [inline("one", "workspace/a")]})
    other = await stand.made()

    async def shown() -> list[tuple[str, str]]:
        _, one = await stand.server.call("GET", f"environments/{name}")
        _, all_ = await stand.server.call("GET", "environments")
        (listed,) = [row for row in all_["environments"] if row["id"] == name]
        return [(row["file_count"], row["size_bytes"]) for row in (listed, one)]

    assert await shown() == [("1", "3")] * 2
    await stand.put(name, "workspace/b", b"2")
    assert await shown() == [("2", "4")] * 2
    await stand.put(name, "workspace/b", b"22", "?overwrite=true")
    _, listed = await stand.server.call("GET", "environments")
    assert [row["size_bytes"] for row in listed["environments"] if row["id"] == name] == ["5"]
    # Where nothing has changed nobody is asked.
    stand.asked.clear()
    await stand.server.call("GET", "environments")
    await stand.server.call("GET", f"environments/{other}")
    assert stand.asked == []
