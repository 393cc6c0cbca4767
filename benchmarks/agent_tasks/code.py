# ruff: noqa: E501 - prompts, pages and scripts stand here as they are
"""Tasks on code: mend, refactor, write, look into history."""

import re

from benchmarks.agent_tasks.task import Call, Failed, Files, Task, bash, require, run

# ---- mend what a test finds

_CART = """\
\"\"\"A shopping cart.\"\"\"


class Cart:
    def __init__(self):
        self.items = []

    def add(self, name, price, quantity=1):
        self.items.append((name, price, quantity))

    def total(self, discount_percent=0):
        total = sum(price for _, price, _ in self.items)
        return round(total * (1 - discount_percent / 10), 2)

    def count(self):
        return len(self.items)
"""
_CART_TEST = """\
import unittest

from cart import Cart


class CartTest(unittest.TestCase):
    def setUp(self):
        self.cart = Cart()
        self.cart.add("pen", 1.5, 4)
        self.cart.add("book", 20)

    def test_total_counts_quantities(self):
        self.assertEqual(self.cart.total(), 26.0)

    def test_discount_is_in_percent(self):
        self.assertEqual(self.cart.total(discount_percent=10), 23.4)

    def test_count_is_of_pieces(self):
        self.assertEqual(self.cart.count(), 5)


if __name__ == "__main__":
    unittest.main()
"""
_CART_HIDDEN = """\
from cart import Cart
c = Cart()
assert c.total() == 0 and c.count() == 0
c.add("a", 2.25, 3)
assert c.total(50) == 3.38 or c.total(50) == 3.37, c.total(50)
assert c.count() == 3
"""


def _check_cart(files: Files, answer: str) -> None:
    del answer
    require(files.text("workspace/test_cart.py") == _CART_TEST, "the tests were changed")
    code = {
        "cart.py": files.data("workspace/cart.py"),
        "test_cart.py": _CART_TEST,
        "hidden.py": _CART_HIDDEN,
    }
    run(code, "python3 -m unittest -q test_cart && python3 hidden.py")


def _edit(old: str, new: str) -> Call:
    return "edit_file", {"path": "/workspace/cart.py", "old_text": old, "new_text": new}


FIX_FAILING_TEST = Task(
    id="fix_failing_test",
    prompt="The tests in /workspace/test_cart.py fail (`python3 -m unittest test_cart`). Make them "
    "pass by mending /workspace/cart.py. Leave the tests as they are.",
    files={"workspace/cart.py": _CART, "workspace/test_cart.py": _CART_TEST},
    check=_check_cart,
    script=[
        [
            ("read_file", {"path": "/workspace/cart.py"}),
            bash("python3 -m unittest test_cart 2>&1 | tail -30"),
        ],
        [
            _edit("sum(price for _, price, _ in", "sum(price * n for _, price, n in"),
            _edit("discount_percent / 10)", "discount_percent / 100)"),
            _edit("return len(self.items)", "return sum(n for _, _, n in self.items)"),
        ],
        [bash("python3 -m unittest test_cart 2>&1")],
    ],
    answer="All three tests pass. /workspace/cart.py ignored quantities and took the discount as "
    "tenths.",
)

# ---- rename across files

_PACKAGE = {
    "workspace/shop/__init__.py": "",
    "workspace/shop/pricing.py": """\
\"\"\"Prices. `calc` adds the tax.\"\"\"

TAX = 0.2


def calc(net):
    return round(net * (1 + TAX), 2)


def calculator_name():
    return "calc"
""",
    "workspace/shop/invoice.py": """\
from shop.pricing import calc


def line(name, net):
    return f"{name}: {calc(net):.2f}"
""",
    "workspace/shop/report.py": """\
from shop import pricing
from shop.pricing import calculator_name


def report(nets):
    total = sum(map(pricing.calc, nets))
    return f"{calculator_name()} {total:.2f}"
""",
    "workspace/main.py": """\
import shop.pricing as p
from shop.invoice import line
from shop.report import report

print(line("pen", 1.0))
print(report([1.0, 2.0]))
print(getattr(p, "calculator_name")())
""",
    "workspace/CHANGELOG.md": "# 1.0\n\n- `calc` was called `compute` before.\n",
}


