"""One of two processes of `test_sharded_release`: writes releases over meshes of both, reads them, and what has to be refused.

Usage: python -m tests.formats.release_worker PORT PROCESS OUT. The last line is DONE.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from saejax.base import sharding
from saejax.base.errors import SaejaxError
from saejax.base.records import MeshOptions
from saejax.base.storage import barrier
from saejax.formats import saelens, saelens_read
from saejax.sae import from_tensors, param_shardings, tensors
from saejax.sae.inference import SAE
from tests.formats.test_sharded_release import make


def main(port: str, process: str, out: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process), initialization_timeout=60)
    host = make("gated")
    values = {name: np.asarray(value) for name, value in tensors(host.params).items()}
    for data, dict_ in ((1, 4), (2, 2), (4, 1)):
        mesh = sharding.make_mesh(MeshOptions(data, dict_))
        for limit, name in ((3000, "several"), (1 << 30, "one")):
            saelens.FILE_BYTES, place = limit, out / f"{data}x{dict_}" / name
            saelens.write(place, placed(host, values, mesh))
            barrier("written")
            for key, value in tensors(saelens_read.read(place, mesh).params).items():
                for shard in value.addressable_shards:
                    np.testing.assert_array_equal(shard.data, values[key][shard.index])

    mesh, saelens.FILE_BYTES, place = sharding.make_mesh(MeshOptions(1, 4)), 3000, out / "1x4" / "several"
    bad = values | {"b_enc": np.where(np.arange(64) == 60, np.inf, values["b_enc"]).astype(np.float32)}
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    said = refused(lambda: saelens.write(place, placed(host, bad, mesh)))
    assert ("process 1 stopped" if process == "0" else "b_gate hold NaN or Inf") in said, said
    barrier("not written")
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    barrier("compared")
    last = max(place.glob("sae_weights-*"))
    if process == "0":
        last.write_bytes(before[last.name][:-1] + b"x")
    barrier("altered")
    said = refused(lambda: saelens_read.read(place, mesh))
    assert ("process 1 stopped" if process == "0" else f"{last}: altered since") in said, said
    if process == "0":
        last.write_bytes(before[last.name])
    print("DONE")


def placed(host: SAE, values: dict, mesh) -> SAE:
    where = tensors(param_shardings(mesh, values))
    return SAE(from_tensors({name: sharding.place(value, where[name]) for name, value in values.items()}), host.cfg, mesh)


def refused(action) -> str:
    try:
        action()
    except SaejaxError as error:
        return str(error)
    raise SystemExit("was not refused")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
