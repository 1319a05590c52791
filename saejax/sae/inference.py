"""A trained SAE for use from Python: raw language-model activations in, feature activations and reconstructions out."""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.base import sharding
from saejax.base.errors import FormatError
from saejax.sae.activations import thresholds
from saejax.sae.folding import decoder_norms, scale_features
from saejax.sae.measuring import Measured, measured
from saejax.sae.model import decode, encode, read, skipped
from saejax.sae.normalization import Normalization
from saejax.sae.pairs import Pairs
from saejax.sae.params import SAEParams, SAESpec, param_shardings, tensors
from saejax.sae.products import product
from saejax.sae.row_norm import CENTER, NONE, normalise_rows
from saejax.sae.saebench import config_for
from saejax.sae.sparse import selected

ROWS = 16_384  # of all processes that `SAE.measure` takes at once: on each device two float32 arrays of them lie beside the rest


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is and where it comes from. `metadata` is plain JSON (training tokens, digests, versions, ...).

    hookpoints: what it reads, one after the other where there are several (crosscoder, whose `layers` are their widths).
    target: the hookpoint that a transcoder predicts, of width d_out; empty: it reconstructs what it reads.
    input_norm: normalisation of every row by itself before the encoder (`sae.row_norm.ROW_NORMS`), undone on the reconstruction
    except in a transcoder, whose output is another space and whose skip connection reads the raw row.
    """

    kind: str
    d_in: int
    d_sae: int
    k: int
    pre_bias: bool
    hookpoints: tuple[str, ...]
    model: str
    target: str = ""
    d_out: int | None = None
    skip: bool = False
    layers: tuple[int, ...] = ()
    input_norm: str = NONE
    metadata: dict = field(default_factory=dict, compare=False)

    @property
    def spec(self) -> SAESpec:
        return SAESpec(kind=self.kind, d_in=self.d_in, d_sae=self.d_sae, k=self.k, pre_bias=self.pre_bias, d_out=self.d_out,
                       skip=self.skip, layers=self.layers)

    @property
    def hookpoint(self) -> str:
        """The hookpoint that it reads; of a crosscoder all of them, with blanks between."""
        return " ".join(self.hookpoints)

    @property
    def place(self) -> str:
        """What it reads and writes, in few words."""
        read = self.hookpoint if len(self.hookpoints) < 3 else f"{self.hookpoints[0]} ... {self.hookpoints[-1]}"
        return f"{read} -> {self.target}" if self.target else read

    def __str__(self) -> str:
        k = f", k={self.k}" if self.k else ""
        shape = "" if self.spec.shape == "sae" else f" {self.spec.shape}"
        return f"SAE({self.kind}{shape}{k}, d_in={self.d_in}, d_sae={self.d_sae}, {self.place} of {self.model})"[:150]

    @property
    def targets(self) -> tuple[str, ...]:
        """The hookpoints that are reconstructed."""
        return (self.target,) if self.target else self.hookpoints


def folded_kind(kind: str, params: SAEParams) -> str:
    """The kind of a folded SAE: where a kind with k comes with a threshold it encodes each row by itself, as jumprelu."""
    return "jumprelu" if "threshold" in params.per_feature else kind


def fold(spec: SAESpec, params: SAEParams, normalization: Normalization) -> SAEParams:
    """Parameters for raw activations: the normalisation of input and output and, except for topk, decoder norms folded.

    Feature activations come out in raw units: the length of the feature's contribution to what is reconstructed where decoder
    rows are unit. acts = f_i c_i with c_i = ||W_dec,i / scale|| (scale: of the output's columns) and unit decoder rows; topk: one
    c = max(1 / scale) for all features, decoder rows as trained (unit by default), since rescaling single rows would change
    which features win. All rest on relu(c z) = c relu(z) for c > 0; biases and thresholds are in the units of pre-activations
    and scale like b_enc, `r_mag` is a ratio and stays. The centre goes into b_enc, or into b_dec where the encoder subtracts it.
    The result is of `folded_kind`: batchtopk (and topk where that is asked for) becomes jumprelu at the threshold that
    params.per_feature brings along as `threshold`; `log_threshold` of jumprelu becomes `threshold`.
    """
    read, written = normalization.parts(spec)
    W_dec, b_dec = params.W_dec / written.scale, params.b_dec / written.scale + written.center
    W_enc, b_enc, W_skip = params.W_enc * read.scale, params.b_enc, params.W_skip
    if not spec.pre_bias:  # otherwise b_dec, which holds the centre, is subtracted before the encoder
        b_enc = b_enc - product("fd,d->f", W_enc, read.center, jnp.float32)
    if W_skip is not None:
        W_skip = W_skip * read.scale[:, None] / written.scale
        b_dec = b_dec - product("d,de->e", read.center, W_skip, jnp.float32)
    kind = folded_kind(spec.kind, params)
    if kind != "topk":
        unit_F = jnp.maximum(jnp.linalg.norm(W_dec, axis=1), jnp.finfo(jnp.float32).tiny)
    else:
        unit_F = jnp.ones_like(b_enc) / written.scale.min()
    own = dict(params.per_feature)
    if kind == "jumprelu":
        own = {"threshold": thresholds(params)}
    return SAEParams(W_enc=W_enc * unit_F[:, None], b_enc=b_enc * unit_F, W_dec=W_dec / unit_F[:, None], b_dec=b_dec,
                     W_skip=W_skip,
                     per_feature={name: value if name == "r_mag" else value * unit_F for name, value in own.items()})


def unfold(spec: SAESpec, params: SAEParams, normalization: Normalization, *, unit_decoder: bool) -> SAEParams:
    """The inverse of `fold`: parameters for normalised activations that compute what `params` compute on raw ones.

    unit_decoder: with unit decoder rows, their norms in the encoder; for topk, which compares features, they must be equal for
    that, and the caller checks it. Thresholds become `log_threshold`.
    """
    read, written = normalization.parts(spec)
    skip, b_dec, b_enc = params.W_skip, params.b_dec, params.b_enc
    if skip is not None:
        b_dec = b_dec + product("d,de->e", read.center, skip, jnp.float32)
        skip = skip / read.scale[:, None] * written.scale
    if not spec.pre_bias:
        b_enc = b_enc + product("fd,d->f", params.W_enc, read.center, jnp.float32)
    out = params.replace(W_enc=params.W_enc / read.scale, b_enc=b_enc, W_dec=params.W_dec * written.scale, W_skip=skip,
                         b_dec=(b_dec - written.center) * written.scale)
    out = scale_features(out, decoder_norms(out)) if unit_decoder else out
    own = dict(out.per_feature)
    if "threshold" in own:
        own = {"log_threshold": jnp.log(jnp.maximum(own["threshold"], jnp.finfo(jnp.float32).tiny))}
    return out.replace(per_feature=own)


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_raw(spec: SAESpec, norm: str, params: SAEParams, x_BD: jax.Array) -> jax.Array:
    """Activations [B, F] of raw rows, as `SAE.encode` gives them, inside compiled functions; norm: `SAEConfig.input_norm`."""
    return encode(spec, params, normalise_rows(norm, x_BD)[0])


def read_raw(spec: SAESpec, norm: str, params: SAEParams, x_BD: jax.Array) -> jax.Array:
    """What the encoder's product reads of raw rows (`model.read`), inside compiled functions."""
    return read(spec, params, normalise_rows(norm, x_BD)[0])


def selected_raw(spec: SAESpec, norm: str, params: SAEParams, x_BD: jax.Array) -> Pairs:
    """`encode_raw` of kinds with k as pairs, without an array [B, F]."""
    return selected(spec, params, read_raw(spec, norm, params, x_BD), spec.k, over_batch=spec.kind == "batchtopk")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(spec, norm, params, acts_BF):
    return decode(spec, params, acts_BF.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _skipped(spec, norm, params, x_BD):
    return skipped(spec, params, x_BD.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scale_and_shift(spec, norm, params, x_BD):
    return jnp.concatenate(normalise_rows(norm, x_BD)[1:], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def measured_raw(spec: SAESpec, norm: str, params: SAEParams, x_BD: jax.Array, counted_B: jax.Array) -> Measured:
    """`measured` of raw rows at rest, as `SAE.measure` gives it."""
    x_BD = x_BD.astype(jnp.float32)
    rows_BD, scale_B1, shift_B1 = normalise_rows(norm, x_BD)
    found = measured(spec, params.replace(W_skip=None), rows_BD, counted_B)
    recon_BD = found.recon_BD
    if norm != NONE and spec.d_out is None:
        recon_BD = recon_BD * scale_B1 + shift_B1
    return found.replace(recon_BD=recon_BD + skipped(spec, params, x_BD))


class SAE:
    """A sparse autoencoder on raw activations.

    `encode(x)`, `decode(acts)` and `sae(x) = decode(encode(x))` take numpy or jax arrays [..., d_in] (or [..., d_sae]) and
    return float32 jax arrays. Without a mesh they run on one device and can be used inside `jit` and `grad`. With a
    ("data", "dict") mesh the dictionary stays split over `dict`, results come back sharded, and calls are made outside `jit`.
    A crosscoder takes and gives its layers one after the other in the last axis (`cfg.hookpoints`, `cfg.layers`).
    """

    def __init__(self, params: SAEParams, cfg: SAEConfig, mesh: Mesh | None = None):
        """params: folded (see `fold`); placed by feature over `mesh`, or on the default device."""
        self.cfg, self.mesh = cfg, mesh
        self.params = jax.device_put(params, param_shardings(mesh, tensors(params))) if mesh is not None else params
        self.writer = None  # (directory, SAE): what writes it; `saejax.load` sets it
        self.source = None  # where it was read
        self.card = None    # HTML of it for notebooks, where somebody draws it

    @property
    def hookpoint(self) -> str:
        """The hookpoint that it reads; of a crosscoder all of them, with blanks between."""
        return self.cfg.hookpoint

    @property
    def W_enc(self) -> jax.Array:
        """Encoder as [d_in, d_sae]."""
        return self.params.W_enc.T

    @property
    def W_dec(self) -> jax.Array:
        """Decoder as [d_sae, d_in]: row i is the direction of feature i."""
        return self.params.W_dec

    @property
    def b_enc(self) -> jax.Array:
        return self.params.b_enc

    @property
    def b_dec(self) -> jax.Array:
        return self.params.b_dec

    def encode(self, x) -> jax.Array:
        """Feature activations [..., d_sae] of raw activations x [..., d_in]. Raises `FormatError` for another width."""
        return self._apply(encode_raw, x, self.cfg.d_in, "d_in", "features")

    def decode(self, acts, x=None) -> jax.Array:
        """Reconstruction [..., d_out] in raw units from feature activations [..., d_sae]; without what a skip connection adds.

        x: the rows [..., d_in] that the activations come from; needed, and only read, where `cfg.input_norm` normalises every row
        by itself. Raises `FormatError` where it is missing; only "center" gives the reconstruction of the centred row then.
        """
        recon = self._apply(_decode, acts, self.cfg.d_sae, "features", "d_out")
        if self.cfg.input_norm == NONE or self.cfg.d_out is not None:
            return recon
        if x is None and self.cfg.input_norm == CENTER:
            return recon
        if x is None:
            raise FormatError(f"this SAE normalises every row by itself ({self.cfg.input_norm}): decode(acts, x) needs the "
                              "rows, or call reconstruct(x)")
        scale, shift = jnp.split(self._apply(_scale_and_shift, x, self.cfg.d_in, "d_in", None), 2, axis=-1)
        return recon * scale + shift

    def reconstruct(self, x) -> tuple[jax.Array, jax.Array]:
        """(reconstruction [..., d_out], feature activations [..., d_sae])."""
        acts = self.encode(x)
        recon = self.decode(acts, x)
        return (recon + self._apply(_skipped, x, self.cfg.d_in, "d_in", "d_out") if self.cfg.skip else recon), acts

    def measure(self, x_ND, counted_N) -> Measured:
        """What evaluation counts of rows [N, d_in]: their reconstruction [N, d_out], how many features are active in each, and in
        how many of those with `counted_N` each feature is. No array of rows x features is made, whatever the size.

        On a mesh over several processes each gives rows of its own, equally many, and gets what belongs to them; what is counted
        of features is that of all.
        """
        counted_N, n = np.asarray(counted_N, bool), len(x_ND)
        if self.mesh is None:
            x_ND = jax.device_put(x_ND, self.params.W_enc.sharding) if isinstance(x_ND, jax.Array) else x_ND
            return measured_raw(self.cfg.spec, self.cfg.input_norm, self.params, x_ND, counted_N)
        size = self._rows_at_once(n)
        parts = [self._measured(x_ND[first:first + size], counted_N[first:first + size], size) for first in range(0, n, size)]
        if n == size:
            return parts[0]
        with jax.set_mesh(self.mesh):
            fired_F = functools.reduce(jnp.add, [part.fired_F for part in parts])
        return Measured(np.concatenate([part.recon_BD for part in parts])[:n], np.concatenate([part.l0_B for part in parts])[:n],
                        fired_F)

    def _rows_at_once(self, n: int) -> int:
        """Of n rows of this process: as many for each device, and few, so that memory does not grow with the processes."""
        devices = len(self.mesh.local_devices)
        most = -(-n // devices)
        if self.cfg.kind != "batchtopk":  # whose rows compete
            most = min(most, -(-ROWS // self.mesh.size))
        return devices * max(1, most)

    def _measured(self, x_ND, counted_N: np.ndarray, size: int) -> Measured:
        """`measure` of rows of this process, filled up to `size`; they stay among them. One process leaves all on its devices."""
        more = size - len(x_ND)
        if more or self.mesh.is_multi_process:
            x_ND = np.pad(np.asarray(x_ND), ((0, more), (0, 0)))
        with jax.set_mesh(self.mesh):
            rows, counted = (sharding.place_rows(value, self.mesh) for value in (x_ND, np.pad(counted_N, (0, more))))
            found = measured_raw(self.cfg.spec, self.cfg.input_norm, self.params, rows, counted)
        if not self.mesh.is_multi_process:
            return found
        return found.replace(recon_BD=sharding.own_rows(found.recon_BD), l0_B=sharding.own_rows(found.l0_B))

    def offset(self, x) -> jax.Array:
        """What the reconstruction [..., d_out] of rows x is without any feature: b_dec, in the units and with the mean of the row
        where `cfg.input_norm` normalises rows, and what a skip connection adds.
        """
        out = self.decode(np.zeros((*x.shape[:-1], self.cfg.d_sae), np.float32), x)
        return out + self._apply(_skipped, x, self.cfg.d_in, "d_in", "d_out") if self.cfg.skip else out

    def __call__(self, x) -> jax.Array:
        """Reconstruction [..., d_out] (d_in but for a transcoder) from raw activations x [..., d_in]."""
        return self.reconstruct(x)[0]

    def save(self, path: str | Path) -> Path:
        """Writes the SAE as a release, which `saejax.load` reads, and SAELens where it is one file; returns the directory. Raises
        `FormatError` where nothing writes it: `saejax.load` gives an SAE its writer.
        """
        if self.writer is None:
            raise FormatError("this SAE was made in Python; saejax.formats.saelens.write(directory, sae) writes it")
        self.writer(Path(path), self)
        return Path(path)

    def as_saebench(self, *, model_name: str | None = None, dtype: str = "float32", device: str = "cpu"):
        """A torch module with what SAEBench's evaluations ask of an SAE: `encode`, `decode`, `forward`, `W_enc`, `W_dec`,
        `b_enc`, `b_dec`, `device`, `dtype` and `cfg`. It holds a copy of the weights; feature values are those of `encode`.

        model_name: the model as TransformerLens names it (default `cfg.model`, of a preset its hub id). Needs the extra `torch`.
        Raises `FormatError` for an SAE that SAEBench cannot evaluate, and without torch.
        """
        cfg = config_for(self.cfg, model_name=model_name, dtype=dtype, device=device)
        try:
            from saejax.sae.torch_view import TorchSAE
        except ModuleNotFoundError as error:
            raise FormatError(f"as_saebench() needs torch ({error}); pip install 'saejax[torch]'") from error
        return TorchSAE(self.params, cfg)

    def _apply(self, function, value, width: int, axis_in: str, axis_out: str | None) -> jax.Array:
        value = value if isinstance(value, jax.Array) else np.asarray(value)
        if value.ndim == 0 or value.shape[-1] != width:
            raise FormatError(f"this SAE expects [..., {width}], got shape {tuple(value.shape)}")
        lead = value.shape[:-1]
        rows = value.reshape(-1, width)
        if self.mesh is None:
            out = function(self.cfg.spec, self.cfg.input_norm, self.params, rows)
            return out.reshape(*lead, out.shape[-1])
        n = math.prod(lead)
        data = self.mesh.shape["data"]
        with jax.set_mesh(self.mesh):
            padded = jnp.pad(jnp.asarray(rows), ((0, -n % data), (0, 0)))
            placed = jax.device_put(padded, sharding.sharding(self.mesh, "rows", axis_in))
            out = function(self.cfg.spec, self.cfg.input_norm, self.params, placed)
            out = jax.sharding.reshard(out, sharding.spec(None, axis_out))[:n]
            last = sharding.AXES[axis_out] if axis_out else None
            return out.reshape(*lead, out.shape[-1], out_sharding=jax.P(*(None,) * len(lead), last))

    def __repr__(self) -> str:
        return str(self.cfg)

    def _repr_html_(self) -> str | None:
        return None if self.card is None else self.card(self)