def _check_rename(files: Files, answer: str) -> None:
    del answer
    changelog = "workspace/CHANGELOG.md"
    require(files.text(changelog) == _PACKAGE[changelog], "the changelog is history: keep it")
    sources = {path: files.data(path) for path in _PACKAGE if path.endswith(".py")}
    for path, data in sources.items():
        text = re.sub(r'"calc"', "", data.decode())
        require(not re.search(r"\bcalc\b", text), f"{path} still speaks of calc")
    require(
        re.search(
            r"^def price_with_tax\(net", files.text("workspace/shop/pricing.py"), re.MULTILINE
        ),
        "there is no price_with_tax(net)",
    )
    shown = run({p.removeprefix("workspace/"): d for p, d in sources.items()}, "python3 main.py")
    require(shown.split("\n")[:3] == ["pen: 1.20", "calc 3.60", "calc"], f"main.py shows {shown!r}")


RENAME = Task(
    id="rename_across_files",
    prompt="In the Python package /workspace/shop, rename the function `calc` to `price_with_tax` "
    "everywhere in the code, docstrings included, in /workspace/main.py too if needed. Nothing else "
    'may change: `calculator_name()` goes on returning "calc", main.py prints what it printed, '
    "CHANGELOG.md stays.",
    files=_PACKAGE,
    check=_check_rename,
    script=[
        [
            ("search_files", {"pattern": r"\bcalc\b"}),
            bash("python3 main.py"),
        ],
        [
            bash(
                "sed -i -E '/return \"calc\"/!s/\\bcalc\\b/price_with_tax/g' shop/*.py && "
                "python3 main.py && grep -rnw calc . --include=*.py"
            )
        ],
    ],
    answer="Renamed in shop/pricing.py, shop/invoice.py and shop/report.py; main.py prints the "
    "same.",
)

# ---- write a script

_ROMAN_CASES = {1: "I", 4: "IV", 9: "IX", 14: "XIV", 40: "XL", 90: "XC", 400: "CD", 1994: "MCMXCIV"}
_ROMAN_CASES |= {2026: "MMXXVI", 3999: "MMMCMXCIX"}


def _check_roman(files: Files, answer: str) -> None:
    del answer
    given = "\n".join(str(n) for n in _ROMAN_CASES)
    code = {"roman.py": files.data("workspace/roman.py"), "in.txt": f"{given}\n0\nx\n4000\n"}
    shown = run(code, "python3 roman.py < in.txt").split("\n")
    expected = [*_ROMAN_CASES.values(), "invalid", "invalid", "invalid"]
    require(shown[: len(expected)] == expected, f"roman.py printed {shown}")


_ROMAN = """\
import sys

PARTS = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
         (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]


def roman(text):
    if not text.isdecimal() or not 0 < int(text) < 4000:
        return "invalid"
    number, out = int(text), ""
    for value, letters in PARTS:
        out += letters * (number // value)
        number %= value
    return out


for line in sys.stdin:
    print(roman(line.strip()))
"""

WRITE_SCRIPT = Task(
    id="write_script",
    prompt="Write /workspace/roman.py: it reads lines from standard input and prints for each the "
    "number as a Roman numeral (1 to 3999), or `invalid` for anything else. Try it.",
    files={"workspace/README.md": "Numbers in, numerals out.\n"},
    check=_check_roman,
    script=[
        [("write_file", {"path": "/workspace/roman.py", "content": _ROMAN})],
        [bash("printf '4\\n1994\\nx\\n0\\n' | python3 roman.py")],
    ],
    answer="/workspace/roman.py does it; 4, 1994, x and 0 gave IV, MCMXCIV, invalid, invalid.",
)

# ---- find a bug by its log

