# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Shares by name: what is named loses its share, the others the rest of an exact budget, contradictions are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.sparsity.allocations.base import Item
from optimum_ssm.sparsity.allocations.by_name import ByName
from optimum_ssm.sparsity.selection import round_half_up

from .evidence import item


SEGMENTS = ("z", "x", "B", "C", "dt")


def counts(shares, items, sparsity):
    return ByName(shares=shares).counts(items, [None] * len(items), sparsity)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.none() | st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 0.999)
)
def test_named_parts_lose_their_share_and_the_others_equal_shares_of_an_exact_rest(drawn, sparsity):
    items = [item(f"w{i}", size=size) for i, (size, _) in enumerate(drawn)]
    shares = {f"w{i}": share for i, (_, share) in enumerate(drawn) if share is not None}
    total = round_half_up(sparsity * sum(size for size, _ in drawn))
    named = sum(round_half_up(share * size) for size, share in drawn if share is not None)
    free = sum(size for size, share in drawn if share is None)
    if not named <= total <= named + free:
        with pytest.raises(ConfigurationError, match="do not fit sparsity="):
            counts(shares, items, sparsity)
        return
    found = counts(shares, items, sparsity)
    assert sum(found) == total
    for count, (size, share) in zip(found, drawn):
        assert (
            count == round_half_up(share * size)
            if share is not None
            else abs(count - (total - named) * size / free) <= 1
        )


def test_the_name_of_a_weight_stands_for_its_segments_but_for_those_that_are_named():
    items = [item("in_proj.z", size=100), item("in_proj.x", size=100), item("out_proj", size=200)]
    assert counts({"in_proj": 0.2, "in_proj.x": 0.8}, items, 0.5) == [20, 80, 100]


def segments(blocks=2):
    """z, x and B of in_proj and the whole out_proj, 100 entries each, as a plan gives them."""
    stems = [f"layers.{block}.mixer" for block in range(blocks)]
    return [
        Item(f"in_proj.{name}", block, 100, "linear", (f"{stem}.in_proj.{name}",), (f"{stem}.in_proj",))
        for block, stem in enumerate(stems)
        for name in "zxB"
    ] + [Item("out_proj", block, 100, "linear", (f"{stem}.out_proj",)) for block, stem in enumerate(stems)]


@pytest.mark.parametrize(
    "shares, found",
    [
        ({"in_proj.*": 0.6, "in_proj.B": 0.1}, [60, 60, 10] * 2 + [70] * 2),
        ({"in_proj.B": 0.1, "in_proj.*": 0.6}, [60, 60, 10] * 2 + [70] * 2),  # the order says nothing
        ({"in_proj": 0.6, "*.B": 0.1}, [60, 60, 10] * 2 + [70] * 2),
        ({"in_*": 0.4, "*.[zx]": 0.5}, [50, 50, 40] * 2 + [60] * 2),
        ({"in_proj": 0.4, "*": 0.6}, [40] * 6 + [60] * 2),  # a pattern that fits the weight names the weight
        ({"in_proj": 0.4, "layers.0.mixer.in_proj": 0.5}, [50] * 3 + [40] * 3 + [65, 65]),
        ({"in_proj.z": 0.4, "layers.0.mixer.in_proj": 0.5}, [40, 50, 50, 40] + [54, 54, 54, 54]),
        ({"re:.*0.*": 0.7}, [70, 70, 70] + [30] * 3 + [70, 30]),
        ({"in_*": 0.4, "re:in_.*": 0.4}, [40] * 6 + [80] * 2),
    ],
)
def test_the_nearest_entry_decides(shares, found):
    assert counts(shares, segments(), sum(found) / 800) == found


@pytest.mark.parametrize(
    "shares, message",
    [
        (
            {"in_proj.*": 0.6, "*.B": 0.1},
            "'in_proj.*': 0.6 and '*.B': 0.1 all match layers.0.mixer.in_proj.B; give it an",
        ),
        ({"in_*": 0.6, "*": 0.1}, "'in_*': 0.6 and '*': 0.1 all match layers.0.mixer.in_proj.z"),
        ({"in_proj": 0.6, "in_proj.*": 0.1}, "'in_proj' decides nothing, all that it matches has a nearer entry"),
        ({"x_proj.*": 0.6}, "unknown target in allocation_kwargs shares 'x_proj.*'"),
        ({"out_proj.*": 0.6}, 'out_proj is one target of this pass; if it has segments, targets=["out_proj.*"]'),
        ({"re:(": 0.6}, "'re:(' is not a regular expression"),
    ],
)
def test_patterns_that_say_two_things_or_nothing_are_refused(shares, message):
    with pytest.raises(ConfigurationError) as caught:
        counts(shares, segments(), 0.5)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["in_proj.z", "in_proj.*", "backbone.layers.0.mixer.in_proj.z"])
def test_a_segment_of_a_weight_that_is_one_target_needs_other_targets(tiny_mamba2, name):
    config = SSMPrunerConfig(method="magnitude", sparsity=0.5, allocation="by_name",
                             allocation_kwargs={"shares": {name: 0.5}})  # fmt: skip
    with pytest.raises(ConfigurationError) as caught:
        SSMPruner(tiny_mamba2).prune(config)
    assert 'targets=["in_proj.*"]' in str(caught.value) and "Did you mean" not in str(caught.value)


