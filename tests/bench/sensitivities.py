"""Ways to foretell what errors in a group of linears cost, each by what a budget comes to that goes by them.

    python tests/bench/sensitivities.py --calibration FILE.txt --evaluation FILE.txt [FILE.txt …] --bytes N [N …]
        [--menu "int2, int3, int4"] [--model M] [--bos]

gradient: the product's: the Fisher information of the outputs by one backward pass, times the inputs' squares.
conditional: the same with the variance that inputs have given those after them, which is what GPTQ leaves of a column's
error. block: the squared error of the block's output, as a share of it, one group rounded at a time. linearity: HIGGS
(arXiv 2411.17525, section 4): the KL divergence with noise in one group at a time, over the noise's share of the
weights' squares, times what rounding errs, in such shares. CPU s: of measuring alone.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from budgets import MENUS
from runs import SEQ_LEN, Runs, options, say
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantpress.calibrate import budget
from quantpress.calibrate.sensitivity import measure
from quantpress.engine.budgeting import Menu
from quantpress.engine.huggingface_folder import HuggingFaceFolder
from quantpress.engine.job import Job
from quantpress.engine.pipeline import prepare
from quantpress.methods import ROUNDERS
from quantpress.models.skeleton import Skeleton
from quantpress.numbers.grid import Grid
from quantpress.recipe import Rtn
from quantpress.recipe.loading import parse

NOISE = 0.05  # squares of the noise over the weights'
FEW = 2  # samples, where the model runs once for each group

Costs = dict[str, dict[Grid | None, float]]


class Whole:
    """The model in float32 with all its weights, and what it says to `tokens` [samples, seq_len]."""

    def __init__(self, folder: Path, tokens: Tensor) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokens, self.states = tokens, {}
        for k, layer in enumerate(self.model.base_model.layers):
            layer.register_forward_hook(lambda _, args, out, k=k: self.states.update({k: (args, out)}))
        self.original = self.model(tokens).logits.log_softmax(-1)

    def weight(self, name: str) -> Tensor:
        return self.model.get_submodule(name).weight.data

    def changed(self, weights: Mapping[str, Tensor], look: Callable[[], float]) -> float:
        """What `look` returns with these weights in the place of the model's."""
        before = {name: self.weight(name).clone() for name in weights}
        for name, weight in weights.items():
            self.weight(name).copy_(weight)
        found = look()
        for name, weight in before.items():
            self.weight(name).copy_(weight)
        return found

    def divergence(self) -> float:
        """KL from the original, nats a token."""
        now = self.model(self.tokens).logits.log_softmax(-1)
        return float((self.original.exp() * (self.original - now)).sum(-1).mean())


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    return ROUNDERS["rtn"](weight, grid, Rtn(), None, None).linear.dequantize()


def by_linearity(whole: Whole, menu: Menu) -> Costs:
    costs: Costs = {}
    generator = torch.Generator().manual_seed(0)
    for name, group in menu.members.items():
        weights = {x.name: whole.weight(x.name) for x in group}
        noisy = {
            n: w + NOISE**0.5 * w.square().mean().sqrt() * torch.randn(w.shape, generator=generator)
            for n, w in weights.items()
        }
        slope = whole.changed(noisy, whole.divergence) / NOISE
        power = sum(float(w.square().sum()) for w in weights.values())
        costs[name] = {
            grid: 0.0
            if grid is None
            else slope * sum(float((rounded(w, grid) - w).square().sum()) for w in weights.values()) / power
            for grid in menu.sizes[name]
        }
    return costs


def by_block(whole: Whole, menu: Menu) -> Costs:
    costs: Costs = {}
    entered = {k: args[0] for k, (args, _) in whole.states.items()}
    layers: Sequence[nn.Module] = list(whole.model.base_model.layers)
    positions = torch.arange(whole.tokens.shape[1])[None]
    places = whole.model.base_model.rotary_emb(entered[0], positions)
    for name, group in menu.members.items():
        k = group[0].block
        states = entered[k]

        def out(k: int = k, states: Tensor = states) -> Tensor:
            found = layers[k](states, position_embeddings=places, attention_mask=None)
            return found if isinstance(found, Tensor) else found[0]

        before = out()

        def error(before: Tensor = before, out: Callable[[], Tensor] = out) -> float:
            return float((out() - before).square().sum() / before.square().sum())

        costs[name] = {
            grid: 0.0
            if grid is None
            else whole.changed({x.name: rounded(whole.weight(x.name), grid) for x in group}, error)
            for grid in menu.sizes[name]
        }
    return costs


