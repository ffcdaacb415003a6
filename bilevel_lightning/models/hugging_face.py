"""Causal language models of Hugging Face's library ``transformers``, an optional extra, as networks of this package."""

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.errors import BilevelError

Attention = Literal["sdpa", "eager"]


class HuggingFaceModel(nn.Module):
    """A causal model of ``transformers``: tokens, integers ``(batch, length)``, to logits ``(batch, length, tokens)``.

    It stands wherever `GPT` does, also inside `LowRank`, `Subset` and `Autocast`. Nothing is downloaded, no code of a
    folder is run (``trust_remote_code`` is always off), and weights are read from safetensors files only, never from
    pickles. Install it by ``pip install bilevel-lightning[text]``.

    Args:
        folder: a local folder with ``config.json`` and weights, as `save_pretrained` writes it. None (default): random
            weights, from ``model_type`` and ``settings``.
        model_type: family of a random model, such as ``gpt2`` or ``llama``. Default ``gpt2``.
        settings: of its config, such as ``{vocab_size: 256, n_positions: 64, n_embd: 64, n_layer: 2, n_head: 4}``; with
            a folder, those that replace its own, such as ``{attn_pdrop: 0.0}``. Dropout, which some families have by
            default, adds noise to differences of losses (MEHA, F2SA): set it to 0.
        attention: ``sdpa`` (default): torch's fused kernels, or ``eager``, plain products.

    Raises:
        BilevelError: if ``transformers`` is missing, the folder is not there, or the settings are refused.
    """

    def __init__(
        self,
        folder: str | None = None,
        model_type: str = "gpt2",
        settings: dict[str, Any] | None = None,
        attention: Attention = "sdpa",
    ) -> None:
        super().__init__()
        try:
            transformers: Any = import_module("transformers")
        except ImportError as error:
            raise BilevelError(
                "HuggingFaceModel needs the library transformers: pip install bilevel-lightning[text], or use GPT."
            ) from error
        if attention not in ("sdpa", "eager"):
            raise BilevelError(f"HuggingFaceModel.attention must be sdpa or eager, got {attention!r}.")
        settings = {} if settings is None else settings
        # These could name code: kernels of a hub, classes of a folder, other formats of weights.
        refused = [name for name in settings if name.startswith("_") or name in _REFUSED]
        if refused:
            raise BilevelError(f"HuggingFaceModel.settings must not hold {', '.join(refused)}.")
        if folder is not None and not (Path(folder) / "config.json").is_file():
            raise BilevelError(
                f"HuggingFaceModel.folder={folder} holds no config.json: give a local folder that save_pretrained "
                "wrote; nothing is downloaded."
            )
        safe: dict[str, Any] = {"trust_remote_code": False, "attn_implementation": attention}
        try:
            if folder is None:
                config = transformers.AutoConfig.for_model(model_type, **settings)
                self.model: Any = transformers.AutoModelForCausalLM.from_config(config, **safe)
            else:
                safe.update(local_files_only=True, use_safetensors=True)
                self.model = transformers.AutoModelForCausalLM.from_pretrained(str(Path(folder)), **safe, **settings)
        except (ValueError, TypeError, OSError, AttributeError) as error:
            raise BilevelError(f"HuggingFaceModel cannot be made: {error}") from error

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=inputs, use_cache=False).logits
        return logits


_REFUSED = {
    "adapter_kwargs", "attn_implementation", "auto_map", "custom_pipelines", "device_map", "experts_implementation",
    "local_files_only", "quantization_config", "state_dict", "trust_remote_code", "use_kernels", "use_safetensors",
}  # fmt: skip
