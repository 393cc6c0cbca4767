"""AGENTS.md, skills and hooks, read from an environment that may hold anything."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson
import pytest
from tests.tools.files import Files

from openinteractions.errors import Invalid, Unready
from openinteractions.runs.agents import guidance
from openinteractions.runs.agents.guidance import Guidance, Instructions, Note, Skill, read
from openinteractions.sandbox.port import Entry
from openinteractions.tools.hooks import Hook

SKILL = "---\nname: {0}\ndescription: What {0} is for.\n---\n# Body\n"
BOTH = (".agents", "workspace/.agents")
HOOKS = {"gate": {"pre_tool_execution": [{"hooks": [{"type": "command", "command": "gate"}]}]}}


@dataclass(kw_only=True)
class Place(Files):
    """An environment; some paths, and the first few requests, fail."""

    broken: dict[str, Exception] = field(default_factory=dict)
    away: int = 0
    requests: int = 0

    async def has_files(self) -> bool:
        self._begin("")
        return await super().has_files()

    async def list(
        self, path: str, *, recursive: bool = False, limit: int = 1000, after: str | None = None
    ) -> tuple[Sequence[Entry], str | None]:
        self._begin(path)
        return await super().list(path, recursive=recursive, limit=limit, after=after)

    async def read(self, path: str, *, offset: int = 0, max_bytes: int) -> tuple[bytes, int]:
        self._begin(path)
        return await super().read(path, offset=offset, max_bytes=max_bytes)

    def _begin(self, path: str) -> None:
        self.requests += 1
        if self.away > 0:
            self.away -= 1
            raise Unready("starting")
        if path in self.broken:
            raise self.broken[path]


def place(files: dict[str, str | bytes], **more) -> Place:
    data = {path: c if isinstance(c, bytes) else c.encode() for path, c in files.items()}
    return Place(files=data, **more)


async def test_without_files_nothing_is_looked_for():
    empty = place({})
    assert await read(empty) == Guidance()
    assert empty.requests == 1


async def test_everything_is_found():
    found = await read(
        place(
            {
                ".agents/AGENTS.md": "\ufeffOne.\n",
                "workspace/.agents/AGENTS.md": "Two.",
                "workspace/AGENTS.md": "Three.",
                ".agents/skills/b/SKILL.md": SKILL.format("b"),
                ".agents/skills/b/more.md": "more",
                "workspace/.agents/skills/a/SKILL.md": SKILL.format("a").replace("\n", "\r\n"),
                ".agent/skills/c/SKILL.md": SKILL.format("c"),
                ".agents/hooks.json": json.dumps(HOOKS),
                "workspace/.agents/hooks.json": json.dumps(HOOKS),
            }
        )
    )
    hook = Hook(event="pre", group="gate", matcher="", type="command", target="gate")
    assert found == Guidance(
        instructions=(
            Instructions("/.agents/AGENTS.md", "One."),
            Instructions("/workspace/.agents/AGENTS.md", "Two."),
            Instructions("/workspace/AGENTS.md", "Three."),
        ),
        skills=(
            Skill("b", "What b is for.", "/.agents/skills/b/SKILL.md"),
            Skill("a", "What a is for.", "/workspace/.agents/skills/a/SKILL.md"),
            Skill("c", "What c is for.", "/.agent/skills/c/SKILL.md"),
        ),
        hooks=(hook, hook),
    )
    assert Guidance.load(orjson.loads(orjson.dumps(found))) == found


async def test_the_same_twice_counts_once():
    files = {
        ".agents/AGENTS.md": "Same.",
        "workspace/AGENTS.md": "Same.\n",
        ".agents/skills/a/SKILL.md": SKILL.format("a"),
        "workspace/.agents/skills/z/SKILL.md": SKILL.format("a"),
    }
    found = await read(place(files))
    assert [entry.path for entry in found.instructions] == ["/.agents/AGENTS.md"]
    assert [entry.path for entry in found.skills] == ["/.agents/skills/a/SKILL.md"]
    assert len(found.notes) == 1


async def test_long_instructions_are_cut_and_say_so():
    most = guidance.MAX_INSTRUCTIONS_BYTES
    found = await read(place({"workspace/AGENTS.md": "x" * (most + 1)}))
    text = found.instructions[0].text
    assert text.startswith("x" * most + "\n[… cut here")
    assert "/workspace/AGENTS.md" in text
    assert len(found.notes) == 1
    whole = await read(place({"workspace/AGENTS.md": "x" * most}))
    assert (whole.instructions[0].text, whole.notes) == ("x" * most, ())


async def test_what_is_no_text_is_replaced():
    found = await read(place({"workspace/AGENTS.md": b"a\xff\0b", ".agents/AGENTS.md": b" \n"}))
    assert [entry.text for entry in found.instructions] == ["a\ufffdb"]


async def test_only_whole_hooks_count():
    long = json.dumps({**HOOKS, "pad": {"x": "y" * guidance.MAX_HOOKS_BYTES}})
    found = await read(place({".agents/hooks.json": long, "workspace/.agents/hooks.json": "{"}))
    assert found.hooks == ()
    assert [note.about for note in found.notes] == ["hooks", "hooks"]


@pytest.mark.parametrize(
    ("approve", "types"),
    [
        (["code_execution"], ["http"]),
        (["Code_*"], ["http"]),
        (["*"], ["http"]),
        (["write_file", "docs__*"], ["command", "http"]),
        ([], ["command", "http"]),
    ],
)
async def test_command_hooks_are_code_that_may_need_consent(approve: list[str], types: list[str]):
    handlers = [
        {"type": "command", "command": "touch /workspace/ran"},
        {"type": "http", "url": "https://audit.example/"},
    ]
    rules = {"g": {"pre_tool_execution": [{"matcher": "*", "hooks": handlers}]}}
    found = await guidance.read(place({".agents/hooks.json": json.dumps(rules)}))
    kept = guidance.supervised(found, approve)
    assert [hook.type for hook in kept.hooks] == types
    told = [note.text for note in kept.notes if note.about == "hooks"]
    assert len(told) == 2 - len(types)
    assert all("asks before code_execution (approve)" in text for text in told)


@pytest.mark.parametrize(
    "text",
    [
        "---\nname: x\n---\n",
        "---\nname: x\n---\n\n---\n***\n",
        "---\nname: x\ndescription: [y]\n---\n",
        "---\n- name\n---\n",
        "---\nname: x\ndescription: y\n",
        "---\nname: x\ndescription: 'y\n---\n",
        "---\n? !!python/object/apply:os.system ['true']\n: x\n---\n",
        "---\n" + "[" * 7000 + "\n---\n",
        "---\nname: x\npad: " + "y" * 9000 + "\ndescription: y\n---\n",
        b"---\n\xff\xfe\n---\n",
        "",
    ],
    ids=[
        *("nothing said", "no words", "list as description", "list", "open", "quote", "object"),
        *("deep", "long", "binary", "empty"),
    ],
)
async def test_a_malformed_skill_is_left_out_and_noted(text: str | bytes):
    files = {".agents/skills/bad/SKILL.md": text, ".agents/skills/ok/SKILL.md": SKILL.format("ok")}
    found = await read(place(files))
    assert [skill.name for skill in found.skills] == ["ok"]
    assert len(found.notes) == 1
    assert found.notes[0].about == "skills"
    assert ".agents/skills/bad/SKILL.md" in found.notes[0].text


@pytest.mark.parametrize(
    ("text", "name", "description"),
    [
        (
            "---\nname: slide-maker\n---\n# Slide Maker\nCreate HTML slide decks.\nMore.\n",
            "slide-maker",
            "Create HTML slide decks.",
        ),
        ("---\ndescription: What it is for.\n---\n", "folder", "What it is for."),
        ("---\nname: [x]\ndescription: [y]\n---\n\n---\n\nSays so.", "folder", "Says so."),
        ("# Only a heading\n", "folder", "Only a heading"),
        ("\ufeffNo front matter.\n", "folder", "No front matter."),
        ("---\nname: x\n---\n" + "y" * 9000, "x", "y" * 1024),
    ],
)
async def test_what_a_skill_does_not_say_is_taken_from_what_is_there(
    text: str, name: str, description: str
):
    found = await read(place({".agents/skills/folder/SKILL.md": text}))
    assert found.skills == (Skill(name, description, "/.agents/skills/folder/SKILL.md"),)
    assert found.notes == ()


async def test_values_that_yaml_takes_for_something_else_stay_text():
    text = "---\nname: on\ndescription: 2026-02-30\nversion: !!int x\n---\n"
    found = await read(place({".agents/skills/s/SKILL.md": text}))
    assert [(skill.name, skill.description) for skill in found.skills] == [("on", "2026-02-30")]


@pytest.mark.parametrize(
    ("written", "read_as"),
    [
        ("Use it when: x # why", "Use it when: x"),
        ("a#b http://x/y", "a#b http://x/y"),
        ("plain\n  goes on\n\n  # why\n  here", "plain goes on here"),
        ("\n  below # why", "below"),
        ("|\n  one\n    # two\n\n  name: three", "one # two name: three"),
        (">-  # why\n  one\n  two", "one two"),
        ("|2+\n  one", "one"),
        ("'it''s: x # y' # why", "it's: x # y"),
        (r'"a \"b\" \u00e9\x41 \ud83d\ude00 \\ \n\U0001f600" # why', 'a "b" éA 😀 \\ 😀'),
        (r'"a \ud800 \Uffffffff"', "a \ufffd \U0010ffff"),
        ('"two\n  lines"', "two lines"),
    ],
)
async def test_texts_are_read_as_yaml_reads_them(written: str, read_as: str):
    more = "# comment\nmetadata:\n  name: no\nlist:\n- description: no\n  name: no\n"
    text = f'---\n{more}"name": n\ndescription: {written}\n{more}---\n'
    found = await read(place({".agents/skills/s/SKILL.md": text}))
    assert [(skill.name, skill.description) for skill in found.skills] == [("n", read_as)]
    orjson.dumps(found.skills[0].description)


@pytest.mark.parametrize(
    "written",
    [
        *("[a]", "{a: b}", "&a x", "*a", "!!str x", "| x", "'a' b", '"a', "'a", '"a\\"'),
        *("\n  - x", "\n  a: b", "\n- x\n  y", "", "# why", "\nmore"),
    ],
)
async def test_what_is_no_text_describes_nothing(written: str):
    text = f"---\nname: n\ndescription: {written}\n---\n"
    assert (await read(place({".agents/skills/s/SKILL.md": text}))).skills == ()


@pytest.mark.parametrize(
    "body",
    [
        "&a " + "[" * 3500, "[ " * 2000 + "]" * 2000, "{a: " * 1900, 'name: "' + "\\" * 7001,
        "name: '" + "'" * 7000, "name: 'x'" + " " * 7000 + "y", "name: " + " #" * 3500,
        "name:" + " " * 7000 + "x", "name: |" + " " * 7000 + "x", "a" * 7900, "\n" * 7900,
        "name: x\n" + "---" + " " * 7000 + "x", "? " * 3500,
    ],
    ids=range(13),
)  # fmt: skip
async def test_no_front_matter_takes_long(body: str):
    files = {f".agents/skills/s{n}/SKILL.md": f"---\n{body}\n---\n" for n in range(10)}
    began = time.process_time()
    assert (await read(place(files))).skills == ()
    assert time.process_time() - began < 5


async def test_notes_write_nothing_into_a_log():
    folder = "a\x1b[2J\n\u202e" + "x" * 600
    found = await read(place({f".agents/skills/{folder}/SKILL.md": ""}))
    (note,) = found.notes
    assert note.text.isprintable()
    assert note.text.startswith(r".agents/skills/a\x1b[2J\n\u202exxx")
    assert len(note.text) < 600


async def test_folders_without_a_skill_count_too():
    files = {f"{top}/skills/s{n:03}/SKILL.md": "" for n in range(90) for top in BOTH}
    many = place(files)
    found = await read(many)
    assert found.skills == ()
    assert many.requests < 120
    assert sum(note.text.startswith("Only 100 folders") for note in found.notes) == 1


async def test_a_description_is_one_visible_line():
    text = '---\nname: "a\\u200bb"\ndescription: |\n  one\n  # System\n  ' + "x" * 3000 + "\n---\n"
    found = await read(place({".agents/skills/s/SKILL.md": text}))
    assert found.skills[0].name == "ab"
    assert found.skills[0].description.startswith("one # System xxx")
    assert len(found.skills[0].description) == 1024


async def test_files_and_folders_that_are_no_skills_are_passed_over():
    files = {".agents/skills/README.md": "x", ".agents/skills/empty/other.md": "x"}
    assert await read(place(files)) == Guidance()


async def test_there_are_only_so_many_skills():
    files = {f".agents/skills/s{n:03}/SKILL.md": SKILL.format(f"s{n}") for n in range(260)}
    many = place(files)
    found = await read(many)
    assert len(found.skills) == guidance.MAX_SKILLS
    assert many.requests < 70
    assert any("first 50" in note.text for note in found.notes)


async def test_what_cannot_be_read_is_noted():
    broken = {"workspace/AGENTS.md": Invalid("It is a folder."), ".agents/skills": Invalid("No.")}
    found = await read(place({".agents/AGENTS.md": "a"}, broken=broken))
    assert [entry.text for entry in found.instructions] == ["a"]
    assert found.notes == (
        Note("instructions", "workspace/AGENTS.md could not be read: It is a folder."),
        Note("skills", ".agents/skills could not be read: No."),
    )


async def test_a_broker_that_comes_back_is_waited_for():
    found = await read(place({"workspace/AGENTS.md": "a"}, away=2), waits_s=(0, 0))
    assert len(found.instructions) == 1
    with pytest.raises(Unready):
        await read(place({"workspace/AGENTS.md": "a"}, away=3), waits_s=(0, 0))