def test_one_block_by_its_qualified_name(tiny_mamba2):
    shares = {"backbone.layers.1.*": 0.75}
    config = SSMPrunerConfig(method="magnitude", sparsity=0.5, targets=["in_proj.*"], allocation="by_name",
                             allocation_kwargs={"shares": shares})  # fmt: skip
    report = SSMPruner(tiny_mamba2).prune(config)
    lost = [row.pruned / row.elements for row in report.rows if row.component == "in_proj"]
    assert lost == pytest.approx([0.25, 0.75], abs=1e-3)


def test_shares_that_are_left_out_are_said(tiny_mamba2, caplog):
    config = SSMPrunerConfig(method="magnitude", sparsity=0.5, targets=["in_proj"], allocation="by_name")
    SSMPruner(tiny_mamba2).prune(config)
    said = (
        "without allocation_kwargs shares gives all weights the same share; name some, such as shares={'in_proj': 0.5}"
    )
    assert said in caplog.text


def test_a_log_has_no_part_in_the_budget_of_the_others():
    items = [item("A_log", size=50, kind="a_log"), item("in_proj", size=100), item("out_proj", size=100)]
    assert counts({"in_proj": 0.8}, items, 0.5) == [25, 80, 20]
    assert counts({"A_log": 0.2}, items, 0.5) == [10, 50, 50]


@pytest.mark.parametrize("size", [7, 100, 4099])
@pytest.mark.parametrize("share", [0.3, 1 / 3, 0.123456789])
def test_a_sparsity_that_cannot_be_met_is_answered_with_one_that_can(size, share):
    items = [item("in_proj", block, size) for block in range(3)]
    with pytest.raises(ConfigurationError, match="all targets together lose ") as caught:
        counts({"in_proj": share}, items, 0.9)
    found = counts({"in_proj": share}, items, float(str(caught.value).rpartition(" ")[2]))
    assert found == [round_half_up(share * size)] * 3
    with pytest.raises(ConfigurationError, match=r"can lose 0\.4 to 0\.9$"):
        counts({"a": 0.8}, [item("a", size=100), item("b", size=100)], 0.95)


@pytest.mark.parametrize(
    "shares, message",
    [
        ({"in_prog": 0.5}, "unknown target in allocation_kwargs shares 'in_prog'. Did you mean 'in_proj'"),
        ({"in_proj": 1.5}, "'in_proj': 1.5 is no name with a share"),
        ({"in_proj": "half"}, "'in_proj': 'half' is no name with a share"),
        ({"in_proj": True}, "'in_proj': True is no name with a share"),
    ],
)
def test_what_is_no_share_of_a_target_is_refused(shares, message):
    with pytest.raises(ConfigurationError, match=message):
        counts(shares, [item("in_proj")], 0.5)


@pytest.mark.parametrize("model_type, segments", [("mamba", SEGMENTS[1::-1]), ("mamba2", SEGMENTS)])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_every_segment_of_in_proj_loses_its_own_share_in_one_pass(
    make_tiny_model, token_ids, model_type, segments, method
):
    """As in a recipe of one pass per segment on the same activations: rows of one matrix are scopes of their own."""
    shares = dict(zip(segments, (0.75, 0.25, 0.5, 0.125, 0.0)))
    data = {"method": method, "dataset": token_ids(), "seq_len": 24, "sequential": False}
    together, apart = SSMPruner(make_tiny_model(model_type)), SSMPruner(make_tiny_model(model_type))
    names = [f"in_proj.{name}" for name in segments]
    together.prune(
        SSMPrunerConfig(
            targets=[*names, "out_proj"],
            sparsity=0.5,
            allocation="by_name",
            allocation_kwargs={"shares": {f"in_proj.{name}": share for name, share in shares.items()}},
            **data,
        )
    )
    rows = [row for row in together.report.rows if row.component == "in_proj"]
    for row in rows:
        assert {name: gone / size for name, (size, gone) in row.segments.items()} == shares
    targeted = [row for row in together.report.rows if row.component in ("in_proj", "out_proj")]
    assert sum(row.pruned for row in targeted) == sum(row.elements for row in targeted) // 2
    only = "re:.*layers.0.mixer.in_proj."  # one block: the next one would see other inputs after every pass
    for name, share in shares.items():
        apart.prune(SSMPrunerConfig(targets=[f"{only}{name}"], sparsity=share, **data))
    for name in ("masks", "weights"):
        one, two = (
            p.masks["backbone.layers.0.mixer.in_proj.weight"] if name == "masks"
            else p.model.base_model.layers[0].mixer.in_proj.weight
            for p in (together, apart)
        )  # fmt: skip
        assert torch.equal(one, two), name


def test_shares_that_do_not_fit_are_refused_before_anything_runs(tiny_mamba2, monkeypatch):
    monkeypatch.setattr(tiny_mamba2, "forward", lambda *_, **__: pytest.fail("the model was run"))
    config = SSMPrunerConfig(
        method="wanda",
        sparsity=0.5,
        targets=["in_proj.*"],
        allocation="by_name",
        allocation_kwargs={"shares": {"in_proj": 0.25}},
    )
    with pytest.raises(ConfigurationError, match=r"all targets together lose 0\.25$"):
        SSMPruner(tiny_mamba2).prune(config)
