"""A kernel's cycles are read off the schedule that the compiler writes down."""

import itertools

import pytest

from mc_jax.planning.schedule import read_schedule

SCHEDULE = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0  ;;  %s2 = smov 0 }
   0x1 LB: > { %s3 = sadd.s32 1, %s2 }
   0x2   : > { %9 = dma.hbm_to_vmem [thread:$0]  (%p5), /*hbm=*/%s2, /*size_in_granules=*/4, /*vmem=*/%s3 }
   0x3   :  {} /* a bundle that waits carries no brackets */
   0x4 LB: >> { %v1 = vld [vmem:[%s3] sm:$0xff] }
   0x5   : >> { %v2 = vadd.f32 %v1, %v1 }
   0x6   : > { %10 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s3, /*size_in_granules=*/2, /*hbm=*/%s2 }
   0x7   : > { %p1 = scmp.ge.s32.totalorder %s2, 10 /* loop exit test */ }
   0x8   :  { %11 = vsyncpa [#allocation5], 1 }
"""


def test_bundles_and_copies_are_multiplied_by_the_turns_of_their_loops():
    kernel = read_schedule(SCHEDULE)
    assert kernel.cycles(itertools.repeat(3)) == 2 + 10 * (5 + 3 * 2)
    assert kernel.bytes(itertools.repeat(3)) == 10 * 32 * (4 + 2)


def test_a_bundle_of_a_loop_that_is_for_after_it_does_not_end_it():
    before = "   0x5   : >> { %v2 = vadd.f32 %v1, %v1 }\n"
    after = "   0x5   : > { %s7 = smov (%p2), 0 }\n"
    assert before in SCHEDULE
    kernel = read_schedule(SCHEDULE.replace(before, after + before))
    assert kernel.cycles(itertools.repeat(3)) == 2 + 10 * (5 + 3 * 3), "the body goes on after it"


def test_a_loop_that_decides_its_turns_while_it_runs_must_be_told_of():
    with pytest.raises(ValueError, match="give the mean"):
        read_schedule(SCHEDULE).cycles(iter(()))


BRANCHES = """
     0   :  { %s1 = smov 0 }
   0x1   :  { %2 = sbr.rel (%p1) target = $region9 }
   0x2   :  {}
   0x3   :  {}
   0x4   :  {}
   0x5   :  {}
   0x6   :  { %v1 = vmatmul.mubr.f32.gmra.mxu0 %v0 }
   0x7   :  { %v1 = vpop.f32.mrf.mxu0 }
   0x8 PF:  { %s2 = smov 0 } /* Start/End empty region 9 */
   0x9   :  { %3 = sbr.rel (%p2) target = $region11 }
   0xa   :  {}
   0xb   :  {}
   0xc   :  {}
   0xd   :  {}
   0xe   :  { %v2 = vadd.f32 %v1, %v1 }
   0xf PF:  { %s3 = smov 0 } /* Start/End empty region 11 */
"""


def test_branches_with_matrix_products_count_as_often_as_they_run():
    kernel = read_schedule(BRANCHES)
    assert kernel.count_branches() == 1  # the other has no product, and counts as if it always ran
    always = 14
    assert kernel.cycles(iter(()), [0.25]) == always + 0.25 * 2


def test_what_a_pipeline_jumps_over_always_counts():
    copy = "dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s2, /*size_in_granules=*/4, /*vmem=*/%s3"
    kernel = read_schedule(BRANCHES.replace("%v1 = vpop.f32.mrf.mxu0", copy))
    assert kernel.count_branches() == 0
    assert kernel.cycles(iter(())) == 16


def test_shares_of_other_branches_than_there_are_count_for_nothing():
    assert read_schedule(BRANCHES).cycles(iter(()), [0.25, 0.5]) == 16