@torch.no_grad()
def conditional(job: Job, menu: Menu, tokens: Tensor) -> dict[str, Tensor]:
    """The variance [in] of each linear's inputs given those after it."""
    model = AutoModelForCausalLM.from_pretrained(job.source.path, dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(_: Any, args: Any, out: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x

        return note

    for group in menu.members.values():
        for x in group:
            model.get_submodule(x.name).register_forward_hook(hook(x.name))
    for row in tokens:
        model(row[None])
    found = {}
    for name, h in sums.items():
        damped = h / tokens.numel()
        damped += 0.01 * damped.diagonal().mean() * torch.eye(len(h))
        u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        found[name] = u.diagonal() ** -2
    return found


def choice(way: str, job: Job, menu: Menu, tokens: Tensor) -> Mapping[str, Grid | None]:
    if way in ("gradient", "conditional"):
        with tempfile.TemporaryDirectory() as folder:
            exact = Skeleton(job.reader, device=job.skeleton.device, dtype=torch.float32)
            uses = measure(exact, tokens, Path(folder))
            if way == "conditional":
                found = conditional(job, menu, tokens)
                uses = {n: [replace(u, columns=found.get(n, u.columns)) for u in us] for n, us in uses.items()}
            return menu.choose(uses, job.skeleton.reader.read)
    with torch.no_grad():
        costs = {"block": by_block, "linearity": by_linearity}[way](Whole(job.source.path, tokens[:FEW]), menu)
    return budget.assign(costs, menu.sizes, menu.room)


def as_recipe(menu: Menu, chosen: Mapping[str, Grid | None]) -> dict[str, Any]:
    """The keys of a recipe that rounds each group so."""
    grids = [grid for grid in chosen.values() if grid is not None]
    rows = [(x.name, chosen[name]) for name, group in menu.members.items() for x in group]
    return {
        "weights": grids[0].model_dump(exclude_unset=True),
        "ignore": [name for name, grid in rows if grid is None],
        "overrides": [{"match": n} | g.model_dump(exclude_unset=True) for n, g in rows if g not in (None, grids[0])],
    }


def first_tokens(args: Any, folder: Path, file: str) -> Tensor:
    """[samples, seq_len] of the calibration text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = [tokenizer.bos_token_id] if args.bos else []
    ids = tokenizer(Path(file).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    body = SEQ_LEN - len(start)
    return torch.tensor([start + ids[i * body : (i + 1) * body] for i in range(args.samples)])


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--menu", choices=MENUS, default="int2, int3, int4")
    parser.add_argument("--bytes", type=int, nargs="+", required=True)
    args = parser.parse_args()
    runs = Runs(args)
    tokens = first_tokens(args, runs.source.path, runs.base["calibration"]["source"])
    names = " | ".join(f"{text.name}: perplexity | KL" for text in args.evaluation)
    say(f"| way | MB | {names} | CPU s |\n|---|--:|{'--:|--:|' * len(args.evaluation)}--:|")
    for size in args.bytes:
        keys = {"head": None, "budget": {"bytes": size, "menu": list(MENUS[args.menu])}}
        for way in ("gradient", "conditional", "block", "linearity"):
            job = prepare(parse(runs.base | keys), runs.source)
            assert isinstance(job.backend, HuggingFaceFolder)
            assert job.backend.menu is not None
            started = time.process_time()
            chosen = choice(way, job, job.backend.menu, tokens)
            spent = time.process_time() - started
            found = runs.figures({"head": None} | as_recipe(job.backend.menu, chosen))
            cells = " | ".join(f"{p:.2f} | {kl:.4f}" for p, kl in zip(found.perplexity, found.kl, strict=True))
            say(f"| {way} | {found.bytes / 1e6:.2f} | {cells} | {spent:.0f} |")


if __name__ == "__main__":
    main()
