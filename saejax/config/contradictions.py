"""Options that contradict each other, each with the key to change: all of them are reported at once."""

from saejax.base.storage import bucket_trouble
from saejax.config.recipes import INITS, KINDS, PENALTIES, WITH_AUX, WITH_K

PENALTIES_OF = {kind: tuple(name for name, kinds in PENALTIES.items() if kind in kinds) for kind in KINDS}


def contradictions(c) -> list[str]:
    """One line per contradiction of a `Config`, naming keys and fixes."""
    return _of_places(c) + _of_sae(c.sae, c) + _of_data(c) + _of_run(c) + _of_optimizer(c.sae, c.train)


def _of_sae(sae, c) -> list[str]:
    out = _of_shape(sae, c)
    if sae.kind in WITH_K and sae.k > sae.d_sae:
        out.append(f"config.sae.k: {sae.k} active features of config.sae.d_sae = {sae.d_sae}; lower k")
    if sae.unit_decoder and INITS[sae.init].decoder_norm != 1.0:
        out.append(f"config.sae.init: {sae.init!r} starts with decoder rows of norm {INITS[sae.init].decoder_norm:g}, but "
                   "config.sae.unit_decoder keeps them at 1; take 'input_scale', or set config.sae.unit_decoder to False")
    if sae.aux_k and sae.kind not in WITH_AUX:
        out.append(f"config.sae.aux_k: {sae.aux_k}, but AuxK belongs to kinds {', '.join(WITH_AUX)} (dead features of "
                   f"{sae.kind!r} have no positive pre-activation to learn from); set it to 0 and use config.train.resample")
    if sae.k_start and (sae.kind not in WITH_K or not sae.k < sae.k_start <= sae.d_sae):
        out.append(f"config.sae.k_start: {sae.k_start} belongs to kinds with k ({', '.join(WITH_K)}), above config.sae.k = "
                   f"{sae.k} and at most config.sae.d_sae = {sae.d_sae}; set it to None")
    if c.train.target_l0 is not None:
        out += _of_target(sae, c.train.target_l0)
    allowed = PENALTIES_OF[sae.kind] or ("l1",)
    if sae.penalty not in allowed:
        out.append(f"config.sae.penalty: {sae.penalty!r} does not belong to kind {sae.kind!r}; set it to "
                   f"{' or '.join(map(repr, allowed))}")
    if sae.multi_topk and (sae.kind != "topk" or 4 * sae.k > sae.d_sae):
        out.append("config.sae.multi_topk: belongs to kind 'topk' with 4 x config.sae.k <= config.sae.d_sae; turn it off")
    if sae.kind == "batchtopk" and c.train.batch // c.train.accumulate * max(sae.k, sae.k_start or 0) >= 2**31 - 2**16:
        out.append(f"config.train.batch: {c.train.batch} rows with config.sae.k = {sae.k} are more choices than 32 bits count; "
                   "lower one, or raise config.train.accumulate")
    if sae.kind == "jumprelu" and sae.normalize == "none" and None in (sae.bandwidth, sae.threshold_init):
        out.append("config.sae.bandwidth, config.sae.threshold_init: none takes them from the scale of normalised inputs, but "
                   "config.sae.normalize is 'none'; give both")
    if sae.groups and sae.kind not in ("batchtopk", "jumprelu"):
        out.append("config.sae.groups: nested prefixes belong to kind 'batchtopk' or 'jumprelu'; leave it empty")
    if sae.groups and not (abs(sum(sae.groups) - 1) < 1e-6 and min(sae.groups) * sae.d_sae >= 1):
        out.append(f"config.sae.groups: {sae.groups} are not shares that add up to 1 with at least one feature of "
                   f"config.sae.d_sae = {sae.d_sae} each")
    return out


def _of_target(sae, target: float) -> list[str]:
    key = f"config.train.target_l0: {target:g}"
    if sae.kind in WITH_K:
        return [f"{key}, but kind {sae.kind!r} has as many active features as config.sae.k says; set that, and this to None"]
    if sae.penalty == "target_l0":
        return [f"{key}, but the penalty 'target_l0' pulls towards config.sae.k by itself; set that, and this to None"]
    if sae.penalty == "l0":
        return [f"{key}, but the penalty 'l0' with an L0 to aim at is the penalty 'target_l0': set config.sae.penalty to that, "
                "config.sae.k to the L0, and this to None"]
    return [f"{key} active features of config.sae.d_sae = {sae.d_sae}; lower it"] if target > sae.d_sae else []


