"""Where a recipe takes text from; the text that calibrates."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ..core.schema import Strict

Bos = Literal["auto", "always", "never"]
_EMBEDDED = ("default", "code", "multilingual", "technical", "calibration", "self")  # sources that are no dataset


class Text(Strict):
    """Where text comes from."""

    source: str = Field(
        "default",
        description="`default` (the embedded text), `code`, `multilingual`, `technical`, a .txt or .jsonl file, or a "
        "hub dataset id such as Salesforce/wikitext; for calibration also `self`: text the model itself generates",
    )
    config: str | None = Field(None, description="dataset configuration, such as wikitext-2-raw-v1")
    split: str = Field("train", description="dataset split")
    revision: str | None = Field(None, description="dataset commit, tag or branch")
    column: str = Field("text", description="the field of a JSONL line or dataset row that holds the text")
    bos: Bos = Field(
        "auto",
        description="BOS token before each sequence; auto: as the tokenizer does, and where it adds none, also if the "
        "model plainly predicts one window of the text better after it",
    )

    @model_validator(mode="after")
    def _dataset_keys_need_a_dataset(self) -> Self:
        kind = Path(self.source).suffix.lower()
        if kind not in (".txt", ".jsonl") and self.source not in _EMBEDDED:
            return self
        for key in ("config", "split", "revision") + (() if kind == ".jsonl" else ("column",)):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} {getattr(self, key)!r} has no effect with source {self.source!r}: drop it, or name a "
                    f"{'.jsonl file or ' if key == 'column' else ''}hub dataset"
                )
        return self


class Calibration(Text):
    """The text that transforms and rounders see the activations of."""

    samples: int = Field(128, ge=1, description="sequences")
    seq_len: int = Field(512, ge=8, description="tokens a sequence")
    seed: int = Field(0, ge=0, description="chooses the part of the text that is used, and what `self` generates")
    chat_template: bool = Field(False, description="wrap each text as a user's turn in the model's chat template")
    all_experts: bool = Field(
        False,
        description="round each expert of a mixture for all tokens, not for those that are routed to it; what a block "
        "computes stays routed",
    )

    @model_validator(mode="after")
    def _the_model_itself_takes_no_text(self) -> Self:
        ignored = {"bos: never": self.bos == "never", "chat_template: true": self.chat_template}
        for key, given in ignored.items():
            if given and self.source == "self":
                raise ValueError(
                    f"{key} has no effect with source 'self': the model generates from BOS, without a chat; drop it"
                )
        return self
