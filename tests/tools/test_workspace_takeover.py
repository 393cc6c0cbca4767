"""Whoever dies at whatever instant of a change: it is made once, or nobody says that it was."""

from dataclasses import dataclass, field

import pytest
from tests.tools.files import Bench, a_call

from openinteractions.errors import LeaseLost
from openinteractions.models.port import Json
from openinteractions.tools.port import Means
from openinteractions.tools.workspace.tools import tools

TEXT = "one\ntwo\n"
LARGE = b"x" * (17 * 2**20)


class Killed(BaseException):
    """The process is gone."""


@dataclass
class Owner:
    """Runs a call as owner after owner of its run; the notes are what is durable."""

    place: Bench
    notes: list[Json] = field(default_factory=list)

    async def run(self, name: str, *, dies: str = "", **arguments: object) -> Json:
        async def begin(note: Json) -> None:
            if dies == "before the note":
                raise Killed
            self.notes.append(note)
            # Nothing may have been changed yet.
            assert self.place.changes == []
            if dies == "after the note":
                raise Killed

        def disturb(instant: str) -> None:
            if dies == f"{instant} the change":
                raise Killed

        self.place.disturb = disturb
        begun = self.notes[-1] if self.notes else None
        call = a_call(name, begun=begun, begin=begin, **arguments)
        return await tools({}, Means(workplace=self.place))[name].run(call)


INSTANTS = ["before the note", "after the note", "before the change", "after the change"]
CALLS: dict[str, tuple[str, dict[str, bytes], Json, bytes | None]] = {
    "new": ("write_file", {}, {"content": TEXT}, TEXT.encode()),
    "over": ("write_file", {"workspace/a": b"old"}, {"content": TEXT}, TEXT.encode()),
    "over-large": ("write_file", {"workspace/a": LARGE}, {"content": TEXT}, TEXT.encode()),
    "same": ("write_file", {"workspace/a": TEXT.encode()}, {"content": TEXT}, TEXT.encode()),
    "edit": (
        "edit_file",
        {"workspace/a": TEXT.encode()},
        {"old_text": "two", "new_text": "two two"},
        b"one\ntwo two\n",
    ),
    "delete": ("delete_file", {"workspace/a": b"old"}, {}, None),
    "delete-large": ("delete_file", {"workspace/a": LARGE}, {}, None),
    "delete-folder": ("delete_file", {"workspace/a/b": b""}, {"recursive": True}, None),
}


@pytest.mark.parametrize("instant", INSTANTS)
@pytest.mark.parametrize("case", CALLS)
async def test_a_change_is_made_once_whoever_dies(case, instant):
    name, files, arguments, after = CALLS[case]
    undisturbed = await Owner(Bench(files=dict(files))).run(name, path="a", **arguments)
    assert not undisturbed["is_error"]

    owner = Owner(Bench(files=dict(files)))
    with pytest.raises(Killed):
        await owner.run(name, path="a", dies=instant, **arguments)
    changed = ["the change"] if instant == "after the change" else []
    assert len(owner.place.changes) == len(changed)
    result = await owner.run(name, path="a", **arguments)
    assert result == undisturbed
    assert owner.place.files.get("workspace/a") == after
    assert "workspace/a/b" not in owner.place.files
    assert len(owner.place.changes) == 1 or (case == "same" and len(owner.place.changes) <= 1)
    assert len(owner.notes) == 1


@pytest.mark.parametrize("case", ["new", "over", "over-large", "edit", "delete", "delete-large"])
async def test_what_somebody_else_has_changed_meanwhile_is_left_alone(case):
    name, files, arguments, _ = CALLS[case]
    owner = Owner(Bench(files=dict(files)))
    with pytest.raises(Killed):
        await owner.run(name, path="a", dies="after the note", **arguments)
    owner.place.files["workspace/a"] = b"somebody else's"
    result = await owner.run(name, path="a", **arguments)
    assert result["is_error"]
    assert "Outcome unknown" in result["result"]
    assert "Look at it" in result["result"]
    assert owner.place.changes == []
    assert owner.place.files["workspace/a"] == b"somebody else's"


async def test_a_file_that_is_gone_meanwhile_is_not_made_again():
    owner = Owner(Bench(files={"workspace/a": b"old"}))
    with pytest.raises(Killed):
        await owner.run("write_file", path="a", dies="after the note", content=TEXT)
    del owner.place.files["workspace/a"]
    assert "Outcome unknown" in (await owner.run("write_file", path="a", content=TEXT))["result"]
    assert owner.place.files == {}


async def test_a_very_large_file_is_not_read_to_be_replaced():
    place = Bench(files={"workspace/a": LARGE})
    await Owner(place).run("write_file", path="a", content="new")
    assert (place.bytes_read, place.files) == (0, {"workspace/a": b"new"})


async def test_a_note_says_what_the_file_is_and_will_be_and_what_is_said():
    owner = Owner(Bench(files={"workspace/a": b"old"}))
    result = await owner.run("write_file", path="a", content="new")
    (note,) = owner.notes
    assert len(note["before"]) == len(note["after"]) == 64
    assert note["before"] != note["after"]
    assert note["said"] == result["result"]


@pytest.mark.parametrize("name", ["write_file", "edit_file", "delete_file"])
async def test_who_has_lost_the_run_changes_nothing(name):
    async def begin(note: Json) -> None:
        raise LeaseLost("Another owner.")

    place = Bench(files={"workspace/a": b"1"})
    call = a_call(name, path="a", content="2", old_text="1", new_text="2", begin=begin)
    with pytest.raises(LeaseLost):
        await tools({}, Means(workplace=place))[name].run(call)
    assert place.changes == []


@pytest.mark.parametrize("name", ["write_file", "edit_file", "delete_file"])
async def test_what_cannot_be_done_notes_nothing(name):
    owner = Owner(Bench(files={"workspace/d/a": b"1"}))
    result = await owner.run(name, path="d", content="2", old_text="1", new_text="2")
    assert result["is_error"]
    assert owner.notes == []