_LOG = """\
2026-05-04T09:00:01Z INFO  req=a1 GET /orders/17 200 12ms
2026-05-04T09:00:02Z INFO  req=a2 POST /orders customer=31 amount=12.50 currency=EUR
2026-05-04T09:00:02Z INFO  req=a2 200 31ms
2026-05-04T09:00:05Z WARN  req=a3 rate of GBP is 3 days old
2026-05-04T09:00:05Z INFO  req=a3 POST /orders customer=77 amount=8.00 currency=gbp
2026-05-04T09:00:05Z ERROR req=a3 500 unhandled KeyError: 'gbp' (orders.convert)
2026-05-04T09:00:07Z INFO  req=a4 POST /orders customer=31 amount=99.00 currency=USD
2026-05-04T09:00:07Z INFO  req=a4 200 28ms
2026-05-04T09:00:11Z ERROR req=a5 500 unhandled KeyError: 'eur' (orders.convert)
2026-05-04T09:00:11Z INFO  req=a6 GET /health 200 1ms
"""
_ORDERS = """\
\"\"\"Orders, converted to euros.\"\"\"

RATES = {"EUR": 1.0, "USD": 0.92, "GBP": 1.15}


def convert(amount, currency):
    return round(amount * RATES[currency], 2)


def parse(body):
    return float(body["amount"]), body["currency"].strip()
"""
_ORDERS_TEST = """\
from orders import convert, parse, RATES
assert convert(*parse({"amount": "10", "currency": " gbp "})) == 11.5
assert convert(*parse({"amount": "10", "currency": "EUR"})) == 10
assert set(RATES) == {"EUR", "USD", "GBP"}
try:
    convert(*parse({"amount": "10", "currency": "xyz"}))
except KeyError:
    pass
else:
    raise SystemExit("an unknown currency must stay an error")
"""


def _check_log(files: Files, answer: str) -> None:
    del answer
    found = files.json("workspace/cause.json")
    require(isinstance(found, dict), "cause.json is not an object")
    require(found.get("requests") == ["a3", "a5"], f"requests: {found.get('requests')!r}")
    require(found.get("function") in ("convert", "orders.convert"), "the wrong function")
    code = {"orders.py": files.data("workspace/orders.py"), "test.py": _ORDERS_TEST}
    run(code, "python3 test.py")


BUG_BY_LOG = Task(
    id="bug_by_log",
    prompt="Customers get errors from our order service. /workspace/app.log has its log, "
    '/workspace/orders.py the code. Write /workspace/cause.json as {"requests": [ids of the failed '
    'requests in their order], "function": name of the function that raised}, and mend orders.py '
    "so that such requests work. Unknown currencies must stay a KeyError.",
    files={"workspace/app.log": _LOG, "workspace/orders.py": _ORDERS},
    check=_check_log,
    script=[
        [bash("grep -n ERROR app.log"), ("read_file", {"path": "/workspace/orders.py"})],
        [
            bash(
                'sed -i \'s/body\\["currency"\\].strip()/body["currency"].strip().upper()/\' '
                "orders.py && cat orders.py"
            ),
            (
                "write_file",
                {
                    "path": "/workspace/cause.json",
                    "content": '{"requests": ["a3", "a5"], "function": "convert"}\n',
                },
            ),
        ],
    ],
    answer="Requests a3 and a5 failed in convert(): currencies came in lower case. parse() now "
    "raises them to upper case (/workspace/orders.py).",
)

# ---- git history


def _export() -> str:
    """A history as `git fast-export` writes it."""
    commits = [
        ("Ada", "Start the settings", "TIMEOUT = 30\nRETRIES = 3\n"),
        ("Bob", "Wait longer", "TIMEOUT = 60\nRETRIES = 3\n"),
        ("Cyd", "Tidy up", "RETRIES = 3\nTIMEOUT = 60\n"),
        ("Dee", "Be kinder to the upstream", "RETRIES = 5\nTIMEOUT = 60\n"),
        ("Ada", "Describe the settings", "# In seconds\nRETRIES = 5\nTIMEOUT = 60\n"),
        ("Bob", "Sort imports", "# In seconds\nRETRIES = 5\nTIMEOUT = 60\nDEBUG = False\n"),
    ]
    lines = []
    for number, (author, subject, content) in enumerate(commits):
        stamp = f"{author} <{author.lower()}@example.com> {1_760_000_000 + number * 86_400} +0000"
        lines += [
            "commit refs/heads/main",
            f"author {stamp}",
            f"committer {stamp}",
            f"data {len(subject)}",
            subject,
            "M 100644 inline settings.py",
            f"data {len(content)}",
            content,
        ]
    return "\n".join(lines) + "\n"


