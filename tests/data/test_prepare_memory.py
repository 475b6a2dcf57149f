"""Memory does not grow with a file: measured in a process of its own, as the system counts it."""

import gzip
import json
import subprocess
import sys

import pytest

from mc_jax.data.tokenizer import train_bpe

WORDS = "The harbour froze early that year, and the boats lay still until March.\n"
PROGRAM = """
import sys
from mc_jax.cli import main
assert main(sys.argv[1:]) == 0
# Not ru_maxrss, which begins at the peak of the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(*words):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "prepare", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "zeros.txt.gz", "a.parquet"])
def test_peak_memory_is_that_of_a_file_of_a_tenth(tmp_path, name):
    train_bpe([WORDS * 9], 270).save(tmp_path / "tokenizer.json")
    peaks = []
    for megabytes in (6, 60):
        path = tmp_path / str(megabytes) / name
        path.parent.mkdir()
        if name.startswith("zeros"):
            with gzip.open(path, "wb", compresslevel=1) as file:
                for _ in range(megabytes):
                    file.write(b"0" * 10**6)
        elif name == "a.parquet":
            pyarrow = pytest.importorskip("pyarrow", reason="needs the extra hf")
            parquet = pytest.importorskip("pyarrow.parquet")
            texts = [f"{row} {WORDS * 14}" for row in range(megabytes * 1000)]
            parquet.write_table(pyarrow.table({"text": texts}), path)
        else:
            lines = [json.dumps({"text": WORDS * 14}) + "\n" if "json" in name else WORDS * 14] * 1000
            content = "".join(lines).encode()
            content = content.replace(b"}\n", b"},\n") if name == "a.json" else content
            with gzip.open(path, "wb", compresslevel=1) if name.endswith(".gz") else path.open("wb") as file:
                begin, end = (b"[", b'{"text": "end"}]') if name == "a.json" else (b"", b"")
                file.write(begin)
                for _ in range(megabytes):
                    file.write(content)
                file.write(end)
        out = path.parent / "out"
        # The others read alike, and bytes are quicker.
        tokenizer = tmp_path / "tokenizer.json" if name == "a.txt" else "bytes"
        peaks.append(peak(path, "--output", out, "--tokenizer", tokenizer))
    assert peaks[1] <= 1.2 * peaks[0], f"{peaks} kB: what grows with the file?"
