"""An evaluation's figures against an independent script with transformers alone."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantpress.calibrate.texts import load_documents
from quantpress.engine.sources import default_cache, resolve
from quantpress.eval.measure.evaluate import Watch, evaluate, prepare
from quantpress.recipe import Evaluation, Gates

WINDOWS, WINDOW = 2, 256

pytestmark = pytest.mark.slow


def test_perplexity_and_divergence_equal_an_independent_script(tmp_path: Path) -> None:
    cache = default_cache()
    source = resolve("smollm2-135m", cache=cache).path
    tokenizer = AutoTokenizer.from_pretrained(source)
    models = [AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2)]
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in models[1].named_parameters():
            if "proj" in name:
                weight += 0.1 * weight.std() * torch.randn_like(weight)
    for model, folder in zip(models, ("original", "artifact"), strict=True):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    wanted = Evaluation.model_validate(
        {"windows": WINDOWS, "window": WINDOW, "bos": "always", "prompts": [], "domains": []}
    )
    prepared = prepare(tmp_path / "original", wanted, cache)
    found = evaluate(tmp_path / "original", tmp_path / "artifact", prepared, Gates(), Watch())

    text = "\n\n".join(load_documents(wanted, cache=cache, role="evaluation").documents)[:20_000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    body = WINDOW - 1
    nll, kl = [[], []], []
    for k in range(WINDOWS):
        row = torch.tensor([tokenizer.bos_token_id, *ids[k * body : (k + 1) * body]])
        with torch.no_grad():
            logs = [torch.log_softmax(model(row[None]).logits[0, :-1].double(), -1) for model in models]
        for which, log in enumerate(logs):
            nll[which].append(-log.gather(1, row[1:, None])[:, 0])
        kl.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    before, after = (math.exp(torch.cat(one).mean()) for one in nll)
    assert found.original is not None
    assert found.artifact is not None
    assert found.divergence is not None
    assert found.original.perplexity == pytest.approx(before, rel=1e-4)
    assert found.artifact.perplexity == pytest.approx(after, rel=1e-4)
    assert found.perplexity_increase == pytest.approx(after / before - 1, rel=1e-3)
    assert found.divergence.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
