"""An SAE as a torch module. The only module that imports torch, which is an optional extra; see `SAE.as_saebench`."""

import numpy as np
import torch

from saejax.base import sharding
from saejax.sae.params import SAEParams
from saejax.sae.saebench import SAEBenchConfig


class TorchSAE(torch.nn.Module):
    """`encode`, `decode` and `forward` of torch tensors [..., d_in] or [..., d_sae], differentiable, with a copy of the weights:
    W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc and b_dec as parameters, threshold, r_mag and b_mag where the kind has them.

    Formulas: those of `saejax.sae.activations`. Inputs are taken in the weights' dtype. Of equal values at the k-th place of
    topk torch may keep others than `saejax` does.
    """

    def __init__(self, params: SAEParams, cfg: SAEBenchConfig):
        super().__init__()
        self.cfg, self.hook_z_reshaping_mode = cfg, False

        def parameter(value) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.from_numpy(np.array(value)))

        self.W_enc = parameter(sharding.to_host(params.W_enc).T)
        self.W_dec = parameter(sharding.to_host(params.W_dec))
        self.b_enc, self.b_dec = (parameter(sharding.to_host(value)) for value in (params.b_enc, params.b_dec))
        for name, value in params.per_feature.items():
            setattr(self, name, parameter(sharding.to_host(value)))
        self.to(dtype=getattr(torch, cfg.dtype), device=torch.device(cfg.device))

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Feature activations [..., d_sae] of raw activations [..., d_in]."""
        x = x.to(self.dtype)
        pre = (x - self.b_dec if self.cfg.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        acts = torch.relu(pre)
        match self.cfg.architecture:
            case "jumprelu":
                return acts * (pre > self.threshold)
            case "gated":
                return torch.relu(torch.exp(self.r_mag) * (pre - self.b_enc) + self.b_mag) * (pre > 0)
            case "topk":
                values, kept = acts.topk(self.cfg.activation_fn_kwargs["k"], dim=-1, sorted=False)
                return torch.zeros_like(acts).scatter(-1, kept, values)
            case "groupmax":
                grouped = acts.unflatten(-1, (self.cfg.activation_fn_kwargs["k"], -1))
                values, first = grouped.max(-1, keepdim=True)
                return torch.zeros_like(grouped).scatter(-1, first, values).flatten(-2)
        return acts

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        """Reconstruction [..., d_in] of feature activations [..., d_sae]."""
        return acts.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Whether all decoder rows have unit length: 1e-5 in float32, 1e-2 in shorter types (SAEBench's limits)."""
        limit = 1e-5 if self.dtype in (torch.float32, torch.float64) else 1e-2
        return bool(((self.W_dec.norm(dim=1) - 1).abs() <= limit).all())

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """SAEBench calls it at hook_z and flattens the heads itself; nothing is reshaped here."""
