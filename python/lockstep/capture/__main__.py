"""Captures a reference engine's tensors as a trace that `lockstep diff` reads.

    python -m lockstep.capture --engine transformers --model M (--ids 1,2,3 | --ids-file F) --steps 8 -o DIR

M: a Hugging Face folder or a .gguf file (computed on its dequantised weights in f32); for mlx-lm a folder. Decode steps
are greedy, or those of another trace (--follow). With transformers the noise floor is measured too, DIR/floor.json. Sequences divided by ";" are
run one after the other and are the rows of one trace.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path


def main():
    p = argparse.ArgumentParser(prog="python -m lockstep.capture", description=__doc__.split("\n")[0],
                                epilog="see docs/trace-format.md for the format")
    p.add_argument("--engine", choices=["transformers", "mlx-lm"], default="transformers")
    p.add_argument("--model", required=True)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--ids", help="token ids divided by commas; several sequences divided by ;")
    source.add_argument("--ids-file", type=Path)
    source.add_argument("--follow", type=Path, help="the tokens of this trace, decode steps included")
    p.add_argument("--steps", type=int, default=0, help="decode steps after the prompt")
    p.add_argument("--level", type=int, choices=[0, 1, 2], default=2, help="0: logits, 1: layers, 2: every operation")
    p.add_argument("--no-floor", action="store_true", help="do not measure the noise floor")
    p.add_argument("-o", "--out", type=Path, required=True)
    options = p.parse_args()
    floor = options.engine == "transformers" and not options.no_floor
    if options.follow:
        rows = json.loads((options.follow / "manifest.json").read_text())["rows"]
        capture(options.model, [r["ids"] for r in rows], [r["fed"] for r in rows], options.level, options.out, floor,
                options.engine)
        return
    text = options.ids if options.ids is not None else options.ids_file.read_text()
    try:
        prompts = [[int(i) for i in part.replace(",", " ").split()] for part in text.split(";")]
    except ValueError as error:
        sys.exit(f"--ids: {error}")
    if not all(prompts):
        sys.exit("--ids: expected at least one id a sequence")
    capture(options.model, prompts, options.steps, options.level, options.out, floor, options.engine)


def capture(path, prompts, steps, level, out, floor, name="transformers"):
    """prompts: list of id lists. steps: decode steps, or a list of the ids to feed for each prompt."""
    from .trace import LEVELS, Writer
    engine = importlib.import_module({"transformers": ".transformers_engine", "mlx-lm": ".mlx_engine"}[name], __package__)
    model, taps = engine.load(path)
    writer = Writer(out)
    rows, seen = [], set()
    for row, prompt in enumerate(prompts):
        def sink(phase, step, position, layer, site, x):
            if site in LEVELS[level]:
                seen.add(site)
                writer.add(phase, step, row, position, layer, site, x)
        fed = engine.run(model, taps, prompt, steps if isinstance(steps, int) else steps[row], sink)
        rows.append({"ids": list(map(int, prompt)), "fed": fed})
    writer.finish({**engine.facts(path, model), "level": level, "rows": rows, "sites": sorted(seen)})
    if floor:
        from . import floor as noise
        floors = noise.measure(model, taps, [(r["ids"], r["fed"]) for r in rows])
        (Path(out) / "floor.json").write_text(json.dumps({"format": "lockstep-floor", "version": 1, "policies": floors}) + "\n")
    print(f"{out}: {len(rows)} sequences, {writer.seq} tensors")


if __name__ == "__main__":
    main()
