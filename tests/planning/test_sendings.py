"""What a program sends while it computes begins and ends where the compiler has put it."""

import pytest

from mc_jax.planning.chips import CHIPS
from mc_jax.planning.collectives import Collective
from mc_jax.planning.program import Operation, operations
from mc_jax.planning.speed import speed_of

GATHERED = "all-gather(%w), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}"

IN_A_PAIR = f"""
ENTRY %main (w: f32[2]) -> f32[8] {{
  %w = f32[2]{{0}} parameter(0)
  %all-gather-start = (f32[2]{{0}}, f32[8]{{0}}) {GATHERED.replace("(", "-start(", 1)}
  %add = f32[8]{{0}} add(%w, %w), backend_config={{"estimated_cycles":"100"}}
  ROOT %all-gather-done = f32[8]{{0}} all-gather-done(%all-gather-start)
}}
"""

ON_ANOTHER_CORE = f"""
%called (w: f32[2]) -> f32[8] {{
  %w = f32[2]{{0}} parameter(0)
  ROOT %all-gather.1 = f32[8]{{0}} {GATHERED}
}}, execution_thread="sparsecore"

ENTRY %main (w: f32[2]) -> f32[8] {{
  %w = f32[2]{{0}} parameter(0)
  %call-start = ((), (), (s32[1]{{0}})) call-start(), async_execution_thread="sparsecore", to_apply=%called
  %copy-start = (f32[2]{{0}}, f32[2]{{0}}) copy-start(%w)
  %copy-done = f32[2]{{0}} copy-done(%copy-start)
  %call-update = ((f32[2]{{0}}), f32[8]{{0}}) call-update(%call-start, %copy-done)
  %add = f32[8]{{0}} add(%w, %w), backend_config={{"estimated_cycles":"100"}}
  ROOT %call-done = f32[8]{{0}} call-done(%call-update)
}}
"""

_PIECE = f"""  %w = f32[2]{{0}} parameter(0)
  %gather = f32[8]{{0}} {GATHERED}, backend_config={{"async_collective_fusion_config":{{}}}}
"""

IN_PIECES = f"""
%first (w: f32[2]) -> f32[8] {{
{_PIECE}  ROOT %begin = f32[8]{{0}} custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}}

%piece (w: f32[2]) -> f32[8] {{
{_PIECE}  ROOT %sum = f32[8]{{0}} add(%w, %w)
}}

%last (w: f32[2]) -> f32[8] {{
{_PIECE}  ROOT %end = f32[8]{{0}} custom-call(%gather), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (w: f32[2]) -> f32[8] {{
  %w = f32[2]{{0}} parameter(0)
  %starts = f32[8]{{0}} fusion(%w), kind=kCustom, calls=%first
  %on = f32[8]{{0}} fusion(%starts), kind=kOutput, calls=%piece, backend_config={{"estimated_cycles":"100"}}
  ROOT %ends = f32[8]{{0}} fusion(%on), kind=kCustom, calls=%last
}}
"""

_MEET = 'frontend_attributes={_xla_host_transfer_rendezvous="a_0",_xla_megascale_transfer_type="ALL_REDUCE"}'

BETWEEN_SLICES = f"""
ENTRY %main (w: f32[2]) -> f32[2] {{
  %w = f32[2]{{0}} parameter(0)
  %first = token[] after-all()
  %recv = (f32[2]{{0}}, u32[], token[]) recv(%first), channel_id=1, {_MEET}
  %send = (f32[2]{{0}}, u32[], token[]) send(%w, %first), channel_id=2, {_MEET}
  %add = f32[2]{{0}} add(%w, %w), backend_config={{"estimated_cycles":"100"}}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (f32[2]{{0}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = f32[2]{{0}} get-tuple-element(%recv-done), index=0
}}
"""


