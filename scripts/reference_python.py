"""To import before packages of the reference: runs the script again with the Python of scripts/reference-env, which has them."""
import os
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1] / "build" / "reference-env"

if Path(sys.prefix) != HOME:
    python = HOME / "bin" / "python"
    if not python.exists():
        if {"-h", "--help"} & set(sys.argv[1:]):    # what a script is for can be told without
            text = Path(sys.argv[0]).read_text().split('"""')[1]
            print(text)
            sys.exit()
        sys.exit(f"{sys.argv[0]}: needs the reference's packages: run scripts/reference-env first")
    os.execv(python, [python, *sys.argv])
