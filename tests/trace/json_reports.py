"""Reports of `lockstep diff --json` against docs/diff.schema.json: within, divergent, inconclusive, with infinite errors.

    tests/trace/json_reports.py LOCKSTEP
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema

ROOT = Path(__file__).resolve().parents[2]
LOCKSTEP = sys.argv[1]
TRACES, SUBJECTS, MODELS = (ROOT / "tests/data" / name for name in ("traces", "subjects", "models"))
SCHEMA = json.loads((ROOT / "docs/diff.schema.json").read_text())
CASES = [("within", ["diff", TRACES / "mixtral", TRACES / "mixtral"]),
         ("within", ["diff", SUBJECTS / "llama.cpp", TRACES / "llama-q.Q4_1.gguf"]),
         ("divergent", ["diff", SUBJECTS / "broken-transformers", TRACES / "mixtral"]),
         ("inconclusive", ["diff", TRACES / "llama", TRACES / "mixtral"]),
         ("inconclusive", ["diff", TRACES / "mixtral", SUBJECTS / "broken-transformers", "--second", TRACES / "mixtral"]),
         ("divergent", ["bisect", "-m", MODELS / "mixtral", TRACES / "mixtral", "--inject", "rope-flatten-heads", "--graft"]),
         ("divergent", ["replay", "-m", MODELS / "llama", TRACES / "llama", "--inject", "gelu"])]


def main():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for verdict, command in CASES:
        report = run(command)
        validator.validate(report)
        assert report["verdict"] == verdict, (command, report["verdict"], report["reason"])
    for key in ("verdict", "coverage"):    # the schema refuses what is not a report
        assert not validator.is_valid({k: v for k, v in report.items() if k != key})
    with tempfile.TemporaryDirectory() as folder:    # infinite errors: a subject of NaN
        broken = Path(folder)
        for file in (TRACES / "llama").iterdir():
            data = file.read_bytes()
            if file.suffix == ".safetensors":
                header = 8 + int.from_bytes(data[:8], "little")
                data = data[:header] + b"\xff\xff\xff\x7f" * ((len(data) - header) // 4)
            if file.name == "manifest.json":    # hashes by a rule that is not named are not checked
                data = data.replace(b'"hash": "sha256-16",', b"")
            (broken / file.name).write_bytes(data)
        report = run(["diff", broken, TRACES / "llama"])
        validator.validate(report)
        assert report["first"]["error"] == "inf", report["first"]
    print(f"{len(CASES) + 1} reports fit the schema")


def run(command):
    done = subprocess.run([LOCKSTEP, *command, "--json"], capture_output=True, text=True)
    assert done.returncode == {"within": 0, "divergent": 1, "inconclusive": 2}[json.loads(done.stdout)["verdict"]]
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