def _of_shape(sae, c) -> list[str]:
    keys = {"crosscoder" if sae.crosscoder else "hookpoint": sae.sources, "target": (sae.target,) if sae.target else ()}
    out = [f"config.sae.{key}: {name!r} is not harvested; add it to config.harvest.hookpoints ({', '.join(c.harvest.hookpoints)})"
           for key, names in keys.items() for name in names if name not in c.harvest.hookpoints]
    if len(set(sae.crosscoder)) != len(sae.crosscoder) or len(sae.crosscoder) == 1:
        out.append(f"config.sae.crosscoder: {sae.crosscoder} should be at least two different hookpoints; for one hookpoint "
                   "leave it empty and set config.sae.hookpoint")
    if sae.crosscoder and sae.target:
        out.append("config.sae.target: a crosscoder reconstructs the hookpoints that it reads; empty target or crosscoder")
    if sae.target and sae.target == sae.hookpoint:
        out.append(f"config.sae.target: {sae.target!r} is config.sae.hookpoint itself; leave it empty for a plain SAE")
    if sae.target and sae.pre_bias:
        out.append("config.sae.pre_bias: b_dec of a transcoder belongs to its target, its encoder cannot subtract it; set it to "
                   "False")
    if sae.skip and not sae.target:
        out.append("config.sae.skip: a skip connection belongs to a transcoder; set config.sae.target, or skip to False")
    return out


def _of_data(c) -> list[str]:
    out = []
    if c.stream.window_rows < c.stream.block_contexts * c.text.context:
        out.append(f"config.stream.window_rows: {c.stream.window_rows} is less than one block "
                   f"({c.stream.block_contexts} contexts x {c.text.context} tokens); raise it")
    return out


def _of_places(c) -> list[str]:
    places = {"run_dir": c.run_dir, "harvest.store": c.harvest.store, "lm.model": c.lm.model,
              "train.init_from": c.train.init_from}
    places |= {f"text.source[{i}]": source for i, source in enumerate(c.text.source)}
    return [f"config.{key}: {trouble}" for key, place in places.items() if place and (trouble := bucket_trouble(place))]


def _of_run(c) -> list[str]:
    out = []
    if c.train.lr_warmup + c.train.lr_decay > 1.0:
        out.append("config.train.lr_warmup + config.train.lr_decay: together more than the whole run; lower one")
    if c.train.batch % c.train.accumulate:
        out.append(f"config.train.accumulate: {c.train.accumulate} parts do not divide config.train.batch = {c.train.batch}")
    if 0 in (c.mesh.data, c.mesh.dict):
        out.append("config.mesh: data and dict are device counts or -1, not 0")
    return out


def _of_optimizer(sae, train) -> list[str]:
    out = []
    if train.path == "sparse" and sae.kind not in WITH_K:
        out.append(f"config.train.path: 'sparse', but kind {sae.kind!r} has no sparse path; set it to 'auto'")
    if train.path == "sparse" and sae.multi_topk:
        out.append("config.train.path: 'sparse', but config.sae.multi_topk selects again on the dense path; set it to 'auto'")
    if train.lazy:
        every_row = train.optimizer.replace("lazy", "second")
        out += [f"config.train.optimizer: {train.optimizer!r}, but {problem}; or take {every_row!r}"
                for problem in _against_lazy(sae, train)]
    return out


def _against_lazy(sae, train) -> list[str]:
    """What would move, or read, the rows of features that did not fire."""
    term = "the pre-activation loss of the penalty 'tanh'" if sae.penalty == "tanh" else (
        f"the penalty (config.sae.penalty = {sae.penalty!r})")
    reasons = {"jumprelu": f"{term} moves features that do not fire"} | dict.fromkeys(
        ("relu", "gated"), f"kind {sae.kind!r} has no sparse path, gradients of every row are computed anyway")
    out = [f"{reasons[sae.kind]}; take kind {' or '.join(WITH_K)}"] if sae.kind in reasons else []
    if train.ema:
        out.append(f"config.train.ema = {train.ema:g} moves the mean of every row; set it to 0")
    if train.path == "dense":
        out.append("config.train.path = 'dense' computes gradients of every row; set it to 'auto'")
    if sae.multi_topk:
        out.append("config.sae.multi_topk selects again on the dense path; set it to False")
    return out
