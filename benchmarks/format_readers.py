"""Do the peers read what we write? Two steps, since the peers live in their own environment (with torch).

    python benchmarks/format_readers.py write OUT     # saejax: every SAE of tests/formats/fixtures in every format that takes it
    python benchmarks/format_readers.py peers OUT     # environment with sae-lens, dictionary-learning, eai-sparsify

`peers` loads every directory with the library itself and compares: activations and reconstructions within 1e-4 of their largest
value, the same features active beyond rounding. Exit code 1 when any differs. Gemma Scope files go through the mapping that
sae-lens applies to them (its loader takes them from the hub only).
"""

import importlib
import json
import sys
import types
from importlib import metadata, util
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "formats" / "fixtures"
LIMIT = 1e-4
OUTPUTS = "reader_check.npz"


def write(out: Path) -> None:
    import saejax
    from saejax.base.errors import FormatError
    from saejax.formats.convert import convert
    from saejax.formats.loading import FORMATS

    for source in sorted(path.parent for path in FIXTURES.glob("*/*/io.npz")):
        x = np.load(source / "io.npz")["x"]
        recon, acts = saejax.load(source).reconstruct(x)
        for to in (name for name, known in FORMATS.items() if known.write):
            target = out / f"{source.parent.name}-{source.name}" / to / source.name
            try:
                convert(source, target, to)
            except FormatError:
                continue
            np.savez(target.parent / OUTPUTS, x=x, acts=np.asarray(acts), recon=np.asarray(recon))
    for name, to, sae in variants():
        x = np.load(FIXTURES / "sparsify" / "topk" / "io.npz")["x"]
        recon, acts = sae.reconstruct(x)
        FORMATS[to].write(out / name / to / name, sae)
        np.savez(out / name / to / OUTPUTS, x=x, acts=np.asarray(acts), recon=np.asarray(recon))


def variants():
    """(name, format, SAE) of kinds that no fixture has."""
    from dataclasses import replace

    import jax.numpy as jnp

    import saejax
    from saejax.sae.inference import SAE

    topk, transcoder = (saejax.load(FIXTURES / "sparsify" / name) for name in ("topk", "transcoder"))
    yield "groupmax", "sparsify", SAE(topk.params, replace(topk.cfg, kind="groupmax"))
    skip = jnp.asarray(np.random.default_rng(0).standard_normal((32, 32)), jnp.float32)
    yield "skip", "sparsify", SAE(transcoder.params.replace(W_skip=skip), replace(transcoder.cfg, skip=True))
    standard = saejax.load(FIXTURES / "dictionary_learning" / "standard")
    yield "AutoEncoderNew", "dictionary_learning", SAE(standard.params, replace(standard.cfg, pre_bias=False))
    gated = saejax.load(FIXTURES / "saelens" / "gated")
    yield "constant_norm", "saelens", SAE(gated.params, replace(gated.cfg, input_norm="constant_norm_rescale"))


def saelens(path: Path, x):
    import sae_lens
    sae = sae_lens.SAE.load_from_disk(str(path))
    return type(sae).__name__, sae.encode(x), sae(x)


def package(name: str) -> None:
    """A package whose modules can be imported without its __init__, which would need more libraries."""
    if name not in sys.modules:
        found = util.find_spec(name)
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__, sys.modules[name].__spec__ = list(found.submodule_search_locations), found


def dictionary_learning(path: Path, x):
    package("dictionary_learning")
    name = json.loads((path / "config.json").read_text())["trainer"]["dict_class"]
    homes = {"AutoEncoderTopK": "trainers.top_k", "BatchTopKSAE": "trainers.batch_top_k",
             "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k"}
    module = importlib.import_module(f"dictionary_learning.{homes.get(name, 'dictionary')}")
    options = {"normalize_decoder": False} if name == "AutoEncoder" else {}
    sae = getattr(module, name).from_pretrained(str(path / "ae.pt"), device="cpu", **options)
    acts = sae.encode(x)
    return name, acts, sae.decode(acts)


def sparsify(path: Path, x):
    import torch
    package("sparsify")
    sae = importlib.import_module("sparsify.sparse_coder").SparseCoder.load_from_disk(str(path), device="cpu")
    top, indices, _ = sae.encode(x)
    acts = torch.zeros(len(x), sae.num_latents).scatter(1, indices, top)
    recon = sae.decode(top, indices)
    return f"SparseCoder({sae.cfg.activation})", acts, recon if sae.W_skip is None else recon + x @ sae.W_skip.mT


def gemma_scope(path: Path, x):
    import torch
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig
    tensors = {name: torch.tensor(value) for name, value in np.load(path / "params.npz").items()}
    shape = {"d_in": x.shape[1], "d_sae": len(tensors["b_enc"]), "apply_b_dec_to_input": False}
    if "transcoder" in path.name:
        sae = JumpReLUTranscoder(JumpReLUTranscoderConfig(d_out=len(tensors["b_dec"]), **shape))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**shape))
    sae.load_state_dict(tensors)
    return type(sae).__name__, sae.encode(x), sae(x)


READERS = {"saelens": (saelens, "sae-lens"), "dictionary_learning": (dictionary_learning, "dictionary-learning"),
           "sparsify": (sparsify, "eai-sparsify"), "gemma_scope": (gemma_scope, "sae-lens")}


def peers(out: Path) -> bool:
    import torch

    good = True
    for check in sorted(out.glob(f"*/*/{OUTPUTS}")):
        saved = dict(np.load(check))
        to, path = check.parent.name, next(p for p in check.parent.iterdir() if p.is_dir())
        reader, library = READERS[to]
        with torch.no_grad():
            name, acts, recon = reader(path, torch.tensor(saved["x"]))
        got = {"acts": acts.numpy(), "recon": recon.numpy()}
        worst = {key: np.abs(value - saved[key]).max() / np.abs(saved[key]).max() for key, value in got.items()}
        large = np.maximum(got["acts"], saved["acts"]) > LIMIT * saved["acts"].max()
        flips = int((((got["acts"] > 0) != (saved["acts"] > 0)) & large).sum())
        agrees = max(worst.values()) <= LIMIT and flips == 0
        good &= agrees
        print(f"| {check.parents[1].name} | {to} | {library} {metadata.version(library)} `{name}` | {worst['acts']:.1e} | "
              f"{worst['recon']:.1e} | {flips} | {'agrees' if agrees else 'DIFFERS'} |")
    return good


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    if command not in ("write", "peers") or len(rest) != 1:
        sys.exit(__doc__)
    sys.exit(0 if {"write": write, "peers": peers}[command](Path(rest[0])) is not False else 1)
