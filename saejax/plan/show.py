"""A plan as a table for people and as JSON for programs."""

import json
from collections.abc import Iterator

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def as_json(plan: dict) -> str:
    """The plan as it is, keys in order of meaning."""
    return json.dumps(plan, indent=1)


def as_table(plan: dict) -> str:
    """Label and value in two columns, section by section."""
    sections = [_experiment(plan)]
    if "topology" in plan:
        sections += [_memory(plan), _traffic(plan), _time(plan), _checkpoint(plan)]
    if "compiled" in plan:
        sections.append(_compiled(plan))
    return f"{columns(sections)}\n\n{_fits(plan)}"


def columns(sections: list[list[tuple[str, str]]]) -> str:
    """Labels in one column, values in the other, an empty line between sections."""
    width = max(len(label) for section in sections for label, _ in section) + 2
    return "\n\n".join("\n".join(f"{label:<{width}}{value}" for label, value in section) for section in sections)


def number(value: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"; three significant digits."""
    for size, name in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {name}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """93784.0 -> "1.09 days"."""
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds * 1e3:.3g} ms"


def _experiment(plan: dict) -> list[tuple[str, str]]:
    sae, harvest = plan["sae"], plan["harvest"]
    k = f", k = {sae['k']}" if sae["k"] else ""
    out = [("SAE", f"{sae['kind']} {sae['shape']}{k}, {sae['d_in']} -> {sae['d_sae']:,} features"),
           ("parameters", f"{number(sae['parameters'])}, {sae['state_bytes_per_parameter']:.3g} B of state each"),
           ("batch, tokens", f"{sae['batch']:,}, {sae['tokens']:,}"),
           ("store", f"{number(harvest['store_bytes'], 'B')} in {harvest['shards']:,} shards "
                     f"({harvest['store_tokens']:,} tokens, read {harvest['passes']:.3g} times)"),
           ("  a host of harvest holds", number(harvest["host_bytes"], "B"))]
    if "lm_flops_per_token" in harvest:
        out.append(("harvest", f"{number(harvest['lm_flops_per_token'], 'FLOP')} per token of {harvest['model']}, "
                               f"{harvest['share_of_flops']:.0%} of all FLOPs"
                               + (f"; about {duration(harvest['seconds'])} here" if "seconds" in harvest else "")))
    if "stage_seconds" in harvest:
        stages = ", ".join(f"{name} {duration(value)}" for name, value in harvest["stage_seconds"].items())
        out.append(("  its stages", f"{stages}; slowest is the {harvest['slowest']}"))
    return out


def _memory(plan: dict) -> list[tuple[str, str]]:
    at, memory = plan["topology"], plan["memory"]
    mesh = f"{at['mesh']['data']} x {at['mesh']['dict']} (data x dict), {at['path']} path"
    if "best" in at:
        mesh += (f"; the model would take {at['best']['data']} x {at['best']['dict']} "
                 f"({number(at['best']['tokens_per_second'])} tokens/s)")
    return [("topology", f"{at['name']}, {at['chips']} chip{'s' if at['chips'] > 1 else ''}"), ("mesh", mesh),
            ("bytes per chip", f"{number(memory['total'], 'B')} of {number(memory['usable'], 'B')}"),
            *((f"  {name}", number(size, "B")) for name, size in memory["by_kind"].items())]


def _traffic(plan: dict) -> list[tuple[str, str]]:
    flops, out = plan["flops"], []
    out.append(("FLOPs per token", f"{number(flops['per_token'])}; {number(flops['per_step_per_chip'])} per step and chip"))
    for c in plan["collectives"]:
        out.append((f"  {c['what']}", f"{number(c['bytes'], 'B')}, {c['kind']} along {c['axis']}"))
    total = sum(plan["collective_bytes"].values())
    return [out[0], ("moved per step and chip", number(total, "B")), *out[1:]]


def _time(plan: dict) -> list[tuple[str, str]]:
    time = plan["time"]
    peak = duration(time["step_seconds_at_peak"])
    return [("step, roofline", f"{duration(time['step_seconds'])}, most of it {time['bound']}; {peak} at the vendor's peak"),
            *((f"  {name}", duration(value)) for name, value in time["seconds"].items() if value),
            *((("  AuxK, not in the sum", _dead(time["aux_seconds"])),) if time["aux_seconds"] else ()),
            ("tokens/s", number(time["tokens_per_second"])),
            ("store is read at", f"{number(time['store_bytes_per_second'], 'B')}/s, {_input(time['input'])}"),
            ("a batch is drawn from", f"{time['input']['contexts_of_a_batch']:,} contexts"),
            ("training takes", f"{duration(time['days'] * 86_400)} ({time['steps']:,} steps)")]


def _checkpoint(plan: dict) -> list[tuple[str, str]]:
    saved = plan["checkpoint"]
    return [("checkpoint", f"{number(saved['bytes'], 'B')}, written in {duration(saved['write_seconds'])}; the step waits "
                           f"{duration(saved['stall_seconds'])}"),
            ("  saved every", f"{duration(saved['interval_seconds'])}; with a failure every "
                              f"{duration(saved['failure_seconds'])}, {saved['lost']:.2%} of the time is lost"),
            ("  least is lost", f"{saved['best_lost']:.2%}, with config.checkpoint.every_tokens = "
                                f"{saved['best_every_tokens']:.1e}".replace("e+0", "e"))]


def _input(read: dict) -> str:
    over = f", rows read {read['read_over']:.2f} times" if read["read_over"] > 1 else ""
    by = (f"{number(read['bytes_per_second_and_host'], 'B')}/s by each of {read['hosts']} hosts ({read['lanes']} lanes{over})"
          if read["hosts"] > 1 else "by one host")
    return f"{by}, which holds {number(read['host_bytes'], 'B')}"


def _dead(seconds: dict[str, float]) -> str:
    *rooms, last = seconds.items()
    parts = [f"{duration(value)} up to {int(most):,} dead" for most, value in rooms]
    return ", ".join([*parts, f"{duration(last[1])} with more"])


def _compiled(plan: dict) -> list[tuple[str, str]]:
    found = plan["compiled"]
    if "refused" in found:
        return [("compiled", f"refused: {found['refused']} ({found['seconds_to_compile']:.0f} s)")]
    memory, estimate = found["memory"], found["step_seconds"]
    peak, total = found["peak_bytes"], plan["memory"]["total"]
    return [("compiled", f"in {found['seconds_to_compile']:.0f} s"),
            ("  bytes per chip, at the peak", f"{number(peak, 'B')} (analytic {number(total, 'B')})"),
            *((f"    {name}", number(size, "B")) for name, size in memory.items()),
            ("  step, compiler's estimate", duration(estimate) if estimate else "none (the program has loops)"),
            *((f"  moved along {axis}", f"{number(size, 'B')}{_beside(plan, axis)}")
              for axis, size in found["collective_bytes"].items() if size)]


def _beside(plan: dict, axis: str) -> str:
    expected = plan["collective_bytes"].get(axis)
    return f" (analytic {number(expected, 'B')})" if expected else ""


def _fits(plan: dict) -> str:
    head = ("smallest that fit", "mesh", "GB per chip", "tokens/s", "training takes")
    lines = [head, *_options(plan)]
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(head))]
    return "\n".join("".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _options(plan: dict) -> Iterator[tuple[str, ...]]:
    for option in plan["fits"]:
        mesh = option["mesh"]
        yield (option["topology"], f"{mesh['data']} x {mesh['dict']}", f"{option['bytes_per_chip'] / 1e9:.3g}",
               number(option["tokens_per_second"]), duration(option["days"] * 86_400))
