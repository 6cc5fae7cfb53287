"""Captures a reference engine's tensors as a trace that `lockstep diff` reads.

    python -m lockstep.capture --engine transformers --model M (--ids 1,2,3 | --ids-file F) --steps 8 -o DIR

M: a Hugging Face or MLX folder or a .gguf file. transformers computes on the dequantised weights in f32, and the noise
floor is measured too (DIR/floor.json); mlx-lm reads folders, llama.cpp .gguf files. Decode steps are greedy, or those of
another trace (--follow). Sequences divided by ";" are run one after the other and are the rows of one trace.
"""
import argparse
import importlib
import json
import signal
import sys
from pathlib import Path

ENGINES = {"transformers": ".transformers_engine", "mlx-lm": ".mlx_engine", "llama.cpp": ".llama_cpp_engine"}


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # by way of `discard`
    p = argparse.ArgumentParser(prog="python -m lockstep.capture", description=__doc__.split("\n")[0],
                                epilog="Run with PYTHONPATH=python and the interpreter of scripts/reference-env. "
                                "The format: docs/trace-format.md.")
    p.add_argument("--engine", choices=ENGINES, default="transformers")
    p.add_argument("--model", required=True)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--ids", help="token ids divided by commas; several sequences divided by ;")
    source.add_argument("--ids-file", type=Path)
    source.add_argument("--follow", type=Path, help="the tokens of this trace, decode steps included")
    p.add_argument("--steps", type=int, default=0, help="decode steps after the prompt")
    p.add_argument("--level", type=int, choices=[0, 1, 2, 3],
                   help="0: logits, 1: layers, 2: every operation, 3: scores and experts too; default: 2, or that of --follow")
    p.add_argument("--layers", help="only the sites of these layers: N or FIRST-LAST")
    p.add_argument("--store", default="full", help="of each row keep all (full), some columns (sample:N) or random sums (sketch:N)")
    p.add_argument("--seed", type=int, default=0, help="of sample and sketch; must be that of the other trace")
    p.add_argument("--no-floor", action="store_true", help="do not measure the noise floor")
    p.add_argument("--break", dest="fault", choices=["rope-head-0"],
                   help="compute wrongly on purpose (transformers): rope-head-0 rotates only head 0 in decode")
    p.add_argument("-o", "--out", type=Path, required=True)
    options = p.parse_args()
    if options.fault and options.engine != "transformers":
        p.error("--break: only --engine transformers can be broken")
    from . import storage
    try:
        kept = storage.parse(options.store, options.seed)
        layers = parse_layers(options.layers) if options.layers else None
    except ValueError as error:
        p.error(str(error))
    from .trace import check_folder
    try:
        check_folder(options.out)
    except ValueError as error:
        p.error(f"-o: {error}")
    if options.follow and options.out.exists() and options.follow.exists() and options.out.samefile(options.follow):
        p.error("-o: expected another folder than --follow")
    if options.steps < 0:
        p.error(f"--steps: expected 0 or more, got {options.steps}")
    if not Path(options.model).exists():
        p.error(f"--model: expected a folder or a .gguf file, got {options.model}")
    level = 2
    if options.follow:
        try:
            followed = json.loads((options.follow / "manifest.json").read_text())
            prompts, steps = [r["ids"] for r in followed["rows"]], [r["fed"] for r in followed["rows"]]
            level = followed["level"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            p.error(f"--follow: expected a trace, got {options.follow} ({type(error).__name__}: {error})")
    else:
        try:
            text = options.ids if options.ids is not None else options.ids_file.read_text()
        except (OSError, ValueError) as error:
            p.error(f"--ids-file: {error}")
        try:
            prompts = [[int(i) for i in part.replace(",", " ").split()] for part in text.split(";")]
        except ValueError as error:
            p.error(f"--ids: {error}")
        if not all(prompts):
            p.error("--ids: expected at least one id a sequence")
        steps = options.steps
    floor = options.engine == "transformers" and not options.no_floor and not options.fault
    capture(options.model, prompts, steps, level if options.level is None else options.level, options.out, floor, options.engine, kept, layers, options.fault)


def parse_layers(text):
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
        raise ValueError(f"--layers: expected N or FIRST-LAST, got {text}")
    return range(int(first), int(last or first) + 1)


def capture(path, prompts, steps, level, out, floor, name="transformers", kept=None, layers=None, fault=None):
    """prompts: list of id lists. steps: decode steps, or a list of the ids to feed for each prompt."""
    from . import storage
    from .trace import LEVELS, Writer
    engine = importlib.import_module(ENGINES[name], __package__)
    try:
        model, taps = engine.load(path)
    except Exception as error:    # of many libraries
        sys.exit(f"{path}: {name} cannot load it: {type(error).__name__}: " + str(error).strip().split("\n")[0])
    if fault:
        taps.fault = fault
    for row, prompt in enumerate(prompts):
        for token in [*prompt, *([] if isinstance(steps, int) else steps[row])]:
            if not 0 <= token < taps.vocab:
                sys.exit(f"{path}: expected token ids from 0 to {taps.vocab - 1}, got {token} in sequence {row}")
    writer = Writer(out, kept or storage.FULL)
    rows, seen = [], set()

    def wanted(layer, site):
        return site in LEVELS[level] and (layers is None or layer in layers)

    try:
        for row, prompt in enumerate(prompts):
            def sink(phase, step, position, layer, site, x):
                if wanted(layer, site):
                    seen.add(site)
                    writer.add(phase, step, row, position, layer, site, x)
            fed = engine.run(model, taps, prompt, steps if isinstance(steps, int) else steps[row], sink)
            rows.append({"ids": list(map(int, prompt)), "fed": fed})
        if not writer.seq:
            sys.exit(f"{out}: no site of level {level} lies in these layers")
        facts = engine.facts(path, model, taps)
        if floor:
            from . import floor as noise
            about = {key: facts["model"][key] for key in ("architecture", "layers", "weights_sha256")}
            floors = noise.measure(model, taps, [(r["ids"], r["fed"]) for r in rows], wanted)
        writer.finish({**facts, "level": level, "rows": rows, "sites": sorted(seen)})
    except BaseException:
        writer.discard()
        raise
    if floor:
        (Path(out) / "floor.json").write_text(json.dumps({"format": "lockstep-floor", "version": 1, "model": about, "policies": floors}) + "\n")
    print(f"{out}: {len(rows)} sequences, {writer.seq} tensors")


if __name__ == "__main__":
    main()
