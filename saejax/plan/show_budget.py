"""A recommendation for a budget as a table for people."""

from saejax.base.text import visible
from saejax.plan.show import columns, duration, number


def budget_table(found: dict) -> str:
    """Label and value in two columns: the budget, what to train, what that rests on."""
    return columns([_budget(found), _recommended(found), _law(found)])


def _budget(found: dict) -> list[tuple[str, str]]:
    budget, at, law = found["budget"], found["topology"], found["law"]
    out = [("budget", budget["given"] + _bought(budget, at)),
           ("  as FLOPs of the law", f"{budget['compute']:.3g} {law['compute']} FLOPs")]
    if at:
        mesh = at["mesh"]
        out += [("topology", f"{at['name']}, mesh {mesh['data']} x {mesh['dict']} (data x dict)"),
                ("  step, predicted", f"{duration(at['step_seconds'])}, {number(at['tokens_per_second'])} tokens/s; the run "
                                      f"takes {duration(at['seconds'])}"),
                ("  bytes per chip", f"{number(at['bytes_per_chip'], 'B')} of {number(at['usable'], 'B')}")]
    return out


def _bought(budget: dict, at: dict | None) -> str:
    if budget["seconds"] is None:
        return ""
    price = f" at {budget['price']:g} each: {duration(budget['seconds'])}" if budget["price"] else ""
    return f" on {at['name']}, {number(budget['chip_hours'])} chip hours{price}"


def _recommended(found: dict) -> list[tuple[str, str]]:
    what, best = found["recommended"], found["optimum"]
    features, steps = best["features"], best["steps"]
    out = [("features", f"{what['features']:,} (the law {_size(features)})"),
           ("steps", f"{what['steps']:,} (the law {_size(steps)})"),
           ("tokens", f"{what['tokens']:,}{_harvest(found['harvest'])}"),
           ("loss", _loss(what["loss"])), ("learning rate", _rate(found))]
    out += [("k", _k(found))] if what["k"] else []
    if limit := found["without_memory_limit"]:
        out.append(("memory", f"{limit['features']:,} features with {limit['steps']:,} steps would reach {limit['loss']:.4g} and "
                              f"do not fit: {number(limit['bytes_per_chip'], 'B')} per chip"))
    return [*out, ("to set", f"config.sae.d_sae={what['features']} config.train.tokens={what['tokens']} "
                             f"config.train.lr={what['lr']['value']:.3g}")]


def _harvest(harvest: dict) -> str:
    passes = harvest["passes"]
    here = "" if passes <= 1 else f"; the {harvest['config_tokens']:,} of config.harvest.tokens would be read {passes:.3g} times"
    return f" in one epoch{here}"


def _rate(found: dict) -> str:
    rate, law, own = found["recommended"]["lr"], found["law"], found["sae"]["lr"]
    if rate["by"] == "law":
        text = f"{rate['value']:.3g} (90 %: {rate['low']:.3g} to {rate['high']:.3g}), by the law of the learning rate, "
        return text + _where(rate["decades"], "its sweeps") + f"; the loss above is that of {law['lr']:.3g}"
    other = "" if own == law["lr"] else f"; the config has {own:.3g}, of which the law says nothing"
    return f"{rate['value']:.3g}, that of the law's runs; there is no law of it{other}"


def _k(found: dict) -> str:
    k, there = found["recommended"]["k"], found["law"]["k"]
    if len(there) == 1:
        return f"{k}, the config's and that of the law's runs: it was not chosen here"
    return (f"{k}, the config's, of {', '.join(map(str, there))}: loss alone cannot choose it, since it always falls as more "
            "features are kept")


def _law(found: dict) -> list[tuple[str, str]]:
    law = found["law"]
    low, high = law["fitted_range"]
    beyond = [f"{name} by {law[name + '_decades']:.1f}" for name in ("features", "steps") if law[name + "_decades"]]
    out = [("the law", f"{law['points']} runs, batch {law['batch']:,}, learning rate {law['lr']:.3g}; loss: "
                       f"{visible(law['loss_name'], 100)}"),
           ("  here", _where(law["decades"], f"the fitted budgets, {low:.3g} to {high:.3g} {law['compute']} FLOPs"))]
    if beyond:
        out.append(("  outside of the runs", f"{', '.join(beyond)} decades"))
    if law["differs"]:
        out.append(("  differs in", visible("; ".join(law["differs"]), 300)))
    out += [(f"  best of these FLOPs, {one['by']}", f"{_short(one['features'])} features, {_short(one['steps'])} steps, loss "
             f"{one['loss']['value']:.4g}{'' if one['offset'] else ' (no offset was fitted: too low far out)'}")
            for one in found["same_flops"]]
    return out + [("", visible(why, 300)) for why in law["refused"]]


def _where(decades: float, what: str) -> str:
    return f"extrapolated by {decades:.1f} decades beyond {what}" if decades else f"inside {what}"


def _size(e: dict) -> str:
    return f"{e['value']:,.0f}; 90 %: {e['low']:,.0f} to {e['high']:,.0f}"


def _short(e: dict) -> str:
    return f"{number(e['value'])} ({number(e['low'])} to {number(e['high'])})"


def _loss(e: dict) -> str:
    return f"{e['value']:.4g} (90 %: {e['low']:.4g} to {e['high']:.4g})"
