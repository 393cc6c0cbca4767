"""The file tools, as a model sees them."""

import base64

import pytest
from tests import pictures
from tests.tools.files import Bench, a_call, refused, use

from openinteractions.errors import TooLarge, Unready
from openinteractions.loop.structured import arguments_mismatch
from openinteractions.models.port import ToolCall
from openinteractions.sandbox.port import Exit, SandboxError
from openinteractions.tools.port import Done, Means
from openinteractions.tools.workspace.tools import tools

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def bench(**files: bytes | str) -> Bench:
    """Files of /workspace; `__` in a name is a slash, and one `_` a dot."""
    named = {
        f"workspace/{name.replace('__', '/').replace('_', '.')}": (
            data.encode() if isinstance(data, str) else data
        )
        for name, data in files.items()
    }
    return Bench(files=named)


def found(text: str, **end: object) -> Done:
    return Done(Exit(**{"outcome": "exited", "code": 0, **end}), text)  # pyright: ignore[reportArgumentType]


# ---- declarations


def test_each_tool_is_a_function_with_a_description_and_described_parameters():
    made = tools({}, Means())
    assert list(made) == [
        "read_file",
        "write_file",
        "edit_file",
        "list_files",
        "search_files",
        "delete_file",
        "view_image",
    ]
    for name, tool in made.items():
        declared = tool.declaration()
        assert (declared["type"], declared["name"]) == ("function", name)
        assert 80 < len(declared["description"]) < 1200
        schema = declared["parameters"]
        assert all(each["description"] for each in schema["properties"].values())
        assert set(schema.get("required", [])) <= set(schema["properties"])


def test_who_changes_nothing_is_pure():
    pure = [name for name, tool in tools({}, Means()).items() if tool.is_pure]
    assert pure == ["read_file", "list_files", "search_files", "view_image"]


def test_arguments_are_checked_by_the_declaration():
    declared = tools({}, Means())["edit_file"].declaration()
    assert arguments_mismatch({"path": "a", "old_text": "b"}, declared)
    assert not arguments_mismatch({"path": "a", "old_text": "b", "new_text": ""}, declared)


# ---- paths


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("a.txt", "workspace/a.txt"),
        ("./d//a.txt", "workspace/d/a.txt"),
        ("/workspace/a.txt", "workspace/a.txt"),
        ("/.agents/AGENTS.md", ".agents/AGENTS.md"),
        ("/home/agent/x/y", "home/x/y"),
        ("~/x", "home/x"),
        ("home/x", "workspace/home/x"),
        ("/data/x/y", "data/x/y"),
        ("data/x", "workspace/data/x"),
        ("/workspace/~x", "workspace/~x"),
    ],
)
async def test_a_path_means_what_it_means_in_the_sandbox(given, stored):
    place = Bench()
    place.folders.add("data")
    await use(place, "write_file", path=given, content="x")
    assert place.changes == [f"write {stored}"]


@pytest.mark.parametrize(
    "given",
    [
        "/tmp/x",
        "/etc/passwd",
        "/home/other/x",
        "/home",
        "/",
        "/workspaces/x",
        "/agents/x",
        "~root/x/..",
    ],
)
@pytest.mark.parametrize("name", list(tools({}, Means())))
async def test_other_places_are_refused_with_what_there_is(name, given):
    place = Bench()
    arguments = {"content": "", "old_text": "a", "new_text": "b", "pattern": "p"}
    said = await refused(place, name, path=given, **arguments)
    assert "/workspace" in said or ".." in said
    assert place.changes == place.executed == []


@pytest.mark.parametrize("given", ["../x", "/workspace/../etc/x", "a/../b", "/workspace/.."])
async def test_no_path_climbs(given):
    place = bench(b="1")
    assert "'..'" in await refused(place, "read_file", path=given)
    assert "'..'" in await refused(place, "delete_file", path=given)
    assert place.changes == []


async def test_a_path_outside_leads_to_code_execution():
    said = await refused(Bench(), "read_file", path="/tmp/out.log")
    assert "/workspace, /.agents and /home/agent" in said
    assert "code_execution" in said
    assert "NUL" in await refused(Bench(), "read_file", path="a\0b")


