"""Options that contradict each other, each with the key to change: all of them are reported at once."""

from saejax.config.recipes import WITH_AUX, WITH_K


def contradictions(c) -> list[str]:
    """One line per contradiction of a `Config`, naming keys and fixes."""
    return _of_sae(c.sae, c) + _of_data(c) + _of_run(c) + _of_optimizer(c.sae, c.train)


def _of_sae(sae, c) -> list[str]:
    out = _of_shape(sae, c)
    if sae.kind in WITH_K and sae.k > sae.d_sae:
        out.append(f"config.sae.k: {sae.k} active features of config.sae.d_sae = {sae.d_sae}; lower k")
    if sae.unit_decoder and sae.decoder_init_norm != 1.0:
        out.append("config.sae.decoder_init_norm: must be 1.0 while config.sae.unit_decoder is set")
    if sae.aux_k and sae.kind not in WITH_AUX:
        out.append(f"config.sae.aux_k: {sae.aux_k}, but AuxK belongs to kinds {', '.join(WITH_AUX)} (dead features of "
                   f"{sae.kind!r} have no positive pre-activation to learn from); set it to 0 and use config.train.resample")
    if sae.k_start and (sae.kind not in WITH_K or not sae.k < sae.k_start <= sae.d_sae):
        out.append(f"config.sae.k_start: {sae.k_start} belongs to kinds with k ({', '.join(WITH_K)}), above config.sae.k = "
                   f"{sae.k} and at most config.sae.d_sae = {sae.d_sae}; set it to 0")
    if sae.align and not sae.unit_decoder:
        out.append("config.sae.align: needs unit decoder rows; set config.sae.unit_decoder, or align to False")
    if sae.align and sae.encoder_init_scale != 1:
        out.append("config.sae.align: fixes the scale of the encoder; set it to False, or config.sae.encoder_init_scale to 1")
    if sae.align and sae.target:
        out.append("config.sae.align: encoder and decoder rows of a transcoder live in different spaces; set it to False")
    if c.train.target_l0 > sae.d_sae:
        out.append(f"config.train.target_l0: {c.train.target_l0:g} active features of config.sae.d_sae = {sae.d_sae}; lower it")
    if sae.kind == "jumprelu" and sae.objective == "target_l0" and not c.train.target_l0:
        out.append("config.train.target_l0: 0, but jumprelu's objective 'target_l0' needs an L0 to aim at; give one, or set "
                   "config.sae.objective to 'l0' or 'tanh'")
    if sae.penalty != "l1" and sae.kind != "relu":
        out.append(f"config.sae.penalty: {sae.penalty!r} belongs to kind 'relu'; set it to 'l1'")
    if sae.multi_topk and (sae.kind != "topk" or 4 * sae.k > sae.d_sae):
        out.append("config.sae.multi_topk: belongs to kind 'topk' with 4 x config.sae.k <= config.sae.d_sae; turn it off")
    if sae.kind == "batchtopk" and c.train.batch // c.train.accumulate * max(sae.k, sae.k_start) >= 2**31 - 2**16:
        out.append(f"config.train.batch: {c.train.batch} rows with config.sae.k = {sae.k} are more choices than 32 bits count; "
                   "lower one, or raise config.train.accumulate")
    if sae.kind == "jumprelu" and sae.normalize == "none" and not (sae.bandwidth and sae.threshold_init):
        out.append("config.sae.bandwidth, config.sae.threshold_init: 0 takes them from the scale of normalised inputs, but "
                   "config.sae.normalize is 'none'; give both")
    if sae.groups and sae.kind not in ("batchtopk", "jumprelu"):
        out.append("config.sae.groups: nested prefixes belong to kind 'batchtopk' or 'jumprelu'; leave it empty")
    if sae.groups and not (abs(sum(sae.groups) - 1) < 1e-6 and min(sae.groups) * sae.d_sae >= 1):
        out.append(f"config.sae.groups: {sae.groups} are not shares that add up to 1 with at least one feature of "
                   f"config.sae.d_sae = {sae.d_sae} each")
    if sae.frequency_coef and (sae.kind != "jumprelu" or sae.objective == "tanh"):
        out.append("config.sae.frequency_coef: belongs to kind 'jumprelu' with objective 'l0' or 'target_l0'; set it to 0")
    return out


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
    rows = c.harvest.shard_contexts * c.text.context
    if rows % c.harvest.chunk_rows:
        out.append(f"config.harvest.chunk_rows: {c.harvest.chunk_rows} does not divide the rows of a shard "
                   f"(harvest.shard_contexts x text.context = {rows})")
    if c.harvest.shard_contexts % c.stream.block_contexts:
        out.append(f"config.stream.block_contexts: {c.stream.block_contexts} does not divide "
                   f"config.harvest.shard_contexts = {c.harvest.shard_contexts}")
    if c.stream.window_rows < c.stream.block_contexts * c.text.context:
        out.append(f"config.stream.window_rows: {c.stream.window_rows} is less than one block "
                   f"({c.stream.block_contexts} contexts x {c.text.context} tokens); raise it")
    return out


def _of_run(c) -> list[str]:
    out = []
    if c.train.lr_warmup + c.train.lr_decay > 1.0:
        out.append("config.train.lr_warmup + config.train.lr_decay: together more than the whole run; lower one")
    if c.train.batch % c.train.accumulate:
        out.append(f"config.train.accumulate: {c.train.accumulate} parts do not divide config.train.batch = {c.train.batch}")
    if 0 in (c.mesh.data, c.mesh.dict):
        out.append("config.mesh: data and dict are device counts or -1, not 0")
    if c.lm.mesh.data == 0:
        out.append("config.lm.mesh.data: a device count or -1, not 0")
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
    term = "the pre-activation loss (config.sae.pre_act_coef)" if sae.objective == "tanh" else (
        f"the sparsity term (config.sae.objective = {sae.objective!r})")
    reasons = {"jumprelu": f"{term} moves features that do not fire"} | dict.fromkeys(
        ("relu", "gated"), f"kind {sae.kind!r} has no sparse path, gradients of every row are computed anyway")
    out = [f"{reasons[sae.kind]}; take kind {' or '.join(WITH_K)}"] if sae.kind in reasons else []
    if train.ema:
        out.append(f"config.train.ema = {train.ema:g} moves the mean of every row; set it to 0")
    if train.path == "dense":
        out.append("config.train.path = 'dense' computes gradients of every row; set it to 'auto'")
    if sae.multi_topk:
        out.append("config.sae.multi_topk selects again on the dense path; set it to False")
    if sae.align:
        out.append("config.sae.align moves the encoder row of every feature; set it to False")
    return out
