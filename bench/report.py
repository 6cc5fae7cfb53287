"""What bench/compare measured, as figures (Row) and as tables in Markdown."""
import dataclasses
import statistics
from dataclasses import dataclass

from tasks import TASKS

OURS = ("lockstep", "lockstep fast")


@dataclass
class Row:
    """One cell's figures. Values are medians in the task's unit."""
    task: object
    model: str
    values: dict     # engine -> median
    spread: dict     # engine -> (least, most)
    why: dict        # engine -> why it has no value
    asked: dict      # engine -> what it was asked where that is less than the task says
    setting: dict
    ratios: dict     # ours -> the median of its rounds' ratios to the best peer; above 1: we are better
    best: str | None    # peer
    limits: dict
    per_token: float | None    # GB read, or Gop of products with stored weights
    sweep: int


def row_of(cell):
    task = dataclasses.replace(TASKS[cell["task"]], **cell["numbers"])
    entries = cell["engines"]
    samples = {name: entry["samples"] for name, entry in entries.items() if entry.get("samples")}
    numbers = {name: [s["value"] for s in these] for name, these in samples.items()}
    values = {name: statistics.median(these) for name, these in numbers.items()}
    peers = {name: value for name, value in values.items() if name not in OURS}
    best = (min if task.less_is_better else max)(peers, key=peers.get) if peers else None
    ratio = lambda ours, theirs: theirs / ours if task.less_is_better else ours / theirs
    ratios = {name: statistics.median(map(ratio, numbers[name], numbers[best])) for name in OURS if name in values and best}
    ours = [s for name in OURS for s in samples.get(name, [])]
    limits = [s["limits"] for s in ours if "limits" in s]
    per_token = [s[key] for s in ours for key in ("gb_per_token", "gop_per_token") if key in s]
    wanted = {"prefill": task.prefill, "memory": 300}.get(task.kind, 1)
    asked = {name: s[0]["asked"] for name, s in samples.items() if "asked" in s[0]}
    return Row(task, cell["model"], values, {n: (min(v), max(v)) for n, v in numbers.items()},
               {n: e["why"] for n, e in entries.items() if "why" in e},
               {n: a["prefill"] for n, a in asked.items() if a["prefill"] < wanted},
               {n: e["setting"] for n, e in entries.items() if e.get("setting")}, ratios, best,
               {key: statistics.median(l[key] for l in limits) for key in limits[0]} if limits else {},
               statistics.median(per_token) if per_token else None, sum(len(e.get("sweep", [])) for e in entries.values()))


def rows_of(results):
    return [row_of(cell) for cell in results["cells"]]


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rate(row, name):
    """What a speed means for the machine: "41.2 GB/s, 89 % of read"; empty where it is not defined."""
    if row.per_token is None or name not in row.values:
        return ""
    speed = row.values[name] * row.per_token
    if row.task.kind != "prefill":
        share = f", {speed / row.limits['read_gbs']:.0%} of read" if row.limits else ""
        return f"{speed:.1f} GB/s{share}"
    kinds = ("f32", "bf16") if row.model.endswith(("-bf16", "-hf")) else ("int8",)
    shares = [f"{speed / row.limits[k + '_gops']:.0%} of {k}" for k in kinds if row.limits and row.limits[k + "_gops"]]
    return ", ".join([f"{number(speed)} Gop/s", *shares])


def cell_text(row, name, idle):
    if name not in row.values:
        return row.why.get(name, "")
    least, most = row.spread[name]
    text = f"**{number(row.values[name])}** ({number(least)}–{number(most)})"
    extra = [rate(row, name)]
    if name in row.asked:
        extra.append(f"{row.asked[name]} tokens")
    if row.task.busy and (alone := idle.get((row.model, row.task.threads, name))):
        extra.append(f"keeps {row.values[name] / alone:.0%}")
    return "<br>".join([text, *filter(None, extra)])


def table(rows, idle):
    task = rows[0].task
    names = [n for n in task.engines if any(n in r.values for r in rows)]
    ours = [n for n in names if n in OURS]
    head = ["model", *names, *(f"{n} ÷ best peer" for n in ours)]
    lines = [f"## {task.heading}", "", f"{task.unit}, median (least–most)", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        ratios = [f"**{row.ratios[n]:.2f}** ({row.best})" if n in row.ratios else "" for n in ours]
        lines.append("| " + " | ".join([row.model, *(cell_text(row, n, idle).replace("|", "/") for n in names), *ratios]) + " |")
    absent = {n: rows[0].why[n] for n in task.engines if n not in names and n in rows[0].why}
    if absent:
        lines += ["", "Not there: " + "; ".join(f"{n}: {why}" for n, why in absent.items()) + "."]
    return lines


def limits_table(rows):
    """Medians over all cells, by number of threads."""
    of = {}
    for row in rows:
        if row.limits:
            of.setdefault(row.task.threads, []).append(row.limits)
    lines = ["## Limits of the machine", "", "| threads | read, GB/s | int8, Gop/s | bf16, Gop/s | f32, Gop/s |", "|---|---|---|---|---|"]
    for threads, these in sorted(of.items()):
        middle = [statistics.median(each[k] for each in these) for k in ("read_gbs", "int8_gops", "bf16_gops", "f32_gops")]
        lines.append(f"| {threads} | " + " | ".join(f"{m:,.0f}" if m >= 100 else f"{m:,.1f}" if m else "none" for m in middle) + " |")
    return lines if of else []


def settings_table(rows):
    lines = ["## Settings chosen", "", "The best of a sweep, one axis after the other; every try is in compare.json.", "",
             "| task | model | engine | setting |", "|---|---|---|---|"]
    for row in rows:
        for name, setting in row.setting.items():
            lines.append(f"| {row.task.name} | {row.model} | {name} | {', '.join(f'{k} {v}' for k, v in setting.items())} |")
    return lines


def write(path, results):
    rows, about = rows_of(results), results["about"]
    idle = {(r.model, r.task.threads, n): v for r in rows if r.task.kind == "decode" and not (r.task.busy or r.task.depth)
            for n, v in r.values.items()}
    lines = ["# lockstep beside its peers", "",
             f"{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB, Linux {about['kernel']}; {about['date']}; "
             f"lockstep {about['commit']}; llama-cpp-python {about['versions'].get('llama_cpp_python', '?')}, OpenVINO GenAI "
             f"{about['versions'].get('openvino_genai', '?')}; {about['threads']} threads unless said, {about['rounds']} rounds, interleaved.", ""]
    if about["quick"]:
        lines += ["**A quick run: few tokens, few rounds, no sweep. Not for quoting.**", ""]
    for name in TASKS:
        if these := [r for r in rows if r.task.name == name]:
            lines += [*table(these, idle), ""]
    lines += [*limits_table(rows), "", *settings_table(rows), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
