"""Layers by kind and block, and the scale of their colours."""

import pytest

from quantpress.artifact.manifest import LayerRecord
from quantpress.eval.report.heatmap import LEVELS, HeatScale, heat


def test_linears_are_grouped_by_kind_and_block() -> None:
    names = ["self_attn.q_proj", "mlp.gate", *(f"mlp.experts.{e}.{k}_proj" for e in range(4) for k in ("gate", "up"))]
    linears = [LayerRecord(name=f"model.layers.{b}.{n}", block=b, bits=4, scheme="int4", relative_error=0.01 * (i + 1))
               for b in (1, 4) for i, n in enumerate(names)]  # fmt: skip
    linears.append(LayerRecord(name="lm_head", block=None, bits=16, scheme="16 bit"))
    strip = heat(linears)
    assert strip.kinds == ("q", "up", "mlp gate", "experts gate")
    assert strip.blocks == (1, 4)
    assert [len(c.layers) for c in strip.cells] == [1, 1, 4, 4, 1, 1, 4, 4]
    assert [layer.name for layer in strip.outside] == ["lm_head"]
    assert strip.worst(1)[0].kind == "up"
    assert strip.worst(1)[0].worst == pytest.approx(0.1)
    assert strip.worst(1)[0].median == pytest.approx(0.07)


def test_linears_named_alike_keep_their_parents() -> None:
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    linears = [LayerRecord(name=f"transformer.h.0.{n}", block=0, bits=4, scheme="int4") for n in names]
    assert set(heat(linears).kinds) == {"c_attn", "attn c_proj", "c_fc", "mlp c_proj"}


def test_the_colour_scale_covers_every_error_in_order() -> None:
    errors = [0.0, 1e-5, 3e-4, 0.02, 0.7]
    linears = [
        LayerRecord(name=f"layers.0.x{i}", block=0, bits=4, scheme="int4", relative_error=e)
        for i, e in enumerate(errors)
    ]
    scale = HeatScale.of([heat(linears)])
    assert scale is not None
    levels = [scale.level(e) for e in errors]
    assert levels == sorted(levels)
    assert (levels[0], levels[1], levels[-1]) == (0, 0, LEVELS - 1)
    assert scale.edges()[0] == pytest.approx(1e-5)
    assert scale.edges()[-1] == pytest.approx(0.7)
    for low, high in zip(scale.edges(), scale.edges()[1:], strict=False):
        assert scale.level(low * 1.001) == scale.level(high * 0.999)
    same = HeatScale.of([heat(linears[3:4])])
    assert same is not None
    assert same.high / same.low == pytest.approx(10)
    assert HeatScale.of([heat([])]) is None
