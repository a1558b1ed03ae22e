"""The files that go with weights and config.json: tokenizer, templates, processor, licence."""

import shutil
from pathlib import Path

from ..core.untrusted import check_files, read_json

COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.tiktoken", "*.spm", "spiece.model", "sentencepiece.*.model", "tekken.json", "chat_template.*",
    "additional_chat_templates/*", "*processor_config.json", "LICENSE*", "NOTICE*", "*.py", "modules.json",
    "*_Pooling/config.json", "sentence_bert_config.json", "spk_dict.pt", "config_sentence_transformers.json",
)  # fmt: skip
LISTS = ("modules.json",)  # of sentence-transformers; all other JSON files hold an object


def check_checkpoint_files(folder: Path) -> None:
    """Raise BadInput for a pipe, a device, or a link that leads out of the folder, among the files of a model."""
    check_files(folder)
    check_files(folder, (file for pattern in COMPANIONS if "/" in pattern for file in sorted(folder.glob(pattern))))


def companions(folder: Path) -> list[Path]:
    """The files that go with weights and config.json, by the patterns in `COMPANIONS`."""
    found = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.suffix not in (".safetensors", ".bin", ".partial"))


def check_companions(folder: Path) -> None:
    """Raise BadInput for one that should be JSON and cannot be read: no server starts with it."""
    for file in companions(folder):
        if file.suffix == ".json" and file.name not in LISTS:
            read_json(file)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the files that go with weights and config.json: tokenizer, templates, processor, licence; returns names."""
    copied = []
    for file in companions(source):
        name = file.relative_to(source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
        copied.append(name.as_posix())
    return copied
