"""Fills the folder of the first argument, with `bytes` or `inodes`; says what stopped it."""

import errno
import json
import os
import shutil
import sys

folder, what = sys.argv[1:]
place = os.path.join(folder, "full")
os.mkdir(place)
written = count = 0
block = b"z" * (1 << 20)
try:
    while True:
        with open(os.path.join(place, str(count)), "wb", buffering=0) as file:
            count += 1
            while what == "bytes":
                written += file.write(block)
except OSError as error:
    stopped = errno.errorcode[error.errno]
shutil.rmtree(place)
with open(os.path.join(folder, "again"), "wb") as file:
    file.write(block)
os.remove(os.path.join(folder, "again"))
print(json.dumps({"stopped": stopped, "bytes": written, "files": count}))
