"""The scales of one weight, fitted group by group in the order in which a rounder gets to the columns."""

import torch
from torch import Tensor

from ..numbers import ggml_scales as ggml
from ..numbers.fitting import fit, fit_alone, global_scale
from ..numbers.grid import E2M1_MAX, E4M3_MAX, QuantizedLinear, collapse, encode
from ..numbers.types import BlockGrid, Grid


class GroupScales:
    """Scales and zeros for `weight` [out, in], which is about to be rounded, on `grid`; stored in `dtype`.

    columns: columns of a group. span: columns that share a super scale, which `reach` finds before the groups among
    them are fitted; without super scales it is one group and `reach` does nothing.
    """

    def __init__(self, weight: Tensor, grid: Grid, dtype: torch.dtype) -> None:
        out_features, in_features = weight.shape
        self.columns, self.span, self._grid = grid.columns(in_features), grid.span(in_features), grid
        self._dtype, self._overall = dtype, global_scale(weight, grid)
        self._clipped = torch.zeros((), dtype=torch.int64, device=weight.device)
        groups = -(-in_features // self.columns)
        self.scales, self.zeros = weight.new_empty(2, groups, out_features, dtype=torch.float32).unbind(0)
        self._supers = weight.new_empty(2, -(-in_features // self.span), out_features, dtype=torch.float32)

    def reach(self, group: int, columns: Tensor, importance: Tensor | None) -> None:
        """Find the super scales of the super-block that begins at `group`, from all its columns [out, span]."""
        if isinstance(self._grid, BlockGrid) and self._grid.nested:
            at = group * self.columns // self.span
            self._supers[:, at] = ggml.fit_super(columns, self._grid, importance)

    def fit(
        self, group: int, columns: Tensor, importance: Tensor | None, moment: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero [out] of `group`, from its columns [out, columns]; `moment` as in `ggml.fit_group`."""
        overall = self._supers[:, group * self.columns // self.span] if self._grid.nested else self._overall
        if isinstance(self._grid, BlockGrid) and moment is not None:
            found = ggml.fit_group(columns, self._grid, importance, overall, moment)
        else:
            found = fit(columns, self._grid, self._dtype, importance, overall)
            if self._overall is not None:
                self._clipped += outgrown(columns.abs().amax(1), self._overall).sum()
        self.scales[group], self.zeros[group] = found
        return found

    @property
    def clipped(self) -> str | None:
        """A note on nvfp4 groups that outgrew the global scale, None where none did."""
        return clipped_note(int(self._clipped), self.scales.numel())

    def reorder(self, order: Tensor) -> None:
        """Put group `order[g]`, int64 [groups], in the place of group g; super-blocks stay whole."""
        self.scales, self.zeros = self.scales[order], self.zeros[order]
        per_span = self.span // self.columns
        self._supers = self._supers[:, order[::per_span] // per_span]

    def fit_all(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros [groups, out] of all groups of `weight` [out, in] at once, where rows share no scale."""
        assert not self._grid.nested
        found = fit_alone(weight.reshape(-1, self.columns), self._grid, self._dtype, self._overall)
        for mine, all_rows in zip((self.scales, self.zeros), found, strict=True):
            mine.copy_(all_rows.view(weight.shape[0], -1).T)
        return self.scales, self.zeros

    def linear(self, numbers: Tensor) -> QuantizedLinear:
        """The record of `numbers` of the grid [out, in]."""
        codes, grid = encode(numbers, self._grid).contiguous(), self._grid
        if not isinstance(grid, BlockGrid):
            scales = self.scales if self._overall is None else self.scales * self._overall
            stored = collapse(scales.T, grid).to(self._dtype).contiguous()
            zeros = collapse(self.zeros.T, grid).to(torch.uint8).contiguous()
            return QuantizedLinear(codes, stored, zeros, grid, global_scale=self._overall)
        zeros = torch.full_like(self.zeros.T, ggml.zero_of(grid), dtype=torch.uint8).contiguous()
        if not grid.nested:
            shifts = None if grid.symmetric else (self.zeros * self.scales).T.to(torch.float16).contiguous()
            return QuantizedLinear(codes, self.scales.T.to(torch.float16).contiguous(), zeros, grid, offsets=shifts)
        over_groups = self._supers.repeat_interleave(self.span // self.columns, 1)
        wholes = [
            part.T.to(torch.int16).contiguous() for part in ggml.codes_of(self.scales, self.zeros, grid, over_groups)
        ]
        supers = self._supers[: 1 if grid.symmetric else 2].mT.to(torch.float16).contiguous()
        return QuantizedLinear(
            codes, wholes[0], zeros, grid, offsets=None if grid.symmetric else wholes[1], supers=supers
        )


def outgrown(largest: Tensor, overall: Tensor) -> Tensor:
    """Which nvfp4 groups, of weights as large as `largest`, the global scale is too large for, bool like `largest`.

    It is fixed before the first group. GPTQ's feedback can then make a group larger than any weight was; its E4M3 scale
    would have to exceed 448.
    """
    return largest / E2M1_MAX * overall > E4M3_MAX


def clipped_note(count: int, groups: int) -> str | None:
    return f"{count} of {groups} groups outgrew the global scale and are clipped" if count else None
