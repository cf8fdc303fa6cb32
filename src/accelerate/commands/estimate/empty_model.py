"""Finds the model for `accelerate estimate-memory` and builds it on the meta device.

A name is a folder, a configuration file, a model on the Hub (or in its local cache), or an architecture of timm. Only the
configuration is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("timm", "transformers")
_CONFIG = "config.json"


class EstimateError(ValueError):
    """Raised if a model cannot be found or built."""


@dataclass(frozen=True)
class ModelSource:
    """Location of a model's configuration.

    Attributes:
        name: The name given by the user.
        library: ``transformers`` or ``timm``.
        path: The local configuration; None if the library downloads it by name.
    """

    name: str
    library: str
    path: Path | None = None


def find_source(name: str, library: str | None = None, token: str | None = None) -> ModelSource:
    """Finds a model.

    Args:
        name: A folder, a configuration file, or a name on the Hub.
        library: Its library, if the configuration does not name it.
        token: Access token, for a private or gated model.

    Raises:
        EstimateError: if the model is not found, not accessible, not a model, or of an unknown library, or if the Hub cannot
            be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path / _CONFIG if path.is_dir() else path, library)
    if library == "timm" and "/" not in name:
        return ModelSource(name, "timm")  # an architecture name of timm
    if name.startswith((".", "/", "~")) or name.endswith(".json"):
        raise EstimateError(f"there is no file or folder {name}.")
    info = verify_on_hub(name, token)
    if info == "offline":
        return _cached(name, library)
    if info == "gated":
        raise EstimateError(
            f"{name} is on the Hub, and you have no access to it (yet): ask for it on https://huggingface.co/{name}, then "
            "log in with `hf auth login`."
        )
    if info == "repo":
        raise EstimateError(
            f"{name} is neither a folder here nor a model on the Hub that you may see: check the name. For a private "
            "model, log in with `hf auth login`."
        )
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if _CONFIG not in files:
        raise EstimateError(f"{name} is on the Hub, but is no model that can be estimated: it has no {_CONFIG}.")
    return ModelSource(name, _library(library or info.library_name, name))


def verify_on_hub(repo: str, token: str | None = None) -> Any:
    """Requests information on a model from the Hub.

    Returns:
        Its ``ModelInfo``; or ``"gated"`` (no access), ``"repo"`` (not found) or ``"offline"`` (no response).
    """
    from huggingface_hub import errors, model_info

    try:
        return model_info(repo, token=token)
    except errors.GatedRepoError:
        return "gated"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return "repo"
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0].startswith(
            ("httpx", "httpcore", "requests")
        ):
            return "offline"
        raise


def check_has_model(error: Exception) -> str:
    """Returns the library that raised an unknown-model error: ``timm``, ``transformers`` or ``unknown``."""
    if isinstance(error, RuntimeError) and "Unknown model" in str(error):
        return "timm"
    if isinstance(error, OSError) and _CONFIG in str(error):
        return "transformers"
    return "unknown"


def add_timm_hub_prefix(model_name: str) -> str:
    """Returns timm's name of a model on the Hub: ``hf-hub:timm/resnet50.a1_in1k``."""
    return model_name if model_name.startswith(("hf-hub:", "hf_hub:")) else f"hf-hub:{model_name}"


def _cached(name: str, library: str | None) -> ModelSource:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, _CONFIG)
    if not isinstance(found, str):
        raise EstimateError(
            f"the Hub cannot be reached, and {name} is not in its cache on this machine: check the connection (and "
            "HF_HUB_OFFLINE), or give a folder or a config.json instead."
        )
    return _local(name, Path(found), library)


def _local(name: str, path: Path, library: str | None) -> ModelSource:
    config = _read(path)
    if library is None:
        if "model_type" in config or "architectures" in config:
            library = "transformers"
        elif "architecture" in config:
            library = "timm"
    return ModelSource(name, _library(library, name), path)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EstimateError(f"{path.parent} holds no model: there is no {path.name} in it.") from None
    except (OSError, ValueError) as error:
        raise EstimateError(f"{path} cannot be read as a configuration: {error}") from None
    if not isinstance(config, dict):
        raise EstimateError(f"{path} is no configuration of a model: expected keys and values.")
    return config


