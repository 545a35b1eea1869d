"""tools/scale.md is what tools/scale.py computes, and that is what a hand computes."""

import pytest
from conftest import ROOT

from tools import scale


def test_the_page_is_the_program_s():
    assert (ROOT / "tools/scale.md").read_text() == scale.report()


def test_the_tables_of_what_to_choose_are_the_program_s(capsys):
    assert scale.main(["--choose"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs/quantization.md").read_text()


def test_what_to_choose_by_hand():
    """8B: 8.03 billion numbers, 1.05 of them in the table and the head; 32 layers, 8 heads of 128."""
    cache = 2 * 2 * 32 * 8 * 128 * 8192
    assert scale.needed("8b", "bfloat16") == pytest.approx((2 * 8.03e9 + cache) / 1e9, rel=1e-3)
    int8 = 8.03e9 * (8 + 16 / 32) / 8  # a scale of 16 bits for each 32
    assert scale.needed("8b", "int8") == pytest.approx((int8 + cache) / 1e9, rel=2e-3)
    matrices, tables = 8.03e9 - 2 * 128256 * 4096, 2 * 128256 * 4096
    int4 = matrices * (4 + 32 / 32) / 8 + tables * (8 + 16 / 32) / 8  # of 4 bits a zero too
    assert scale.needed("8b", "int4") == pytest.approx((int4 + cache) / 1e9, rel=2e-3)
    table = scale.choice()
    for machine, room in scale.MACHINES.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {machine}")]
        for model, kind in zip(("1b", "3b", "8b", "70b"), row.split(" | ")[1:]):
            fits = [bits for bits in scale.BITS if scale.needed(model, bits) <= room]
            assert (fits[0] if fits else "–") == kind.strip(" |"), (machine, model)


def test_sizes_are_the_releases():
    """Parameters of the releases: 8.03, 70.55 and 405.85 billion (Hugging Face, safetensors metadata)."""
    for model, billions in (("8B", 8.03), ("70B", 70.55), ("405B", 405.85)):
        assert sum(scale.sizes(model)[1:]) / 2e9 == pytest.approx(billions, abs=0.006)


def test_a_step_by_hand():
    """70B on 8 H100s: 80 layers, D 8192, 8 key/value heads of 128, V 128256."""
    memory, read, messages, moved, reading, summing = scale.step("70B", "H100", 8, positions=1000)
    weights, embedding, cache = 2 * 70.5537e9, 2 * 128256 * 8192, 2 * 2 * 80 * 128 * 1000
    assert memory == pytest.approx((weights - embedding) / 8 + embedding + cache + 2e9, rel=1e-5)
    assert read == pytest.approx((weights - embedding) / 8 + cache, rel=1e-5)
    assert messages == 2 * 80 + 2
    assert moved == pytest.approx(2 * 7 / 8 * (160 * 2 * 8192 + 4 * 128256 + 8))
    assert reading == pytest.approx(read / (0.69 * 3350e9))
    assert summing == pytest.approx(162 * 35e-6 + moved / 450e9)
    assert scale.step("70B", "H100", 1)[2:4] == (0, 0)
    far = scale.step("70B", "H100", 16)
    assert far[-1] == pytest.approx(162 * 55e-6 + far[3] / 50e9)
