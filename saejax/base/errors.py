"""Typed errors. Every message is one line: the config key or file, the values, the fix."""


EXIT_PREEMPTED = 75  # EX_TEMPFAIL: state is saved, start the same command again


class SaejaxError(Exception):
    """Base of every error that a user can cause or repair. The command line prints it as one line and exits with code 2."""


class ConfigError(SaejaxError):
    """A config key is unknown, has the wrong type, or its value contradicts another; names the key path."""


class AssetError(SaejaxError):
    """An embedded model or text could not be fetched or does not verify."""


class LMError(SaejaxError):
    """The language model's config asks for something the decoder does not compute."""


class WeightsError(LMError):
    """Missing, extra or mis-shaped weight tensors; lists all of them."""


class TokenizerError(LMError):
    """The tokenizer cannot be read or does not fit the model's vocabulary."""


class HookpointError(LMError):
    """The hookpoint does not exist in this model; names the closest ones."""


class TextError(SaejaxError):
    """The text source is empty, unreadable, or shorter than one context."""


class StoreError(SaejaxError):
    """The activation store does not fit the config (model, hookpoint, width, context)."""


class StoreCorruptError(StoreError):
    """A shard or manifest of an activation store is missing, truncated, swapped or altered; names the file."""


class NonFiniteError(SaejaxError):
    """NaN or Inf in activations or in the loss; names the rows or the step."""


class CheckpointError(SaejaxError):
    """No usable checkpoint, or the run directory belongs to another config."""


class CheckpointCorruptError(CheckpointError):
    """A checkpoint does not verify against its fingerprints; names the step and the leaf."""


class FormatError(SaejaxError):
    """A release or foreign SAE file is not what its format promises; names file and tensor."""


class DiskError(SaejaxError):
    """Writing failed (disk full, read-only, permission); names the path, nothing half-written is left."""


class LeaseError(SaejaxError):
    """Another job writes in the directory, or has taken it over; names the job."""


class PromptError(LMError):
    """A prompt is empty, longer than the model's context, or holds token ids that the model does not have."""


class FeatureIndexError(SaejaxError):
    """A feature index is missing, unfinished or altered, belongs to another checkpoint or model, or has no such feature."""


class SteeringError(SaejaxError):
    """A feature that cannot be set, ablated or attributed: no such feature, never active, an SAE for another model."""


class JudgeError(SaejaxError):
    """A judge cannot be asked, its answers cannot be read in, or the answers kept belong to another index or other prompts."""


class ScalingError(SaejaxError):
    """Scaling laws cannot be fitted: too few or mixed runs, values that are not finite, an optimum outside the grid."""


class ConceptError(SaejaxError):
    """A list of concepts cannot be read, names one thing twice or has too few words, or a text has none of them."""


class Preempted(SaejaxError):
    """The job was asked to stop and has saved its state; the command line exits with `EXIT_PREEMPTED`."""