def _library(library: str | None, name: str) -> str:
    if library is None:
        raise EstimateError(f"{name} does not name its library: pass --library_name {{timm,transformers}}.")
    if library not in LIBRARIES:
        raise EstimateError(f"{name} is for {library}; estimates are there for models of {' and '.join(LIBRARIES)}.")
    return library


def create_empty_model(
    model_name: str,
    library_name: str | None,
    trust_remote_code: bool = False,
    access_token: str | None = None,
) -> nn.Module:
    """Builds a model on the meta device, in float32.

    Args:
        model_name: A folder, a configuration file, or a name on the Hub.
        library_name: ``transformers`` or ``timm``; None detects it.
        trust_remote_code: Whether to run the model's own code.
        access_token: Access token, for a private or gated model.

    Raises:
        EstimateError: if the model cannot be found or built.
    """
    import torch

    with torch.device("meta"):
        return build_model(find_source(model_name, library_name, access_token), trust_remote_code, access_token).float()


def build_model(
    source: ModelSource, trust_remote_code: bool = False, token: str | None = None, with_head: bool = False
) -> nn.Module:
    """Builds a model on the current default device.

    Args:
        source: The result of `find_source`.
        trust_remote_code: Whether to run the model's own code.
        token: Access token, for a private or gated model.
        with_head: Whether to build the class that the configuration names, such as BertForMaskedLM, not the base model.

    Raises:
        EstimateError: if it cannot be built.
    """
    try:
        import torch

        from ...runtime.system.availability import is_torch_version

        if is_torch_version("<", "2.13.0"):
            # Models import the compiler, which fails in torch 2.6 under a meta default device.
            with torch.device("cpu"):
                torch.compiler.list_backends()
        if source.library == "timm":
            return _make_timm(source)
        return _make_transformers(source, trust_remote_code, token, with_head)
    except EstimateError:
        raise
    except ModuleNotFoundError as error:
        if error.name not in LIBRARIES:
            raise EstimateError(f"{source.name} cannot be made: {error}.") from error
        extra = '"accelerate[estimate]"' if error.name == "transformers" else error.name
        raise EstimateError(f"{source.name} needs {error.name}, which is not installed: pip install {extra}") from None
    except Exception as error:  # a library, or the model's own code, may raise anything
        library = check_has_model(error)
        what = f"{library} has no such model" if library != "unknown" else type(error).__name__
        raise EstimateError(f"{source.name} cannot be made: {what}: {' '.join(str(error).split())[:400]}") from error


def _make_transformers(source: ModelSource, trust: bool, token: str | None, with_head: bool) -> nn.Module:
    import torch
    import transformers

    where = source.name
    if source.path is not None:  # the model's own code is found only by the folder of its configuration
        where = str(source.path.parent if source.path.name == _CONFIG else source.path)
    config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=trust, token=token)
    # Not the dtype of the saved weights. (The attribute has another name before transformers 5.)
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", torch.float32)
    own_code = getattr(config, "auto_map", None) or {}
    if own_code and not trust and type(config).__module__.startswith("transformers_modules"):
        raise EstimateError(f"{source.name} brings code of its own: read it, then pass --trust_remote_code.")
    names = [name for name in own_code if name.startswith("AutoModelFor")] if trust else []
    if not names and with_head:
        names = [name for name in config.architectures or () if hasattr(transformers, name)]
    if not names or names[0].startswith("AutoModel"):
        maker = getattr(transformers, names[0] if names else "AutoModel")
        return maker.from_config(config, trust_remote_code=trust)
    return getattr(transformers, names[0])(config)


def _make_timm(source: ModelSource) -> nn.Module:
    import timm

    if source.path is None:
        name = add_timm_hub_prefix(source.name) if "/" in source.name else source.name
        return timm.create_model(name, pretrained=False)
    config = _read(source.path)
    if "architecture" not in config:
        raise EstimateError(f"{source.path} is not a configuration of timm: it has no key architecture.")
    options = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    options.update(config.get("model_args") or {})
    return timm.create_model(config["architecture"], pretrained=False, **options)
