"""What bench/compare measured, as SVG: for each task a bar an engine and model; and all ratios to the best peer in one."""
import math
from xml.sax.saxutils import escape

from report import OURS, number, rate, rows_of
from tasks import TASKS

COLOURS = {"lockstep": "#0b6e4f", "lockstep fast": "#6bbf59", "llama.cpp": "#c8553d", "OpenVINO GenAI": "#3d6cc8",
           "transformers": "#b08900", "mlx-lm": "#7a5ca8"}
LEFT, WIDTH, BAR, GAP, SIDE = 150, 480, 15, 12, 250
STYLE = ("text{font:12px sans-serif;fill:#222}.head{font-weight:bold;font-size:14px}.small{font-size:11px;fill:#555}"
         "line{stroke:#bbb}")


def document(height, body):
    width = LEFT + WIDTH + SIDE
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
            f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>' + "".join(body) + "</svg>\n")


def text(x, y, words, kind="", anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def legend(names, y):
    out, x = [], LEFT
    for name in names:
        out.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{COLOURS[name]}"/>' + text(x + 16, y, name))
        x += 34 + 7 * len(name)
    return out


def bars(rows):
    """Grouped by model, each bar with its value and what it means for the machine; the scale is each model's own best."""
    task = rows[0].task
    names = [n for n in task.engines if any(n in r.values for r in rows)]
    body = [text(10, 22, f"{task.heading} ({task.unit}{', less is better' if task.less_is_better else ''})", "head"), *legend(names, 44)]
    y = 62
    for row in rows:
        most = max(row.values.values(), default=1)
        shown = [n for n in names if n in row.values]
        body.append(text(LEFT - 8, y + BAR * max(len(shown), 1) / 2 + 4, row.model, anchor="end"))
        for name in shown:
            length = WIDTH * row.values[name] / most
            body.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{COLOURS[name]}"/>')
            words = " · ".join(filter(None, [number(row.values[name]), rate(row, name)]))
            body.append(text(LEFT + length + 5, y + BAR - 5, words, "small"))
            y += BAR
        y += GAP + (0 if shown else BAR)
    return document(y + 8, body)


def ratios(rows):
    """How many times better than the best peer: one dot a cell, on a logarithmic scale."""
    rows = [r for r in rows if r.ratios]
    every = [x for r in rows for x in r.ratios.values()]
    least, most = min(0.5, *every), max(2.0, *every)
    place = lambda x: LEFT + 70 + (WIDTH - 70) * math.log(x / least) / math.log(most / least)
    names = [n for n in OURS if any(n in r.ratios for r in rows)]
    height = 76 + 16 * len(rows)
    body = [text(10, 22, "Times better than the best peer", "head"), *legend(names, 44)]
    for mark in (m for m in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 100, 300, 1000) if least <= m <= most):
        body.append(f'<line x1="{place(mark):.1f}" x2="{place(mark):.1f}" y1="56" y2="{height - 8}" '
                    f'stroke-width="{2 if mark == 1 else 1}"/>' + text(place(mark), 68, f"{mark:g}", "small", "middle"))
    for at, row in enumerate(rows):
        y = 84 + 16 * at
        body.append(text(LEFT + 56, y + 4, f"{row.task.name}, {row.model}", anchor="end"))
        for name, value in row.ratios.items():
            body.append(f'<circle cx="{place(value):.1f}" cy="{y}" r="5" fill="{COLOURS[name]}"/>')
        body.append(text(LEFT + WIDTH + 14, y + 4, ", ".join(f"{v:.2f}" for v in row.ratios.values()) + f" × {row.best}", "small"))
    return document(height + 8, body)


def write(folder, results):
    rows = rows_of(results)
    for name in TASKS:
        if these := [r for r in rows if r.task.name == name]:
            (folder / f"{name}.svg").write_text(bars(these), encoding="utf-8")
    if any(r.ratios for r in rows):
        (folder / "ratios.svg").write_text(ratios(rows), encoding="utf-8")
