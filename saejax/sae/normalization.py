"""Raw language-model activations -> what an SAE is trained on, column by column."""

import jax
import jax.numpy as jnp
from flax import struct

from saejax.sae.params import SAESpec


@struct.dataclass
class Normalization:
    """normalised = (raw - center) * scale.

    Over the W columns of the rows that a run reads: its input hookpoints one after the other, then a transcoder's target. scale
    is one number per hookpoint, repeated; center is 0 unless the inputs are mean-centred. float32 [W] both, constants of a run.
    """

    scale: jax.Array
    center: jax.Array

    def apply(self, raw_BW: jax.Array) -> jax.Array:
        """float32 normalised rows."""
        return (raw_BW.astype(jnp.float32) - self.center) * self.scale

    def parts(self, spec: SAESpec) -> tuple["Normalization", "Normalization"]:
        """(of the input's columns, of those that are reconstructed)."""
        scales, centers = columns(spec, self.scale), columns(spec, self.center)
        return Normalization(scales[0], centers[0]), Normalization(scales[1], centers[1])


def columns(spec: SAESpec, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(input [..., d_in], what is to be reconstructed [..., d_out]) of rows [..., W]; the same but for a transcoder."""
    return (rows, rows) if spec.d_out is None else (rows[..., :spec.d_in], rows[..., spec.d_in:])