async def test_what_is_not_there_is_told_with_what_is_alike():
    place = bench(src__main_py="x", src__other_py="y")
    said = await refused(place, "read_file", path="src/Main.py")
    assert said == "There is no /workspace/src/Main.py. Did you mean /workspace/src/main.py?"
    said = await refused(place, "read_file", path="nowhere/main.py")
    assert "The folder /workspace/nowhere does not exist either." in said
    said = await refused(place, "read_file", path="src/zzz")
    assert "list_files shows what is in /workspace/src." in said
    said = await refused(place, "read_file", path="workspace/src/main.py")
    assert "did you mean /workspace/src/main.py?" in said
    said = await refused(place, "read_file", path=".agents/AGENTS.md")
    assert "did you mean /.agents/AGENTS.md?" in said


async def test_a_folder_beside_the_three_is_like_them():
    place = Bench(files={"data/a/x.csv": b"1,2\n", ".agents/A": b""})
    assert "1,2" in await use(place, "read_file", path="/data/a/x.csv")
    assert "x.csv" in await use(place, "list_files", path="/data/a")
    said = await refused(place, "read_file", path="data/a/x.csv")
    assert "did you mean /data/a/x.csv?" in said
    said = await refused(place, "read_file", path="/data/b/x.csv")
    assert "The folder /data/b does not exist" in said
    said = await refused(place, "read_file", path="/date/a/x.csv")
    assert "folders of this environment are /workspace, /.agents and /home/agent" in said


# ---- read_file


async def test_lines_are_numbered():
    place = bench(a_txt="one\n\n  three")
    assert await use(place, "read_file", path="a.txt") == "     1\tone\n     2\t\n     3\t  three"


async def test_an_empty_file_says_so():
    assert await use(bench(a=""), "read_file", path="a") == "/workspace/a is empty."


@pytest.mark.parametrize("end", ["", "\n"], ids=["unended", "ended"])
async def test_a_part_of_a_file(end):
    place = bench(a="\n".join(f"line {n}" for n in range(1, 11)) + end)
    said = await use(place, "read_file", path="a", offset=4, limit=3)
    assert said == (
        "     4\tline 4\n     5\tline 5\n     6\tline 6\n[lines 4-6 of 10; read on with offset=7]"
    )
    said = await use(place, "read_file", path="a", offset=9)
    assert said == "     9\tline 9\n    10\tline 10\n[lines 9-10 of 10]"
    assert (
        await refused(place, "read_file", path="a", offset=11) == "/workspace/a has only 10 lines."
    )


async def test_reading_on_gives_the_whole_file():
    lines = [f"{n} " + "x" * (n % 90) for n in range(7000)]
    place = bench(a="\n".join(lines))
    read: list[str] = []
    offset = 1
    while True:
        said: str = await use(place, "read_file", path="a", offset=offset)
        assert len(said) < 60_000
        *shown, last = said.split("\n")
        read += [line.partition("\t")[2] for line in shown]
        if "read on with offset=" not in last:
            break
        offset = int(last.rpartition("=")[2].rstrip("]"))
    assert read == lines


async def test_long_lines_are_cut():
    place = bench(a="a" * 5000 + "\nb\n" + "é" * 50_000)
    one, two, three = (await use(place, "read_file", path="a")).split("\n")
    assert one == "     1\t" + "a" * 2000 + " [… line cut: 5000 characters]"
    assert two == "     2\tb"
    assert three == "     3\t" + "é" * 2000 + " [… line cut: 100000 bytes]"


async def test_only_what_is_needed_of_a_long_file_is_read():
    place = bench(a="x" * 99 + "\n")
    place.files["workspace/a"] *= 1_000_000
    said = await use(place, "read_file", path="a", limit=2)
    assert said.endswith("[lines 1-2; read on with offset=3]")
    assert place.bytes_read < 6 * 2**20
    said = await use(place, "read_file", path="a", offset=500_001, limit=1)
    assert said.startswith("500001\txxx")
    said = await refused(place, "read_file", path="a", offset=900_000)
    assert "sed -n '900000,+100p'" in said
    place.files["workspace/a"] = b"y" * 100_000_000
    said = await use(place, "read_file", path="a")
    assert said.startswith("     1\tyyy")
    assert "line cut" in said


