"""scripts/gpu_check in its smallest form on a CPU, and what it does about parts that die or hang."""

import importlib
import json
import os
import subprocess
import sys
import textwrap

import jax
import pytest
from pages import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("_gpu_check")


def _run(folder, *only):
    return subprocess.run(
        [SCRIPT, "--quick", "--output", folder, *(f"--only={text}" for text in only)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
    )


def test_a_layer_and_a_step_are_checked_and_told_in_a_table_and_json(tmp_path):
    done = _run(tmp_path, "linear, gated, 4K", "training step")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert (tmp_path / "gpu_check.md").read_text() == done.stdout
    assert {"card", "driver", "versions", "commit", "seconds"} <= set(found)
    rows = found["rows"]
    layer, step = (row for row in rows if "milliseconds" in row)
    assert layer["what"] == "linear, gated"
    for row in (layer, step):
        assert row["agrees"]
        assert row["tokens_per_second"] > 0
        assert row["compile_seconds"] > 0
        assert f"| {row['what']} | {row['size']} | {row['path']} |" in done.stdout
    # In bfloat16 reads are rounded: a difference of 0 would mean that nothing was compared.
    assert 0 < layer["difference"] < 1e-2
    assert 0 < layer["gradient_difference"] < 2e-2
    assert step["losses"][-1] < step["losses"][0]
    skipped = [row["part"] for row in rows if row.get("skipped") == "there is no PyTorch here"]
    assert skipped == ["PyTorch, eager", "PyTorch, compiled"]


def test_without_a_gpu_it_says_what_to_do(monkeypatch, tmp_path, capsys, gpu_check):
    monkeypatch.setattr(gpu_check, "_answer", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path)])
    assert gpu_check.main() == 2
    assert "give --quick" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_part_that_dies_or_hangs_takes_nothing_with_it(tmp_path, monkeypatch, capsys, gpu_check):
    row = {
        "what": "a layer",
        "size": "1 x 2",
        "path": "XLA",
        "milliseconds": 2.0,
        "tokens_per_second": 1000.0,
    }
    row |= {"compile_seconds": 0.5, "difference": 0.001, "agrees": True}
    script = tmp_path / "part.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys, time
            print('ROW {json.dumps(row)}', flush=True)
            print('a library prints this', flush=True)
            if sys.argv[1] == 'dies':
                print('40 lines of trace', file=sys.stderr)
                sys.exit('CUDA_ERROR_ILLEGAL_ADDRESS')
            if sys.argv[1] == 'hangs':
                time.sleep(600)
        """)
    )
    monkeypatch.setattr(gpu_check, "_GRACE", 0.5)
    monkeypatch.setattr(
        gpu_check, "_QUICK_PARTS", tuple((how, (str(script), how), 2) for how in ("dies", "hangs", "ends"))
    )
    output = tmp_path / "output"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--quick", "--seconds=6", "--output", str(output)])
    assert gpu_check.main() == 1
    rows = json.loads((output / "gpu_check.json").read_text())["rows"]
    assert [found["part"] for found in rows if "milliseconds" in found] == ["dies", "hangs", "ends"]
    failed = {found["part"]: found["failed"] for found in rows if "failed" in found}
    assert failed["dies"] == "ended with 1: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert failed["hangs"].endswith("s after a layer, XLA")
    assert list(failed) == ["dies", "hangs"]
    assert capsys.readouterr().out.count("| a layer | 1 x 2 | XLA | 2.00 | 1,000 | 0.5 |") == 3


def test_of_the_selftest_what_differs_is_told(gpu_check, tmp_path):
    report = gpu_check.Report(tmp_path, {"card": "a card"})
    row = {"part": "selftest", "what": "an operation", "dtype": "float32", "path": "xla", "agrees": True}
    report.add(row | {"difference": 1e-7, "gradient_difference": None})
    report.add(row | {"path": "gpu", "agrees": False, "difference": float("nan"), "failed": "no instruction"})
    assert "Selftest: 1 of 2 agree" in report.table()
    assert "- an operation, gpu, float32: failed: no instruction" in report.table()
    assert "| ms |" not in report.table()


def test_numbers_that_differ_are_no_success(gpu_check, tmp_path):
    report = gpu_check.Report(tmp_path, {"card": "a card"})
    row = {"part": "4K", "what": "a layer", "size": "1 x 2", "path": "XLA", "milliseconds": 2.0}
    row |= {"tokens_per_second": 1000.0, "compile_seconds": 0.5, "agrees": False, "difference": float("nan")}
    report.add(row)
    assert "| DIFFERS: nan |" in report.table()
    assert json.loads((tmp_path / "gpu_check.json").read_text())["rows"][0]["difference"] == "nan"
