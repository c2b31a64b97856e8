# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A report as text."""

from __future__ import annotations

from typing import Any

from .report import Pass, PruningReport, table


def markdown(report: PruningReport) -> str:
    """`PruningReport.to_markdown`."""
    lines = [_pass_line(number, done) for number, done in enumerate(report.passes, start=1)]
    if report.passes:
        lines.append("")
    body = [
        (
            name,
            f"{elements:,}",
            f"{pruned:,}",
            _percent(pruned, elements),
            _percent(pruned, report.parameters),
            reason,
        )
        for name, elements, pruned, reason in report.components()
    ]
    total = _percent(report.pruned, report.parameters)
    body.append(("whole model", f"{report.parameters:,}", f"{report.pruned:,}", total, total, "-"))
    head = ("component", "entries", "removed", "of component", "of model", "kept because")
    lines += table(head, body, right=(1, 2, 3, 4))
    lines += ["", *(f"- {fact}" for fact in _facts(report))]
    return "\n".join(lines)


def _pass_line(number: int, done: Pass) -> str:
    """What one pass did, in a line."""
    config = done.config
    line = (
        f"Pass {number}: {config['method']}, {config['pattern']}{_units(done.units)}, sparsity {config['sparsity']:g}, "
        f"{done.tokens:,} calibration tokens, {done.removed:,} entries removed, {done.seconds:.1f} s"
    )
    share = f"{done.earlier_seconds:.1f} s of these"
    if done.earlier_blocks:
        return f"{line}; {done.earlier_blocks} of {done.blocks} blocks were finished by an earlier run, in {share}"
    if done.earlier_seconds >= 0.05:  # only a plan, or rounds of a search
        return f"{line}; an earlier run took {share}"
    return line


def _facts(report: PruningReport) -> list[str]:
    measured = [(number, done.block_errors) for number, done in enumerate(report.passes, start=1)]
    measured = [(number, found) for number, errors in measured if (found := [e for e in errors if e is not None])]
    facts = [
        f"Weights: {report.dense_bytes:,} bytes stored densely, {report.nonzero_bytes:,} bytes without the removed entries.",
    ]
    before = f", before pruning {report.dense_state_bytes:,}" if report.dense_state_bytes is not None else ""
    facts.append(
        f"State per sequence: {report.recurrent_state_bytes:,} bytes recurrent (float32){before}, "
        f"{report.conv_state_bytes:,} bytes convolution."
    )
    if report.sizes:
        facts.append(
            f"Parameters: {report.parameters_after:,} of {report.parameters:,} are left. {_sizes(report)} "
            + (
                "Stock transformers loads it."
                if report.loads_with == "transformers"
                else "Stock transformers does not load it: `import optimum_ssm` first."
            )
        )
    if measured:
        number, errors = measured[-1]
        mean, worst = sum(errors) / len(errors), max(errors)
        facts.append(f"Relative output error of a block in pass {number}: mean {mean:.2e}, worst {worst:.2e}.")
    tuned = [pair for done in report.passes[-1:] for pair in done.reconstruction if pair is not None]
    if tuned:
        before, after = (sum(pair[i] for pair in tuned) / len(tuned) for i in (0, 1))
        seconds = report.passes[-1].reconstruction_seconds
        took = "" if seconds is None else f", in {seconds:.1f} s"
        facts.append(
            f"Reconstruction brought the mean distance from the dense blocks from {before:.2e} to {after:.2e}{took}."
        )
    for stage, found in report.perplexity.items():
        facts.append(f"Perplexity, {stage}: {found['perplexity']:.3f} ({found['protocol']}).")
    return facts


def _sizes(report: PruningReport) -> str:
    ranges = []
    for name in report.sizes[0]:
        values = [sizes[name] for sizes in report.sizes]
        ranges.append(f"{name} {_span(values)}")
    return f"{len(report.sizes)} blocks with {', '.join(ranges)}."


def _units(units: dict[str, Any]) -> str:
    """Which units a structured pass left, such as `, state 128 -> 64 (64 -> 32 in each group)`."""
    if not units:
        return ""
    before, kept = units["before"], units["kept"]
    text = f", {units.get('unit', units['axis'])} {_span(before)} -> {_span(kept)}"
    groups = units.get("groups", [1])
    if max(groups) > 1:
        each = [_span([count // group for count, group in zip(counts, groups)]) for counts in (before, kept)]
        text += f" ({each[0]} -> {each[1]} in each {'head' if units['axis'] == 'head_dim' else 'group'})"
    return text


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"