async def test_other_line_ends_and_bytes_are_told():
    said = await use(bench(a=b"one\r\ntwo\r\n"), "read_file", path="a")
    assert said == "     1\tone\n     2\ttwo\n[lines end with CRLF]"
    said = await use(bench(a=b"caf\xe9\n"), "read_file", path="a")
    assert "not all of it is UTF-8" in said


async def test_binary_files_and_folders_are_not_read():
    place = bench(a_png=PNG, b_bin=b"ab\0cd", c_pdf=b"%PDF\0", d__e="")
    assert "view_image" in await refused(place, "read_file", path="a.png")
    said = await refused(place, "read_file", path="b.bin")
    assert "is no text" in said
    assert "5 B" in said
    assert "pdftotext" in await refused(place, "read_file", path="c.pdf")
    place = bench(a_txt="é".encode("utf-16"), b_txt=b"a\0b")
    assert "iconv -f UTF-16" in await refused(place, "read_file", path="a.txt")
    said = await refused(place, "read_file", path="b.txt")
    assert "is no text (it has NUL characters, 3 B)" in said
    assert "list_files" in await refused(place, "read_file", path="d")


# ---- write_file


async def test_a_file_is_written_with_its_folders():
    place = Bench()
    said = await use(place, "write_file", path="d/e/a.txt", content="é\nb\n")
    assert said == "Wrote /workspace/d/e/a.txt (2 lines, 5 B)."
    assert place.files == {"workspace/d/e/a.txt": "é\nb\n".encode()}
    said = await use(place, "write_file", path="d/e/a.txt", content="")
    assert said == "Replaced /workspace/d/e/a.txt (0 lines, 0 B)."
    assert "is a folder" in await refused(place, "write_file", path="d/e", content="x")
    assert "is a folder" in await refused(place, "write_file", path="/workspace", content="x")


# ---- list_files


async def test_a_folder_is_listed():
    place = bench(a_txt="x" * 1234, d__b_txt="")
    assert await use(place, "list_files") == "/workspace:\na.txt  1.2 kB\nd/"
    assert await use(place, "list_files", path="d") == "/workspace/d:\nb.txt  0 B"
    said = await use(place, "list_files", recursive=True)
    assert said == "/workspace:\na.txt  1.2 kB\nd/\nd/b.txt  0 B"
    assert await use(place, "list_files", path="/.agents") == "/.agents has nothing in it."
    assert "is a file" in await use(place, "list_files", path="a.txt")
    assert "There is no" in await refused(place, "list_files", path="x")


async def test_a_long_list_is_read_on():
    place = bench(**{f"f{n:04}": "" for n in range(450)})
    names: list[str] = []
    after = ""
    for _ in range(3):
        said = await use(place, "list_files", after=after)
        _, *lines = said.split("\n")
        if lines[-1].startswith("["):
            after = lines.pop().rpartition("after=")[2].strip("']")
        assert len(lines) <= 200
        names += [line.split()[0] for line in lines]
    assert names == [f"f{n:04}" for n in range(450)]
    assert (await use(place, "list_files", after="f0449")) == "/workspace has nothing more in it."
    assert (await use(place, "list_files", after="/workspace/f0448")).endswith("f0449  0 B")


async def test_noise_is_left_out_of_deep_lists_and_costs_little():
    place = bench(a__node__modules="", z="")
    place.files |= {f"workspace/node_modules/m{n}/i.js": b"" for n in range(20_000)}
    place.files |= {"workspace/a/.git/HEAD": b"", "workspace/a/src/x.py": b""}
    place = Bench(files=place.files)
    said = await use(place, "list_files", recursive=True)
    assert said.split("\n")[1:] == [
        "a/",
        "a/.git/ (its files are left out)",
        "a/node/",
        "a/node/modules  0 B",
        "a/src/",
        "a/src/x.py  0 B",
        "node_modules/ (its files are left out)",
        "z  0 B",
    ]
    assert place.pages < 5
    said = await use(place, "list_files", path="node_modules/m7", recursive=True)
    assert said == "/workspace/node_modules/m7:\ni.js  0 B"
    assert "a/" in await use(place, "list_files")


# ---- search_files


