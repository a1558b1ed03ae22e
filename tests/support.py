"""What is proved of each model family, a row each: `make support-table` prints it.

`make support-table ARGS=NAME…` proves these families first, `ARGS=--all` every one. A family is right if our forward
pass, block by block, equals transformers' whole model, if `from_pretrained` of the artifact reports nothing missing or
unexpected, and if its logits are those we compute from it, weights rounded to bfloat16 in both. Rounding to nearest and
GPTQ, whose calibration takes another way, are proved apart.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantpress.artifact.artifact import open_artifact
from quantpress.core.errors import BadInput
from quantpress.engine.job import prepare
from quantpress.engine.pipeline import quantize
from quantpress.engine.settings import Settings
from quantpress.engine.sources import resolve
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton, run_block
from quantpress.recipe import Recipe

from . import families, tiny

TABLE = Path(__file__).with_name("support.json")
CPU = torch.device("cpu")
INT4 = {"bits": 4, "group_size": 32, "symmetric": True}
_IDS = torch.randint(2, tiny.VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
_AS_GPTQ = "write it with --set formats=[gptq]"
_TOLERANCE = 1e-4  # of the largest logit

Row = dict[str, str]


def prove(family: str, work: Path) -> Row:
    """The family's row; each cell is "yes", or why not in the words of the refusal.

    Raises AssertionError where something is wrong without having been refused.
    """
    model = work / "model"
    families.build(family, model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    try:
        _same(_ours(Skeleton(Checkpoint(model), device=CPU, dtype=torch.float32)), _logits(whole))
        row = {method: _made(model, work / method, method) for method in ("rtn", "gptq")}
        row["transforms"] = _takes_transforms(model)
        row["loaded by transformers"] = "yes" if row["rtn"] == "yes" else row["rtn"]
    except BadInput as error:
        why = str(error).replace(str(model), "the model")
        return dict.fromkeys(("rtn", "gptq", "transforms", "loaded by transformers"), why)
    return row


def _recipe(method: str, **more: Any) -> Recipe:
    calibration = {"source": "default", "samples": 4, "seq_len": 32} if method != "rtn" else {}
    document = {"name": "support", "weights": INT4, "method": {"name": method}, "calibration": calibration, **more}
    return Recipe.model_validate({key: value for key, value in document.items() if value})


def _made(model: Path, out: Path, method: str) -> str:
    """Quantize, load with transformers, compare. "servers only" where a server loads what transformers does not.

    What a refusal advises is followed.
    """
    source, loads = resolve(str(model), cache=out), "yes"
    try:
        job = prepare(_recipe(method), source, CPU)
    except BadInput as error:
        if "transformers could not load" not in str(error) and _AS_GPTQ not in str(error):
            raise
        formats = {"formats": ["gptq"]} if _AS_GPTQ in str(error) else {}
        job, loads = prepare(_recipe(method, targets=["vllm"], **formats), source, CPU), "servers only"
    quantize(job, Settings(out, out, ignore_limits=True))
    _, skeleton = open_artifact(out / "quantized", CPU, dtype=torch.float32)
    ours = _ours(skeleton)
    assert torch.isfinite(ours).all()
    if loads == "yes":
        _same(ours, _loaded(out / "quantized"))
    return loads


def _takes_transforms(model: Path) -> str:
    try:
        prepare(_recipe("rtn", transforms=[{"name": "awq"}], targets=["vllm"]), resolve(str(model), cache=model), CPU)
    except BadInput:
        return "no"
    return "yes"


@torch.no_grad()
def _ours(skeleton: Skeleton) -> Tensor:
    skeleton.open_shell()
    hidden, arguments = skeleton.embed(_IDS), skeleton.block_arguments(_IDS)
    for k, block in skeleton.blocks():
        _round(block)
        run_block(block, hidden, arguments[k], device=CPU, batch=2)
    return torch.stack([skeleton.logits(row) for row in hidden])


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=_IDS, use_cache=False).logits
    return logits.float()


def _loaded(folder: Path) -> Tensor:
    """The logits of the artifact as transformers loads it."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        model.eval()(_IDS, use_cache=False)  # which unpacks the weights, into float32
        _round(model)
    return _logits(model)


def _round(module: torch.nn.Module) -> None:
    """Leave nothing in the weights that bfloat16, the type of the original, does not hold."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().float()


def _same(one: Tensor, other: Tensor) -> None:
    difference = float((one - other).abs().max() / other.abs().max())
    assert difference <= _TOLERANCE, f"the logits differ by {difference:.1e} of the largest"


def markdown(rows: dict[str, Row]) -> str:
    """The table of README: families that are alike in a row."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for family, row in sorted(rows.items()):
        short = tuple(cell if cell in ("yes", "no", "servers only") else "refused" for cell in row.values())
        alike.setdefault(short, []).append(family)
    columns = next(iter(rows.values())).keys()
    lines = ["| families | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for cells, names in sorted(alike.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {', '.join(names)} ({len(names)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    rows: dict[str, Row] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for family in families.FAMILIES if names == ["--all"] else names:
        with tempfile.TemporaryDirectory() as work:
            try:
                rows[family] = prove(family, Path(work))
            except AssertionError as error:
                rows.pop(family, None)
                sys.stderr.write(f"{family} has no row: {error}\n")
        TABLE.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    sys.stdout.write(markdown(rows) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