@pytest.mark.parametrize(
    ("text", "begins", "waits"),
    [
        (IN_A_PAIR, "all-gather-start", "all-gather-done"),
        (ON_ANOTHER_CORE, "call-update", "call-done"),
        (IN_PIECES, "starts", "ends"),
        (BETWEEN_SLICES, "send", "recv-done"),
    ],
)
def test_a_sending_is_counted_once_and_goes_on_beside_what_lies_between(text, begins, waits):
    found = list(operations(text))
    assert [(one.name, one.overlaps) for one in found if one.collective] == [(begins, True)]
    assert [(one.name, one.waits_for) for one in found if one.waits_for] == [(waits, begins)]
    names = [one.name for one in found]
    between = found[names.index(begins) + 1 : names.index(waits)]
    assert sum(one.cycles for one in between) == 100


def test_a_sending_that_nothing_goes_beside_is_one_operation():
    text = f"ENTRY %main (w: f32[2]) -> f32[8] {{\n  ROOT %all-gather = f32[8]{{0}} {GATHERED}\n}}\n"
    (one,) = operations(text)
    assert one.collective
    assert not one.overlaps
    assert one.waits_for is None


def _one(name: str, *, seconds: float = 0.0, sends: bool = False, waits_for=None, overlaps=False, times=1):
    return Operation(
        name=name,
        kind="fusion",
        shape="",
        source="",
        times=times,
        cycles=round(seconds * CHIPS["v5e"].clock),
        is_kernel=False,
        collective="a line" if sends else None,
        overlaps=overlaps,
        waits_for=waits_for,
    )


def _sent(seconds: float, *, network: bool = False) -> Collective:
    return Collective(
        kind="all-reduce",
        axes=(),
        chips=2,
        bytes=8,
        times=1,
        overlaps=True,
        seconds=seconds,
        network=network,
    )


def _speed(operations, sent, sending):
    speed = speed_of(
        operations, (), sent, sending, CHIPS["v5e"], chips=4, tokens=1, flops=1.0, kernel_products=0.0
    )
    assert speed.tokens_per_second == pytest.approx(1 / speed.seconds)
    return speed


def _seconds(operations, each: float) -> float:
    """How long a step takes whose sendings take `each` seconds."""
    return _speed(operations, (_sent(each),), lambda _: _sent(each)).seconds


@pytest.mark.parametrize(
    ("each", "expected"),
    [
        (0.5, 1.0 + 2.0),  # behind what lies between
        (1.5, 1.0 + 1.5 + 1.0),  # half a second is waited for
    ],
)
def test_a_step_waits_for_what_computing_does_not_hide(each, expected):
    step = [
        _one("before", seconds=1.0),
        _one("begins", sends=True, overlaps=True),
        _one("between", seconds=1.0),
        _one("ends", waits_for="begins"),
        _one("after", seconds=1.0),
    ]
    assert _seconds(step, each) == pytest.approx(expected)


def test_what_is_sent_at_once_is_waited_for_and_one_sending_goes_after_another():
    assert _seconds([_one("a", seconds=1.0), _one("b", sends=True)], 2.0) == pytest.approx(3.0)
    both = [
        _one("begins", sends=True, overlaps=True),
        _one("begins too", sends=True, overlaps=True),
        _one("between", seconds=1.0),
        _one("ends", waits_for="begins"),
        _one("ends too", waits_for="begins too"),
    ]
    assert _seconds(both, 2.0) == pytest.approx(4.0)


def test_the_network_between_slices_works_beside_the_links_of_a_slice():
    step = [
        _one("links", sends=True, overlaps=True),
        _one("network", sends=True, overlaps=True),
        _one("between", seconds=1.0),
        _one("links' end", waits_for="links"),
        _one("network's end", waits_for="network"),
    ]
    links, network = _sent(2.0), _sent(2.0, network=True)
    speed = _speed(step, (links, network), lambda one: network if one.name == "network" else links)
    assert speed.seconds == pytest.approx(2.0)
    assert speed.least_seconds == pytest.approx(2.0)


def test_a_loop_is_as_long_as_all_its_turns():
    turns = [
        _one("begins", sends=True, overlaps=True, times=10),
        _one("between", seconds=1.0, times=10),
        _one("ends", waits_for="begins", times=10),
    ]
    assert _seconds(turns, 3.0) == pytest.approx(30.0)
