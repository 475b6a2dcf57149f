"""An installed libtpu is quiet where there is no TPU, and left alone where there is one."""

import os

import pytest

from mc_jax._absent_tpu import quiet_libtpu


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine with devices of the given makers, and an environment that says nothing of TPUs."""
    for name in [name for name in os.environ if name.startswith("TPU_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "")

    def make(*makers):
        for number, maker in enumerate(makers):
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "vendor").write_text(maker + "\n")
        return tmp_path

    yield make
    for name in [name for name in os.environ if name.startswith("TPU_")]:
        del os.environ[name]  # monkeypatch puts back what was there


def test_without_a_tpu_nothing_is_asked_of_the_network(machine):
    quiet_libtpu(machine("0x8086", "0x10de"))
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_beside_a_tpu_its_host_is_asked_for(machine):
    quiet_libtpu(machine("0x8086", "0x1ae0"))
    assert "TPU_SKIP_MDS_QUERY" not in os.environ


def test_what_the_environment_says_stays(machine, monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")
    quiet_libtpu(machine())
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v6e-8"