async def test_a_search_is_words_never_a_script():
    place = Bench(files={"workspace/a b/$(x).py": b""}, ends=[found("")])
    pattern = "--pre=evil '; rm -rf /"
    await use(place, "search_files", pattern=pattern, path="a b", glob="-x; $(y)", context=99)
    ((key, argv, _),) = place.executed
    assert key == "3"
    script = argv[2]
    assert argv[:2] == ["/bin/sh", "-c"]
    assert "a b" not in script
    assert argv[3:5] == ["sh", "/workspace/a b"]
    assert argv[-4:] == ["-e", pattern, "--", "/workspace/a b"]
    assert "--glob=-x; $(y)" in argv
    assert "--context=10" in argv
    assert argv.index("--glob=-x; $(y)") < argv.index("--glob=!node_modules/")


async def test_a_search_in_a_file_or_in_noise():
    place = Bench(
        files={"workspace/d/a.py": b"", "workspace/node_modules/m/i.js": b""},
        ends=[found(""), found("")],
    )
    await use(place, "search_files", pattern="x", path="d/a.py")
    await use(place, "search_files", pattern="x", path="node_modules/m")
    assert place.executed[0][1][4] == "/workspace/d"
    assert "--glob=!node_modules/" in place.executed[0][1]
    assert "--glob=!node_modules/" not in place.executed[1][1]
    assert "--glob=!.git/" in place.executed[1][1]


async def test_what_a_search_says():
    place = Bench(
        ends=[
            found("/workspace/a\n1:x\n"),
            found("", code=1),
            found("regex parse error", code=2),
            found("", code=None, signal=9, outcome="killed", timed_out=True),
            found("sh: rg: not found", code=127),
        ]
    )
    assert await use(place, "search_files", pattern="x") == "/workspace/a\n1:x"
    assert await use(place, "search_files", pattern="x") == "Nothing in /workspace matches."
    said = await refused(place, "search_files", pattern="(")
    assert "regex parse error" in said
    assert "literal=true" in said
    assert "30 seconds" in await refused(place, "search_files", pattern="x")
    assert "grep" in await refused(place, "search_files", pattern="x")
    assert "1 to 2000" in await refused(place, "search_files", pattern="")


async def test_a_long_answer_of_a_search_is_cut():
    lines = ["/workspace/a", *(f"{n}:match" for n in range(1, 500))]
    place = Bench(
        ends=[found("\n".join(lines)), found("1:" + "y" * 90_000), found("x", truncated=True)]
    )
    said = await use(place, "search_files", pattern="x", limit=10)
    assert said.split("\n")[:-1] == lines[:11]
    assert "and more" in said
    assert len(await use(place, "search_files", pattern="x")) < 25_000
    assert "and more" in await use(place, "search_files", pattern="x")


async def test_a_search_whose_sandbox_was_lost_runs_again():
    place = Bench(ends=[found("", outcome="unknown", code=None), found("1:x")])
    assert await use(place, "search_files", pattern="x", key="7") == "1:x"
    assert [key for key, _, _ in place.executed] == ["7", "7.again"]
    await tools({}, Means(workplace=place))["search_files"].stop("7")
    assert place.killed == ["7", "7.again"]
    await tools({}, Means(workplace=place))["read_file"].stop("8")
    assert place.killed == ["7", "7.again"]


# ---- delete_file


async def test_files_and_folders_are_deleted():
    place = bench(a="1", d__b="2", d__c="3")
    assert await use(place, "delete_file", path="a") == "Deleted /workspace/a."
    assert "not empty" in await refused(place, "delete_file", path="d")
    said = await use(place, "delete_file", path="d", recursive=True)
    assert said == "Deleted /workspace/d and all that was in it."
    assert place.files == {}
    assert "There is no /workspace/a." in await refused(place, "delete_file", path="a")
    for top in ("/workspace", "/.agents", "/home/agent", "."):
        said = await refused(place, "delete_file", path=top, recursive=True)
        assert "itself cannot be deleted" in said
    assert place.changes == ["remove workspace/a", "remove workspace/d"]


# ---- links


