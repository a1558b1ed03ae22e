"""What config.json says, against the tensors, the files beside it, the manifest and what transformers knows."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

from quantpress.artifact.artifact import Artifact
from quantpress.artifact.manifest import Manifest, own_manifest
from quantpress.core.errors import BadInput
from quantpress.core.untrusted import read_json
from quantpress.formats import FORMATS
from quantpress.formats.base import AS_WEIGHTS, beside_weights
from quantpress.formats.statement import stated_quantization
from quantpress.numbers.types import Activations

_TWIN_KEYS = ("bits", "group_size", "sym", "desc_act", "lm_head", "checkpoint_format", "quant_algo")
_OWN_CODE = "own code (auto_map) is not run"  # of the note in a manifest whose original has such code
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def contradictions(artifact: Artifact, scattered: bool) -> Iterator[str]:
    """A line for each thing the quantization_config says that the tensors or itself contradict.

    scattered: whether groups of any linear are scattered columns.
    """
    folder, stated = artifact.checkpoint.folder, artifact.config["quantization_config"]
    manifest = own_manifest(folder)
    if "quantization_config" not in read_json(folder / "config.json"):  # a file beside it states it, as old tools write
        if manifest is not None:
            yield "config.json has no quantization_config: loaders that read no other file would take codes for weights"
        return
    if stated["quant_method"] == "compressed-tensors":
        yield from _of_compressed_tensors(stated)
    if stated["quant_method"] == "gptq" and scattered and stated.get("desc_act") is False:
        yield "config.json says desc_act: false, and g_idx scatters the groups: readers would take columns in order"
    yield from _twins(artifact, manifest)
    if manifest is not None:
        yield from _unlike_manifest(artifact, manifest)


def _of_compressed_tensors(stated: Mapping[str, Any]) -> Iterator[str]:
    status = stated.get("quantization_status")
    if status not in (None, "compressed"):
        yield (
            f"config.json: quantization_status {status!r}: loaders would not take the weights as quantized; "
            "'compressed' is what such files are"
        )
    groups = [group for group in (stated.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    formats = {group["format"] for group in groups if group.get("format")}
    top = stated.get("format")
    if (formats and top not in formats | {"mixed-precision"}) or (top == "mixed-precision" and len(formats) == 1):
        yield f"config.json: format {top!r}, and its config_groups are {', '.join(sorted(map(repr, formats)))}"
    for group in groups:
        if (group.get("format") or top) == "int-quantized" and not group.get("input_activations"):
            yield "config.json: int-quantized weights without input_activations: what the inputs are rounded to is lost"


def _twins(artifact: Artifact, manifest: Manifest | None) -> Iterator[str]:
    """The format's other config files say the same as config.json: all of it where this package wrote them."""
    folder, stated = artifact.checkpoint.folder, artifact.config["quantization_config"]
    assert artifact.format is not None
    wanted = FORMATS[artifact.format].extra_files(stated)
    for name, content in wanted.items():
        if not (folder / name).is_file():
            if manifest is not None:
                yield f"{folder}: {name} is missing"
            continue
        try:
            found = read_json(folder / name)
        except BadInput:
            continue  # told of with all JSON files
        if manifest is not None:
            unlike = [] if found == content else [name]
        else:
            ours, theirs = (stated_quantization({"quantization_config": c.get("quantization", c)}, lambda _: None)
                            for c in (content, found))  # fmt: skip
            both = [(ours or {}, theirs or {})]
            unlike = [k for a, b in both for k in _TWIN_KEYS if a.get(k) is not None and b.get(k) not in (None, a[k])]
        if unlike:
            yield f"{folder}: {name} and config.json disagree about the quantization"


