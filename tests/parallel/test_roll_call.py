"""Processes that do not come, or do not belong together, are named within the time that is set."""

import concurrent.futures
import contextlib
import json
import os
import socket
import time

import pytest

from mc_jax.cli import main
from mc_jax.parallel.gathering import interface_of
from mc_jax.parallel.processes import _place, joined
from mc_jax.parallel.roll_call import RollCall


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def call(port: int, *places: tuple[int, int], patience: float = 20.0) -> list[str]:
    """What each of several threads, by index and count, hears at the roll call: an error, or ""."""

    def come(index: int, count: int) -> str:
        try:
            links.append(RollCall(("localhost", port), count, index, patience=patience, part=lambda: None))
        except ValueError as error:
            return str(error)
        return ""

    links: list[RollCall] = []
    with concurrent.futures.ThreadPoolExecutor(len(places)) as threads:
        told = list(threads.map(come, *zip(*places, strict=True)))
        list(threads.map(RollCall.leave, links))
    return told


def test_all_come_in_any_order_and_leave_together(port):
    assert call(port, (2, 3), (0, 3), (1, 3)) == ["", "", ""]


def test_all_that_came_hear_who_is_missing(port):
    told = (
        "2 of 4 processes came within 1 s, missing: 1, 3; see what they print, or correct --processes.count"
    )
    assert call(port, (0, 4), (2, 4), patience=1.0) == [told, told]


def test_processes_that_count_differently_are_named(port):
    told = call(port, (0, 2), (1, 3))
    assert told[0] == told[1]
    assert f"pid {os.getpid()}) was told of 3 processes, process 0 of 2; give all the same" in told[0]


def test_two_processes_with_one_index_are_told_so(port):
    told = call(port, (0, 3), (1, 3), (1, 3))
    assert told == ["two processes have the index 1; give each its own --processes.index"] * 3


GREETING = {"greeting": "mc-jax roll call 2", "index": 1, "count": 2, "name": "a, pid 1"}


def greeting(**changed) -> bytes:
    return json.dumps(GREETING | changed).encode() + b"\n"


# What comes from no process of any run, though it may know the words.
NONSENSE = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\xfe\x00\n",
    b"[]\n",
    b"[" * 5000 + b"\n",
    b"x" * 100_000,
    b'{"greeting": "mc-jax roll call 2"}\n',
    greeting(greeting="mc-jax roll call 1"),
    greeting(index=7),
    greeting(index=-1),
    greeting(index="1"),
    greeting(index=True),
    greeting(index=1.0),
    greeting(index=[1]),
    greeting(count=None),
    greeting(name=5),
    greeting(name="n" * 1000),
]


def knock(port: int, *words: bytes) -> list[socket.socket]:
    """Connections that have said these words each, as soon as somebody listens."""
    connections = []
    for said in words:
        for _ in range(1000):
            with contextlib.suppress(OSError):
                connections.append(connection := socket.create_connection(("localhost", port)))
                connection.sendall(said)
                break
            time.sleep(0.01)
    return connections


def test_nonsense_at_the_port_ends_nothing_and_is_counted(port):
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, port, (0, 2), patience=3.0)
        for connection in knock(port, *NONSENSE):
            connection.close()
        (told,) = first.result()
    assert told == (
        "1 of 2 processes came within 3 s, missing: 1 "
        f"({len(NONSENSE)} connections were of no process of this run); "
        "see what they print, or correct --processes.count"
    )


def test_those_who_say_nothing_hold_up_nobody(port):
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, port, (0, 2))
        silent = knock(port, *[b"{"] * 20)
        began = time.monotonic()
        assert call(port, (1, 2)) == [""]
        assert first.result() == [""]
        assert time.monotonic() - began < 5.0, "each may take five seconds to greet, beside the others"
        for connection in silent:
            connection.close()


def test_a_process_that_is_started_again_takes_its_place(port):
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, port, (0, 3))
        (killed,) = knock(port, greeting(count=3))
        time.sleep(0.3)
        killed.close()
        assert call(port, (1, 3), (2, 3)) == ["", ""]
        assert first.result() == [""]


def test_process_0_listens_on_the_coordinators_interface_alone(port):
    assert interface_of(("127.0.0.1", port)) == "127.0.0.1"
    assert interface_of(("localhost", port)) in ("127.0.0.1", "::1")
    assert interface_of(("192.0.2.1", port)) == "", "an address of no machine may be a router's"
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, port, (0, 2))
        knock(port, b"\n")[0].close()
        elsewhere = socket.gethostbyname(socket.gethostname())
        for address in {elsewhere, "127.0.0.2"} - {"127.0.0.1"}:
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((address, port), timeout=5.0)
        assert call(port, (1, 2)) == [""]
        assert first.result() == [""]


def test_a_machines_own_name_that_is_a_loopback_address_is_not_listened_to(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 1))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert interface_of(("node017", 1)) == "", "the others know that name by another address"


def test_nonsense_from_a_process_of_the_run_is_dropped(port):
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, port, (0, 2))
        (second,) = knock(port, greeting())
        for said in NONSENSE[2:5]:
            second.sendall(said)
        second.sendall(b'{"left": 1}\n')
        assert first.result() == [""]
        second.close()


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (0, "1 of 2 processes came within 0.5 s, missing: 1"),
        (1, "process 0 did not answer at localhost:{port} within 0.5 s"),
    ],
)
def test_a_missing_process_is_told_in_one_line_with_exit_code_2(capsys, tmp_path, port, index, told):
    code = main(
        [
            "train", "quickstart", "--runs-dir", str(tmp_path), "--processes.patience", "0.5",
            "--processes.coordinator", f"localhost:{port}", "--processes.count", "2",
            "--processes.index", str(index),
        ]
    )  # fmt: skip
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mc-jax: error: {told.format(port=port)}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"count": 2}, "--processes.coordinator and --processes.index is missing"),
        ({"coordinator": "a:1", "count": 2}, "--processes.index is missing"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "--processes.index 2 is none of 0 to"),
        ({"coordinator": "a", "count": 2, "index": 1}, "'a' is no HOST:PORT, for example 10.0.0.1:8476"),
        ({"count": 1, "index": 1}, "--processes.coordinator is missing"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told), joined(**arguments):
        pass


def test_a_process_that_nothing_tells_of_others_is_alone():
    assert _place(None, None, None, 1.0) is None


def test_slurm_tells_who_is_who(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "node[017-020]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    place = _place(None, None, None, 1.0)
    assert place is not None
    assert (place.address.partition(":")[0], place.count, place.index) == ("node017", 4, 3)
    assert _place(None, 1, None, 1.0) is None, "--processes.count 1 keeps a process alone"
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert _place(None, None, None, 1.0) is None


def test_a_pod_of_tpus_tells_who_is_who(monkeypatch):
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost,elsewhere",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    place = _place(None, None, None, 1.0)
    assert place is not None
    assert (place.address.partition(":")[0], place.count, place.index) == ("localhost", 4, 3)
