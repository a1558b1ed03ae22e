"""Our models as lm-eval sees them. Imported only when tasks are asked for: lm-eval is an extra."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quantpress.core.errors import BadInput

from .likelihood import Pair, Room


class Answers(Protocol):
    """A model that answers requests, in this process or behind a server."""

    @property
    def room(self) -> Room: ...

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]: ...
    def continue_text(self, prompts: Sequence[list[int]], new_tokens: int, stop: Sequence[str]) -> list[str]: ...


class LmEvalModel(TemplateLM):  # type: ignore[misc]  # the library is not typed
    """Tokenizes lm-eval's requests, with `bos` (if given) before every prompt, and passes them on to `answers`."""

    def __init__(self, answers: Answers, tokenizer: Any, bos: int | None) -> None:
        super().__init__()
        self.tokenizer, self._answers, self._bos = tokenizer, answers, bos
        self._stderr = sys.stderr  # for our own progress, while the library's is suppressed

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        return int(end if end is not None else self._bos or 0)

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._bos is None else self._bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if self._bos is None or add_special_tokens is False else [self._bos, *ids]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        with contextlib.redirect_stderr(self._stderr):
            return self._answers.log_likelihoods([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._answers.room.scored - 1, 1)
            pairs += [make_disjoint_window(window) for window in windows]
            owners += [number] * (len(pairs) - len(owners))
        out = [0.0] * len(requests)
        with contextlib.redirect_stderr(self._stderr):
            values = self._answers.log_likelihoods(pairs)
        for owner, (value, _) in zip(owners, values, strict=True):
            out[owner] += value
        return out

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy generation; requests with the same settings go together."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") or settings.get("temperature", 0):
                raise BadInput(f"task {request.task_name} samples its answers; only greedy decoding can be compared")
            stop = settings.get("until") or []
            stop = (stop,) if isinstance(stop, str) else tuple(stop)
            groups.setdefault((int(settings.get("max_gen_toks", 256)), stop), []).append(number)
        out = [""] * len(requests)
        for (new_tokens, stop), numbers in groups.items():
            prompts = [self.tok_encode(requests[i].args[0]) for i in numbers]
            with contextlib.redirect_stderr(self._stderr):
                texts = self._answers.continue_text(prompts, new_tokens, stop)
            for i, text in zip(numbers, texts, strict=True):
                out[i] = text[: min((text.index(s) for s in stop if s in text), default=len(text))]
        return out