def _unlike_manifest(artifact: Artifact, manifest: Manifest) -> Iterator[str]:
    """The config's numbers are those that the manifest's recipe and records of layers name."""
    recorded = {layer.name: layer.scheme for layer in manifest.layers if layer.tensor is None} | manifest.outside
    noted = {layer.name for layer in manifest.layers if layer.dynamic}
    if recorded:
        held = {name: str(grid) for name, grid in artifact.linears.items()}
        unlike = [n for n in (*recorded, *held) if held.get(n, "16 bit") != recorded.get(n, "16 bit")]
        if unlike:
            name = unlike[0]
            more = f" (and {len(set(unlike)) - 1} more)" if set(unlike[1:]) - {name} else ""
            yield (
                f"{name} is {held.get(name, '16 bit')} by config.json, and {recorded.get(name, '16 bit')} by the "
                f"manifest{more}"
            )
        every = artifact.activations is not None and artifact.activations.dynamic
        if unlike := sorted((set(artifact.linears) if every and noted else artifact.dynamic) ^ noted):
            by = "the manifest" if unlike[0] in noted else "config.json"
            yield f"{unlike[0]}: the scales of its inputs are dynamic by {by} alone"
    recipe = manifest.recipe
    if "activations" in recipe:
        spec = artifact.activations
        asked = recipe["activations"]
        wanted = None if asked is None else Activations.model_validate(asked)
        own = [(spec and spec.beside(grid), grid) for grid in artifact.linears.values()]
        unfit = bool(noted) and wanted is not None and spec == wanted.at_run_time  # no static range fits any linear
        if spec != wanted and not unfit and not (wanted == AS_WEIGHTS and beside_weights(own)):
            words = "16 bit" if spec is None else str(spec)
            yield f"config.json rounds inputs to {words}, and the manifest's recipe says {json.dumps(asked)}"
    if "kv_cache" in recipe and recipe["kv_cache"] != artifact.kv_cache:
        yield (
            f"config.json: key-value cache {artifact.kv_cache or 'in 16 bit'}, and the manifest's recipe says "
            f"{recipe['kv_cache'] or '16 bit'}"
        )


def model_statement(folder: Path, vocabulary: int | None, corrected: Mapping[str, Any] | None) -> Iterator[str]:
    """What config.json and generation_config.json say of the model itself.

    vocabulary: rows of the embedding, None where it is not known; corrected: the config as the checkpoint's reader
    corrects it, None where nothing does.
    """
    config = read_json(folder / "config.json")
    yield from _architectures(config)
    yield from _own_code(folder, config)
    if corrected is not None and config.get("tie_word_embeddings") is True and not corrected["tie_word_embeddings"]:
        yield "config.json ties the head to the embedding, and another head is on disk, which loaders would leave out"
    yield from _ids(folder, config, vocabulary)


def check_original(folder: Path, vocabulary: int) -> None:
    """Raise BadInput for what config.json and generation_config.json of a model get wrong: its artifact would, too."""
    config = read_json(folder / "config.json")
    for line in (*_architectures(config), *_ids(folder, config, vocabulary)):
        raise BadInput(f"{line}; correct it in {folder}, loaders would trip over it")


def _ids(folder: Path, config: Mapping[str, Any], vocabulary: int | None) -> Iterator[str]:
    """The tokens that the two files name have a row in the embedding."""
    generation = folder / "generation_config.json"
    beside = read_json(generation) if generation.is_file() else {}
    for file, values in (("config.json", config), ("generation_config.json", beside)):
        for key in _IDS if vocabulary is not None else ():
            ids = values.get(key)
            for token in ids if isinstance(ids, list) else [ids]:
                wrong = isinstance(token, int) and not 0 <= token < vocabulary  # type: ignore[operator]
                if wrong and not (token == -1 and key == "pad_token_id"):
                    yield f"{file}: {key} {token}, and the embedding has {vocabulary} rows"


def _architectures(config: Mapping[str, Any]) -> Iterator[str]:
    """The classes that config.json names are transformers' for its model_type."""
    named, kind = config.get("architectures"), config.get("model_type")
    tables = [value for key, value in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES")]
    known: set[str] = set()
    for table in tables:
        classes = table.get(kind, ())
        known |= {classes} if isinstance(classes, str) else set(classes)
    for name in named if isinstance(named, list) and known else ():
        if name not in known and "auto_map" not in config:
            yield f"config.json: architectures names {name!r}, and no class of that name is for model_type {kind!r}"


def _own_code(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Code that config.json names (auto_map) came with the original, and lies in the folder or is known not to."""
    manifest = own_manifest(folder)
    if manifest is not None and any(_OWN_CODE in note for note in manifest.fallbacks):
        return
    classes = config.get("auto_map") or {}
    named = [name for value in classes.values() for name in (value if isinstance(value, list) else [value]) if name]
    for name in map(str, named):
        file = f"{name.partition('.')[0]}.py"
        if "--" in name:
            yield f"config.json: auto_map names code of another repository ({name}), which a loader may run"
        elif not (folder / file).is_file():
            yield f"config.json: auto_map names code ({name}) in {file}, which is not there"
        elif manifest is not None and file not in manifest.model.files:
            yield f"config.json: auto_map names code ({name}), which the original does not have"
