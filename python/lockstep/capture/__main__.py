"""Captures a reference engine's tensors as a trace that `lockstep diff` reads.

    python -m lockstep.capture --engine transformers --model M (--ids 1,2,3 | --ids-file F) --steps 8 -o DIR

M: a Hugging Face folder or a .gguf file (computed on its dequantised weights in f32). Decode steps are greedy, or feed
--feed. With --floor (default) the noise floor is measured too and lies in DIR/floor.json. Sequences divided by ";" are
run one after the other and are the rows of one trace.
"""
import argparse
import json
import sys
from pathlib import Path


def main():
    p = argparse.ArgumentParser(prog="python -m lockstep.capture", description=__doc__.split("\n")[0],
                                epilog="see docs/trace-format.md for the format")
    p.add_argument("--engine", choices=["transformers"], default="transformers")
    p.add_argument("--model", required=True)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--ids", help="token ids divided by commas; several sequences divided by ;")
    source.add_argument("--ids-file", type=Path)
    p.add_argument("--steps", type=int, default=0, help="decode steps after the prompt")
    p.add_argument("--level", type=int, choices=[0, 1, 2], default=2, help="0: logits, 1: layers, 2: every operation")
    p.add_argument("--no-floor", action="store_true", help="do not measure the noise floor")
    p.add_argument("-o", "--out", type=Path, required=True)
    options = p.parse_args()
    text = options.ids if options.ids is not None else options.ids_file.read_text()
    try:
        prompts = [[int(i) for i in part.replace(",", " ").split()] for part in text.split(";")]
    except ValueError as error:
        sys.exit(f"--ids: {error}")
    if not all(prompts):
        sys.exit("--ids: expected at least one id a sequence")
    capture(options.model, prompts, options.steps, options.level, options.out, not options.no_floor)


def capture(path, prompts, steps, level, out, floor):
    """prompts: list of id lists. steps: decode steps, or a list of the ids to feed for each prompt."""
    from . import floor as noise
    from . import transformers_engine as engine
    from .trace import LEVELS, Writer
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
        floors = noise.measure(model, taps, [(r["ids"], r["fed"]) for r in rows])
        (Path(out) / "floor.json").write_text(json.dumps({"format": "lockstep-floor", "version": 1, "policies": floors}) + "\n")
    print(f"{out}: {len(rows)} sequences, {writer.seq} tensors")


if __name__ == "__main__":
    main()
