"""One open GGUF file: its key-value fields, and its tensors dequantised one at a time."""

from pathlib import Path
from typing import Any

import numpy as np

from saejax.base.errors import WeightsError


class GGUFFile:
    """Reads a GGUF file through the `gguf` package. Raises WeightsError when it is not one or is cut short."""

    def __init__(self, path: Path):
        import gguf

        self.path = path
        self._dequantize = gguf.quants.dequantize
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
            raise WeightsError(f"{path}: not a readable GGUF file ({_one_line(error)}): download it again") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def fields(self) -> dict[str, Any]:
        """Every key-value field except the tokenizer's long lists."""
        return {
            key: field.contents()
            for key, field in self._reader.fields.items()
            if not (key.startswith("tokenizer.ggml.") and len(field.data) > 1)
        }

    def field(self, key: str) -> Any:
        """One field, lists included; None when the file does not have it."""
        found = self._reader.fields.get(key)
        return None if found is None else found.contents()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Row-major shape of every tensor (GGUF lists the fastest dimension first)."""
        return {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32. Raises WeightsError for a quantisation the `gguf` package cannot undo."""
        tensor = self._tensors[name]
        try:
            return self._dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes()[name])
        except (NotImplementedError, ValueError) as error:
            raise WeightsError(
                f"{self.path}: tensor {name} of type {tensor.tensor_type.name} ({_one_line(error)})"
            ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
