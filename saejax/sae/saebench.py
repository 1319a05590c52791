"""What SAEBench asks of an SAE's `cfg`, and which SAEs it can evaluate. No torch here; `torch_view` has the module."""

import re
from dataclasses import asdict, dataclass, field

from saejax.base.assets import published
from saejax.base.errors import FormatError
from saejax.sae.row_norm import NONE

ARCHITECTURES = {"relu": "standard", "topk": "topk", "groupmax": "groupmax", "jumprelu": "jumprelu", "gated": "gated"}


@dataclass
class SAEBenchConfig:
    """The fields of SAEBench 0.6.0's own `CustomSAEConfig`, by its names. Its evaluations set further ones (`metadata`,
    `architecture_str`, `exclude_special_tokens`), which `to_dict` leaves out, as theirs does.
    """

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    architecture_str: str
    apply_b_dec_to_input: bool
    activation_fn_str: str
    activation_fn_kwargs: dict
    dtype: str
    device: str
    context_size: int | None = None
    prepend_bos: bool = True
    training_tokens: int = -100_000  # SAEBench's own value for "not known"
    hook_head_index: int | None = None
    finetuning_scaling_factor: bool | None = None
    normalize_activations: str = "none"
    model_from_pretrained_kwargs: dict = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False  # theirs is True
    seqpos_slice: tuple = (None,)
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict:
        """Plain values, for SAEBench's result files."""
        return asdict(self)


def config_for(cfg, *, model_name: str | None, dtype: str, device: str) -> SAEBenchConfig:
    """The `cfg` that SAEBench reads, of an `SAEConfig`. Raises one `FormatError` with everything that it cannot evaluate."""
    layer = re.fullmatch(r"blocks\.(\d+)\..+", cfg.hookpoint)
    problems = [problem for problem, there in (
        (f"it is a {cfg.spec.shape}, and only what reconstructs its own input is evaluated", cfg.spec.shape != "sae"),
        (f"its rows are normalised one by one ({cfg.input_norm}), and decode() is called without them", cfg.input_norm != NONE),
        (f"kind {cfg.kind} depends on the other rows of a batch", cfg.kind not in ARCHITECTURES),
        (f"hookpoint {cfg.hookpoint!r} is not one of a block", layer is None),
        ("no model is named; give model_name", not (model_name or cfg.model))) if there]
    if problems:
        raise FormatError(f"SAEBench cannot evaluate this SAE: {'; '.join(problems)}")
    text = cfg.metadata.get("text") or {}
    sparse = cfg.kind in ("topk", "groupmax")
    return SAEBenchConfig(
        model_name=model_name or published(cfg.model), d_in=cfg.d_in, d_sae=cfg.d_sae, hook_layer=int(layer[1]),
        hook_name=cfg.hookpoint,
        architecture=ARCHITECTURES[cfg.kind], architecture_str=ARCHITECTURES[cfg.kind], apply_b_dec_to_input=cfg.pre_bias,
        activation_fn_str=cfg.kind if sparse else "relu", activation_fn_kwargs={"k": cfg.k} if sparse else {}, dtype=dtype,
        device=device, context_size=text.get("context"), prepend_bos=text.get("bos", "row") in ("row", None),
        training_tokens=(cfg.metadata.get("training") or {}).get("tokens", -100_000))