def _check_git(files: Files, answer: str) -> None:
    found = files.json("workspace/found.json")
    expected = {"author": "Dee", "subject": "Be kinder to the upstream"}
    require(found == expected, f"found.json is {found!r}")
    require("Dee" in answer, "the answer does not name the author")


GIT_HISTORY = Task(
    id="git_history",
    prompt="/workspace/history.export is a `git fast-export` of a repository. Who raised RETRIES in "
    'settings.py to 5, and in which commit? Write /workspace/found.json as {"author": name, '
    '"subject": the commit\'s subject line}, and tell me.',
    files={"workspace/history.export": _export()},
    check=_check_git,
    script=[
        [
            bash(
                "git init -q /tmp/r && cd /tmp/r && git fast-import --quiet "
                "< /workspace/history.export && git log -S'RETRIES = 5' --format='%an|%s' main"
            )
        ],
        [
            (
                "write_file",
                {
                    "path": "/workspace/found.json",
                    "content": '{"author": "Dee", "subject": "Be kinder to the upstream"}',
                },
            )
        ],
    ],
    answer="Dee, in the commit “Be kinder to the upstream”. Written to /workspace/found.json.",
)

# ---- recover from a missing module

_REPORT = """\
\"\"\"Prints the stock as a table.\"\"\"
import csv
from prettytable import PrettyTable

table = PrettyTable(["item", "stock"])
with open("/workspace/stock.csv") as file:
    for row in csv.DictReader(file):
        if int(row["stock"]) < int(row["minimum"]):
            table.add_row([row["item"], row["stock"]])
print(table)
"""
_STOCK = "item,stock,minimum\npen,4,10\nbook,30,5\nlamp,0,1\nclip,100,100\n"


def _check_module(files: Files, answer: str) -> None:
    del answer
    lines = [line for line in files.text("workspace/low.md").strip().split("\n") if line.strip()]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    if len(cells) != 4 or not set("".join(cells[1])) <= set("-: "):
        raise Failed(f"low.md is no Markdown table of two rows: {lines}")
    require([cells[0], *cells[2:]] == [["item", "stock"], ["pen", "4"], ["lamp", "0"]], f"{cells}")


MISSING_MODULE = Task(
    id="missing_module",
    prompt="Run /workspace/report.py and save the table that it makes as a Markdown table with the "
    "columns item and stock in /workspace/low.md. There is no network; if the script does not run "
    "as it is, find another way to the same rows.",
    files={"workspace/report.py": _REPORT, "workspace/stock.csv": _STOCK},
    check=_check_module,
    script=[
        [bash("python3 report.py"), ("read_file", {"path": "/workspace/report.py"})],
        [
            bash(
                "python3 - <<'X'\nimport csv\nrows = [r for r in csv.DictReader(open('stock.csv')) "
                "if int(r['stock']) < int(r['minimum'])]\n"
                "lines = ['| item | stock |', '|---|---|']\n"
                "lines += [f\"| {r['item']} | {r['stock']} |\" for r in rows]\n"
                "open('low.md', 'w').write('\\n'.join(lines) + '\\n')\nX\ncat low.md"
            )
        ],
    ],
    answer="prettytable is not installed and cannot be; I computed the rows with csv alone. "
    "pen (4) and lamp (0) are in /workspace/low.md.",
)

TASKS = [FIX_FAILING_TEST, RENAME, WRITE_SCRIPT, BUG_BY_LOG, GIT_HISTORY, MISSING_MODULE]
