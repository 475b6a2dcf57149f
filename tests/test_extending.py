"""What WORKSPACE.md says of adding a memory and an aggregation is all that it takes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "mc_jax/memories/ungated.py": '''
"""Linear attention that forgets nothing: M_t = M_{t-1} + h_t k_t^T v_t."""

from mc_jax.memories._affine import DecayingMemory
from mc_jax.memories._interface import Family

UNGATED = Family(matrix=DecayingMemory("linear", ("step",)))
''',
    "mc_jax/caching/aggregations/recent.py": '''
"""The most recent top_k cached memories, weighed by the router."""

import jax.numpy as jnp

from mc_jax.caching.aggregations._interface import Aggregation, softmax_gates


def _gates(scores, eligible, top_k):
    rank = jnp.cumsum(eligible[..., ::-1], axis=-1)[..., ::-1]
    return softmax_gates(scores, (eligible & (rank <= top_k))[:, :, None])


RECENT = Aggregation(gates=_gates)
''',
}
ENTRIES = {
    "MEMORIES": (
        "mc_jax/memories/__init__.py",
        "from mc_jax.memories.ungated import UNGATED",
        '"ungated": UNGATED,',
    ),
    "MEMORY_FACTS": ("mc_jax/facts.py", "", '"ungated": MemoryFacts(),'),
    "AGGREGATIONS": (
        "mc_jax/caching/aggregations/__init__.py",
        "from mc_jax.caching.aggregations.recent import RECENT",
        '"recent": RECENT,',
    ),
    "AGGREGATION_FACTS": (
        "mc_jax/facts.py",
        "",
        '"recent": AggregationFacts(uses_router=True, top_k="always", can_anneal=True),',
    ),
}
"""By table: its file, what is imported there, the entry."""


def test_a_memory_and_an_aggregation_are_a_file_and_their_entries(tmp_path):
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    steps = text[text.index("- **add a memory**") : text.index("- **change what TPUs run**")]
    for table in ENTRIES:
        assert f"`{table}`" in steps, f"WORKSPACE.md does not tell of the entry in {table}"
    for package in ("mc_jax", "pallas_kernels"):  # with what Python compiled of them, which saves seconds
        shutil.copytree(ROOT / package, tmp_path / package)
    for name, source in FILES.items():
        (tmp_path / name).write_text(source.lstrip())
    for table, (name, imported, entry) in ENTRIES.items():
        source = (tmp_path / name).read_text()
        source, count = re.subn(rf"^({table}: .*?)^\}}", rf"\1    {entry}\n}}", source, flags=re.M | re.S)
        assert count == 1, f"{name} has no table {table}"
        if imported:
            source = source.replace("\n\n", f"\n\n{imported}\n", 1)
        (tmp_path / name).write_text(source)
    found = subprocess.run(
        [sys.executable, ROOT / "tests" / "extended_package.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, f"more than WORKSPACE.md says was needed:\n{found.stderr[-3000:]}"
