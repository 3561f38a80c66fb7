"""Export to and import from Hugging Face's folders, without the transformers library.

A folder is config.json, the weights as safetensors (cut into files of 5 GB, with an index, where there are more) and
the tokenizer. `huggingface_config` says which models have an equal there, `huggingface_names` which tensor is which.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megagpt.checkpoint.huggingface_config import read_config, write_config
from megagpt.checkpoint.huggingface_names import Entry, entries, is_ballast
from megagpt.config import Model
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import UserError
from megagpt.files import sync_folder
from megagpt.model import build

FILE_BYTES = 5_000_000_000
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def export(
    weights: Mapping[str, Tensor], model: Model, tokenizer_json: Path, folder: Path, *, file_bytes: int = FILE_BYTES
) -> None:
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load. It appears whole or not at all.

    `weights` maps global names to tensors, which keep their dtype and are asked for one after the other; rows that pad
    the vocabulary are left out. `file_bytes` is the most that one file of weights holds. Raises UserError if the model
    has no equal there, or the folder exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already.", "Choose another folder, or delete it first.")
    tokenizer = load_tokenizer(tokenizer_json)
    dtype = str(weights["embedding.token.weight"].dtype).removeprefix("torch.")
    settings = write_config(model, end_of_text=tokenizer.end_of_text, dtype=dtype)
    end_of_text = tokenizer.model.id_to_token(tokenizer.end_of_text)
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.context,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        _write_json(temporary / "config.json", settings)
        _write_json(temporary / "tokenizer_config.json", tokenizer_settings)
        (temporary / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
        _write_weights(_their_tensors(weights, model, settings["model_type"]), temporary, file_bytes)
        _sync_files(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _their_tensors(weights: Mapping[str, Tensor], model: Model, kind: str) -> Iterator[tuple[str, Tensor]]:
    for entry in entries(kind, model):
        for name, tensor in zip(entry.theirs, entry.cut(_our_tensor(weights, entry.ours, model)), strict=True):
            yield name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _our_tensor(weights: Mapping[str, Tensor], name: str, model: Model) -> Tensor:
    """The parameter without rows of padding; zeros for a bias that the model lacks but the layout has."""
    if name.endswith(".bias") and name not in weights:
        matrix = weights[f"{name.removesuffix('.bias')}.weight"]
        return matrix.new_zeros(len(matrix))
    tensor = weights[name]
    return tensor[: model.vocabulary] if name in ("embedding.token.weight", "head.output.weight") else tensor


def _write_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path, file_bytes: int) -> None:
    """One file, or as many as needed with an index. Only one file's tensors are in memory at a time."""
    files: list[list[str]] = []
    total = 0
    for part in _parts(tensors, file_bytes):
        save_file(part, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(part))
        total += sum(tensor.nbytes for tensor in part.values())
    if len(files) == 1:
        (folder / "part-0").rename(folder / _WEIGHTS)
        return
    places = {}
    for index, names in enumerate(files):
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{index}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _parts(tensors: Iterator[tuple[str, Tensor]], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > file_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)


def import_folder(folder: Path) -> tuple[Model, Iterator[tuple[str, Tensor]]]:
    """The model of a Hugging Face folder, and its parameters by global name, read one after the other.

    Every tensor is accounted for before the first is read. Raises UserError if the folder is incomplete, holds a model
    that we have no equal of, a tensor that is unknown or missing, or weights that are not safetensors.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a Hugging Face folder: it has no config.json.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    model = read_config(settings, source=str(path))
    wanted = list(entries(settings["model_type"], model))
    places = _places(folder)
    # A base model's folder, such as GPT-2's first, leaves out the prefix of every name.
    actual = {name: name if name in places else name.split(".", 1)[1] for entry in wanted for name in entry.theirs}
    missing = [name for name, found in actual.items() if found not in places]
    if missing:
        raise UserError(f"{folder} has no tensor {missing[0]} ({len(missing):,} of {len(actual):,} are missing).")
    known = set(actual.values())
    for name in places:
        if name not in known and not is_ballast(settings["model_type"], name, model):
            raise UserError(f"{folder} has a tensor {name}, which {settings['model_type']} does not have in megagpt.")
    return model, _our_tensors(wanted, {name: (found, places[found]) for name, found in actual.items()}, model)


def _places(folder: Path) -> dict[str, Path]:
    """The file of each tensor in the folder."""
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    else:
        files = [folder / _WEIGHTS]
    places: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{folder} has no {file.name}.",
                "Weights in pickled files (pytorch_model.bin) are not read, since reading one can run any program.",
            )
        try:
            with safe_open(file, framework="pt") as stored:
                places |= dict.fromkeys(stored.keys(), file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: {error}.", "Fetch it again.") from error
    return places


def _our_tensors(
    wanted: list[Entry], places: Mapping[str, tuple[str, Path]], model: Model
) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in build(model).named_parameters()}
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for _, file in places.values()}
        for entry in wanted:
            found = [places[name] for name in entry.theirs]
            tensor = entry.joined([opened[file].get_tensor(name) for name, file in found]).contiguous()
            if tensor.shape != shapes[entry.ours]:
                raise UserError(
                    f"{found[0][1]}: {' + '.join(entry.theirs)} has the shape {tuple(tensor.shape)}, but config.json "
                    f"makes it {tuple(shapes[entry.ours])}."
                )
            yield entry.ours, tensor
