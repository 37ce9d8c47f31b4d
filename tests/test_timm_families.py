"""Families of timm other than the three that we are for: a sample here, all of them in the slow tests."""

from __future__ import annotations

import pytest
import timm
import torch

import tp_mrs
from benchmarks import timm_coverage
from tp_mrs.files import read_json

SAMPLE = {
    "convnext_zepto_rms": 64,
    "efficientvit_b0": 64,
    "ghostnet_050": 64,
    "mobilenetv3_small_050": 64,
    "regnetx_002": 64,
    "starnet_s050": 64,
    "deit_tiny_patch16_224": 224,
    "pvt_v2_b0": 64,
}


def recorded() -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = read_json(timm_coverage.RESULT, timm_coverage.FORMAT)["families"]
    return rows


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_proven(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    report = tp_mrs.check_coupling(model, torch.rand(1, 3, SAMPLE[name], SAMPLE[name]))
    assert report.proven, str(report)


def test_nine_tenths_of_the_families_work() -> None:
    rows = recorded()
    full = [name for name, row in rows.items() if all(row.get(step) for step in timm_coverage.STEPS)]
    assert len(rows) >= 98
    assert len(full) >= 0.9 * len(rows)
    assert all(row.get("reason") for name, row in rows.items() if name not in full)


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_families_do_what_the_table_says(family: str) -> None:
    row = recorded().get(family)
    if row is None:
        pytest.skip("not in the table; run python -m benchmarks.timm_coverage")
    if "took more than" in str(row.get("reason")):
        pytest.skip(f"{row['member']} {row['reason']}, and memory")
    again = timm_coverage.examine(str(row["member"]))
    assert {step: again.get(step) for step in timm_coverage.STEPS} == {
        step: row.get(step) for step in timm_coverage.STEPS
    }, again.get("reason")
