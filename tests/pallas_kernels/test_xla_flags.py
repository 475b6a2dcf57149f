"""XLA is told to call libraries for single products alone, and what a user or a TPU's host says stays."""

import os

import pytest

from pallas_kernels._xla_flags import call_libraries_for_single_products

FLAG = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


@pytest.mark.parametrize(
    ("before", "maker", "after"),
    [
        ("", "0x8086", FLAG),
        ("--xla_dump_to=there", "0x10de", f"--xla_dump_to=there {FLAG}"),
        (FLAG + ",LIBRARY_FUSION_TYPE_DOT", "0x8086", FLAG + ",LIBRARY_FUSION_TYPE_DOT"),
        ("", "0x1ae0", ""),
    ],
    ids=["nothing said", "something else said", "this one said", "beside a TPU"],
)
def test_flags(before, maker, after, tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "vendor").write_text(maker + "\n")
    monkeypatch.setenv("XLA_FLAGS", before)
    call_libraries_for_single_products(tmp_path)
    assert os.environ["XLA_FLAGS"] == after
