# ruff: noqa: E501 - prompts, pages and scripts stand here as they are
"""Tasks on data: tables, databases, pages, images."""

import csv
import io
import json
import sqlite3
import struct
import zlib

from benchmarks.agent_tasks.task import Files, Task, bash, number_in, python, require


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def _csv(rows: list[dict[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# ---- a sum from a table

_REGIONS = ("North", "South", "East", "West")
_SALES: list[dict[str, object]] = [
    {
        "date": f"2026-{1 + n % 4:02}-{1 + n * 7 % 28:02}",
        "region": _REGIONS[n * 3 % 4] if n % 9 else "north",
        "item": ("Pen, blue", "Book", 'Lamp 12"')[n % 3],
        "units": 1 + n % 7,
        "unit_price": f"{2 + n * 37 % 50 + n % 4 * 0.25:.2f}" if n % 13 else "",
    }
    for n in range(240)
]
_NORTH_IN_MARCH = sum(
    int(str(row["units"])) * float(str(row["unit_price"]))
    for row in _SALES
    if str(row["region"]).lower() == "north"
    and str(row["date"]).startswith("2026-03")
    and row["unit_price"]
)


def _check_sum(files: Files, answer: str) -> None:
    require(number_in(files.text("workspace/total.txt"), _NORTH_IN_MARCH), "total.txt is wrong")
    require(number_in(answer, _NORTH_IN_MARCH), "the answer does not give the number")


CSV_SUM = Task(
    id="csv_sum",
    prompt="/workspace/sales.csv: what is the revenue (units times unit_price) of the region North in "
    "March 2026? The region's spelling differs in case; rows without a price do not count. Write the "
    "number with two decimals to /workspace/total.txt and tell me.",
    files={"workspace/sales.csv": _csv(_SALES)},
    check=_check_sum,
    script=[
        [bash("head -5 sales.csv; cut -d, -f2 sales.csv | sort | uniq -c")],
        [
            python(
                "import pandas as pd\nd = pd.read_csv('/workspace/sales.csv')\n"
                "d = d[(d.region.str.lower() == 'north') & d.date.str.startswith('2026-03')]\n"
                "total = (d.units * d.unit_price).sum()\n"
                "open('/workspace/total.txt', 'w').write(f'{total:.2f}\\n')\nprint(f'{total:.2f}')"
            )
        ],
    ],
    answer=f"The revenue is {_NORTH_IN_MARCH:,.2f} (/workspace/total.txt).",
)

# ---- data from pages

_PRODUCTS = [
    {"name": "Desk lamp", "price": 39.9, "stock": 4},
    {"name": "Café chair", "price": 1249.0, "stock": 0},
    {"name": "Shelf <small>", "price": 75.5, "stock": 12},
    {"name": "Rug & mat", "price": 18.0, "stock": 7},
]
_SHOWN_PRICES = ("39.90 €", "1,249.00 €", "75.50 €", "18.00 €")


def _page(number: int) -> str:
    product, price = _PRODUCTS[number], _SHOWN_PRICES[number]
    name = str(product["name"]).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    stock = f"<b>{product['stock']}</b> in stock" if product["stock"] else "sold out"
    return (
        f"<!doctype html><html><head><title>{name} | Shop</title></head><body>"
        f"<nav><a href=p0.html>Home</a> <span class=price>from 9.99 €</span></nav>\n"
        f'<div id="product"><h1>{name}</h1><p class="price"><s>99.99 €</s> {price}</p>'
        f"<p>{stock}</p></div></body></html>\n"
    )


def _check_pages(files: Files, answer: str) -> None:
    del answer
    found = files.json("workspace/products.json")
    require(found == _PRODUCTS, f"products.json is {json.dumps(found)[:300]}")


HTML_EXTRACT = Task(
    id="html_extract",
    prompt="/workspace/pages has four saved product pages, p0.html to p3.html. Write "
    '/workspace/products.json: a list in that order of {"name", "price" (number, what it costs '
    'now), "stock" (number, 0 if sold out)}.',
    files={f"workspace/pages/p{n}.html": _page(n) for n in range(4)},
    check=_check_pages,
    script=[
        [("list_files", {"path": "/workspace/pages"}), bash("cat pages/p0.html pages/p1.html")],
        [
            python(
                "import json, re\nfrom bs4 import BeautifulSoup\nout = []\nfor n in range(4):\n"
                "    page = open(f'/workspace/pages/p{n}.html').read()\n"
                "    box = BeautifulSoup(page, 'html.parser').find(id='product')\n"
                "    price = box.find(class_='price'); price.s.decompose()\n"
                "    stock = re.search(r'(\\d+) in stock', box.get_text())\n"
                "    cost = float(re.sub(r'[^\\d.]', '', price.get_text()))\n"
                "    out.append({'name': box.h1.get_text(), 'price': cost,"
                " 'stock': int(stock[1]) if stock else 0})\n"
                "json.dump(out, open('/workspace/products.json', 'w'))\nout"
            )
        ],
    ],
    answer="Four products are in /workspace/products.json.",
)

# ---- JSON to CSV

_PEOPLE = [
    {"id": 30, "name": {"first": "Zoë", "last": "Ng"}, "tags": ["a", "b"], "address": None},
    {
        "id": 4,
        "name": {"first": "Al", "last": "O'Neil, Jr."},
        "tags": [],
        "address": {"city": "Rome"},
    },
    {"id": 12, "name": {"first": "Bo", "last": "Li"}, "tags": ["x"], "address": {"city": "Oslo"}},
]
_PEOPLE_ROWS = [
    {"id": "4", "name": "Al O'Neil, Jr.", "city": "Rome", "tags": ""},
    {"id": "12", "name": "Bo Li", "city": "Oslo", "tags": "x"},
    {"id": "30", "name": "Zoë Ng", "city": "", "tags": "a;b"},
]


def _check_people(files: Files, answer: str) -> None:
    del answer
    text = files.text("workspace/people.csv")
    require(text.startswith("id,name,city,tags\n"), "the header is not id,name,city,tags")
    require(_rows(text) == _PEOPLE_ROWS, f"the rows are {_rows(text)}")


JSON_TO_CSV = Task(
    id="json_to_csv",
    prompt="Turn /workspace/people.json into /workspace/people.csv with the columns id, name (first "
    "and last, with a space), city (empty if unknown), tags (joined by ;), sorted by id as numbers.",
    files={"workspace/people.json": json.dumps(_PEOPLE)},
    check=_check_people,
    script=[
        [
            python(
                "import csv, json\nrows = sorted(json.load(open('/workspace/people.json')),"
                " key=lambda p: p['id'])\nwith open('/workspace/people.csv', 'w', newline='') as f:\n"
                "    w = csv.writer(f)\n    w.writerow(['id', 'name', 'city', 'tags'])\n"
                "    for p in rows:\n        w.writerow([p['id'], ' '.join(p['name'].values()),"
                " (p['address'] or {}).get('city', ''), ';'.join(p['tags'])])\n"
                "print(open('/workspace/people.csv').read())"
            )
        ]
    ],
    answer="Three rows, in /workspace/people.csv.",
)

# ---- one row for each person

_CONTACTS: list[dict[str, object]] = [
    {"email": "Ann@Example.com", "phone": "1", "updated": "2026-01-05"},
    {"email": "bob@example.com", "phone": "2", "updated": "2026-02-01"},
    {"email": " ann@example.com", "phone": "3", "updated": "2026-03-01"},
    {"email": "cy@example.com", "phone": "4", "updated": "2025-12-31"},
    {"email": "BOB@example.com", "phone": "5", "updated": "2025-02-01"},
    {"email": "ann@example.com", "phone": "6", "updated": "2026-02-28"},
]
_KEPT = [
    {"email": "ann@example.com", "phone": "3", "updated": "2026-03-01"},
    {"email": "bob@example.com", "phone": "2", "updated": "2026-02-01"},
    {"email": "cy@example.com", "phone": "4", "updated": "2025-12-31"},
]


def _check_contacts(files: Files, answer: str) -> None:
    require(_rows(files.text("workspace/clean.csv")) == _KEPT, "clean.csv is wrong")
    require(files.text("workspace/contacts.csv") == _csv(_CONTACTS), "the original was changed")
    require(number_in(answer, 3), "the answer does not say how many were removed")


DEDUPE = Task(
    id="dedupe",
    prompt="/workspace/contacts.csv has people more than once. Write /workspace/clean.csv with the "
    "same columns: one row for each e-mail address (case and spaces around it do not matter; write it "
    "in lower case), the one updated last, sorted by e-mail. Leave the original. Say how many rows "
    "were removed.",
    files={"workspace/contacts.csv": _csv(_CONTACTS)},
    check=_check_contacts,
    script=[
        [("read_file", {"path": "/workspace/contacts.csv"})],
        [
            python(
                "import pandas as pd\nd = pd.read_csv('/workspace/contacts.csv', dtype=str)\n"
                "n = len(d)\nd['email'] = d.email.str.strip().str.lower()\n"
                "d = d.sort_values('updated').drop_duplicates('email', keep='last')"
                ".sort_values('email')\nd.to_csv('/workspace/clean.csv', index=False)\nn - len(d)"
            )
        ],
    ],
    answer="3 rows were removed; the rest is in /workspace/clean.csv.",
)

# ---- units

_LENGTHS = [
    ("beam", "2.5 m"),
    ("rod", "96 in"),
    ("pipe", "7 ft"),
    ("wire", "180 cm"),
    ("bar", "1 m"),
]
_METRES = {"m": 1.0, "in": 0.0254, "ft": 0.3048, "cm": 0.01}
_MEAN = sum(float(v.split()[0]) * _METRES[v.split()[1]] for _, v in _LENGTHS) / len(_LENGTHS)


def _check_units(files: Files, answer: str) -> None:
    del files
    require(number_in(answer, round(_MEAN, 3), tolerance=0.0006), "the mean is wrong or missing")
    require("beam" in answer, "the answer does not name the longest")


UNITS = Task(
    id="units",
    prompt="/workspace/lengths.csv has lengths in several units. What is their mean in metres, to "
    "three decimals, and which part is the longest? Just tell me.",
    files={"workspace/lengths.csv": "part,length\n" + "".join(f"{p},{v}\n" for p, v in _LENGTHS)},
    check=_check_units,
    script=[
        [bash("cat lengths.csv")],
        [
            python(
                "u = {'m': 1, 'in': .0254, 'ft': .3048, 'cm': .01}\n"
                "import csv\nr = {x['part']: float(x['length'].split()[0]) * u[x['length'].split()[1]]"
                " for x in csv.DictReader(open('/workspace/lengths.csv'))}\n"
                "print(round(sum(r.values()) / len(r), 3), max(r, key=r.get))"
            )
        ],
    ],
    answer=f"The mean is {_MEAN:.3f} m; the longest is the beam.",
)

# ---- a database

_ORDERS = [
    (1, "Ann", 120.0, "paid"),
    (2, "Bob", 300.0, "refunded"),
    (3, "Cy", 150.0, "paid"),
    (4, "Ann", 45.5, "paid"),
    (5, "Bob", 90.0, "paid"),
    (6, "Cy", 10.0, "open"),
]


def _database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table customers (id integer primary key, name text)")
    connection.execute(
        "create table orders (id integer primary key, customer_id integer, total real, status text)"
    )
    names = sorted({name for _, name, _, _ in _ORDERS})
    connection.executemany("insert into customers values (?, ?)", list(enumerate(names)))
    connection.executemany(
        "insert into orders values (?, ?, ?, ?)",
        [(order, names.index(name), total, status) for order, name, total, status in _ORDERS],
    )
    connection.commit()
    return connection.serialize()


def _check_database(files: Files, answer: str) -> None:
    found = files.json("workspace/top.json")
    require(found == {"customer": "Ann", "total": 165.5}, f"top.json is {found!r}")
    require("Ann" in answer, "the answer does not name the customer")


SQLITE = Task(
    id="sqlite_query",
    prompt="/workspace/shop.db is an SQLite database. Which customer has paid us the most (orders "
    'with the status paid)? Write /workspace/top.json as {"customer": name, "total": number} and '
    "tell me.",
    files={"workspace/shop.db": _database()},
    check=_check_database,
    script=[
        [bash("sqlite3 shop.db .schema 'select status, count(*) from orders group by 1'")],
        [
            bash(
                'sqlite3 -json shop.db "select name customer, sum(total) total from orders join '
                "customers c on c.id = customer_id where status = 'paid' group by 1 order by 2 desc "
                "limit 1\" | jq '.[0]' | tee top.json"
            )
        ],
    ],
    answer="Ann, with 165.50 (/workspace/top.json).",
)

# ---- images


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + bytes(width) for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def _check_images(files: Files, answer: str) -> None:
    del answer
    found = files.text("workspace/largest.txt").strip()
    require(found == "b.png 90x70", f"largest.txt says {found[:100]!r}")


IMAGE_SIZE = Task(
    id="image_size",
    prompt="Which of the images in /workspace/images has the most pixels? Write one line to "
    "/workspace/largest.txt: its file name, a space, and its width and height as WxH.",
    files={
        "workspace/images/a.png": _png(120, 50),
        "workspace/images/b.png": _png(90, 70),
        "workspace/images/c.png": _png(20, 300),
    },
    check=_check_images,
    script=[
        [bash("file images/*"), ("view_image", {"path": "/workspace/images/b.png"})],
        [bash("echo 'b.png 90x70' > largest.txt")],
    ],
    answer="b.png, 90x70 pixels; in /workspace/largest.txt.",
)

TASKS = [CSV_SUM, HTML_EXTRACT, JSON_TO_CSV, DEDUPE, UNITS, SQLITE, IMAGE_SIZE]