def linked() -> Bench:
    return Bench(
        files={"workspace/a.txt": b"one\n", "workspace/d/b": b"2"},
        links={"workspace/l.txt": "workspace/a.txt", "workspace/ld": "workspace/d"},
    )


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("write_file", {"content": "new"}),
        ("edit_file", {"old_text": "one", "new_text": "two"}),
    ],
)
async def test_a_link_is_not_replaced_by_a_file(tool, arguments):
    place = linked()
    said = await refused(place, tool, path="l.txt", **arguments)
    assert "/workspace/l.txt is a link to '/workspace/a.txt'" in said
    assert place.changes == []
    await use(place, tool, path="a.txt", **arguments)
    assert place.changes == ["write workspace/a.txt"]


async def test_a_link_is_listed_as_one_and_read():
    place = linked()
    said = await use(place, "list_files")
    assert "l.txt -> /workspace/a.txt  4 B" in said
    assert "ld/ -> /workspace/d" in said
    assert "one" in await use(place, "read_file", path="l.txt")


async def test_deleting_a_link_says_what_is_left():
    place = linked()
    said = await use(place, "delete_file", path="ld", recursive=True)
    assert said == "Deleted /workspace/ld, a link to /workspace/d; what it led to is as it was."
    assert place.files["workspace/d/b"] == b"2"


async def test_a_name_is_one_line():
    place = Bench(files={"workspace/a\nb.txt": b"", "workspace/c": b""})
    assert await use(place, "list_files") == "/workspace:\na\\nb.txt  0 B\nc  0 B"


async def test_what_is_read_is_no_more_than_it_says():
    place = bench(a="x" * 15 + "\n" + ("y" * 15 + "\n") * 5000)
    said = await use(place, "read_file", path="a")
    assert 35_000 < len(said) <= 40_000 + 100


# ---- view_image


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PNG, "image/png"),
        (pictures.JPEG, "image/jpeg"),
        (pictures.GIF, "image/gif"),
        (pictures.WEBP, "image/webp"),
    ],
    ids=["png", "jpeg", "gif", "webp"],
)
async def test_pictures_are_content_blocks(data, kind):
    text, image = await use(Bench(files={"workspace/p.png": data}), "view_image", path="p.png")
    assert text["text"] == f"/workspace/p.png ({kind}, {len(data)} B)"
    assert (image["type"], image["mime_type"]) == ("image", kind)
    assert base64.b64decode(image["data"]) == data


async def test_a_picture_that_vendors_refuse_is_not_shown():
    place = bench(a_png=pictures.png(9000, 100), b_png=pictures.png(50, 50)[:60])
    assert "9000 x 100 pixels" in await refused(place, "view_image", path="a.png")
    assert "is cut off" in await refused(place, "view_image", path="b.png")


async def test_what_is_no_picture_is_not_shown():
    place = bench(
        a_png=b"<svg/>", b_png=PNG[:8] + b"x" * 4_000_000, c_png=b"RIFF....AVI ", d_png=""
    )
    for name in ("a.png", "c.png", "d.png"):
        assert "is no PNG" in await refused(place, "view_image", path=name)
    before = place.bytes_read
    assert "smaller" in await refused(place, "view_image", path="b.png")
    assert place.bytes_read == before


# ---- failures


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (TooLarge("The environment's disk is full."), "disk is full"),
        (Unready("No broker."), "Outcome unknown: No broker. Look at /workspace/a"),
        (SandboxError("It broke."), "Outcome unknown: It broke."),
    ],
    ids=["full", "away", "broken"],
)
@pytest.mark.parametrize("name", ["write_file", "edit_file", "delete_file"])
async def test_a_change_that_fails_is_told(name, error, says):
    def fail(instant: str) -> None:
        raise error

    place = bench(a="1")
    place.disturb = fail
    said = await refused(place, name, path="a", content="2", old_text="1", new_text="2")
    assert says in said


async def test_files_that_cannot_be_reached():
    place = bench(a="1")

    async def away(path: str) -> None:
        raise Unready("No broker answers.")

    place.stat = away  # pyright: ignore[reportAttributeAccessIssue]
    said = await refused(place, "read_file", path="a")
    assert said == "The files could not be reached: No broker answers. Try it again."


def test_a_call_becomes_a_function_call():
    step = tools({}, Means())["read_file"].call_step(ToolCall("c1", "read_file", {"path": "a"}))
    assert step == {"type": "function_call", "name": "read_file", "arguments": {"path": "a"}}
    assert a_call("read_file").step["type"] == "function_call"
