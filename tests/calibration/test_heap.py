# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays while a pass runs, goes back afterwards, and a forward's tensors are small enough to stay."""

import os
import platform
import resource
import subprocess
import sys
import textwrap

import pytest
from torch import nn

from optimum_ssm.calibration.heap import samples_that_fit


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its memory otherwise")

# Prints the pages that the kernel had to clear in ten rounds of five tensors of 20 MB, and what the process holds at the end.
CODE = """
    import contextlib, resource, torch
    from optimum_ssm.calibration.heap import kept_heap

    def round():
        tensors = [torch.ones(5_000_000) for _ in range(5)]
        while tensors:
            tensors.pop()  # the last one first, so that what is free lies together

    def pages():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def held():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

    torch.set_num_threads(1)
    round()
    before = held()
    with {context}:
        {then}
        round()
        start = pages()
        for _ in range(10):
            round()
        print(pages() - start)
    print(held() - before)
"""


def run(context: str, then: str = "", **environment: str) -> list[int]:
    code = textwrap.dedent(CODE.format(context=context, then=then))
    names = [name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")]
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, check=True, capture_output=True, text=True
    )
    return [int(word) for word in done.stdout.split()]


ALL_PAGES = 10 * 5 * 20_000_000 // resource.getpagesize()


@glibc
def test_freed_memory_stays_for_the_pass_and_then_goes() -> None:
    cleared, held = run("kept_heap()")
    assert cleared < ALL_PAGES // 4  # a few tensors find no room among others once
    assert held < 50  # of the 100 MB of a round


@glibc
def test_an_inner_context_gives_nothing_back() -> None:
    inner = "round(); inner = kept_heap(); inner.__enter__(); inner.__exit__(None, None, None); print(held() - before)"
    assert run("kept_heap()", then=inner)[0] > 50  # of the 100 MB of a round


@glibc
@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_user_set_stays(environment: dict[str, str]) -> None:
    """Here, that nothing is kept: which also shows that the test above can fail."""
    assert run("kept_heap()", **environment)[0] >= ALL_PAGES


def test_a_forward_takes_as_many_samples_as_glibc_can_keep() -> None:
    block = nn.Sequential(nn.Linear(64, 1024, device="meta"), nn.Linear(1024, 64, device="meta"))
    assert samples_that_fit(block, 512, 8) == 8
    assert samples_that_fit(block, 512, 64) == 8  # of 2 MB each; 16 would be 32 MB, which glibc does not keep
    assert samples_that_fit(block, 512, 15) == 15
    assert samples_that_fit(block, 512, 100) == 10  # a divisor
    assert samples_that_fit(block, 51_200, 8) == 1
    assert samples_that_fit(nn.Identity(), 512, 8) == 8
