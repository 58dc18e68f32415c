#!/usr/bin/env bash
# Build the library and run its quick tests (not those marked slow, not the trainer's) with many releases of Python, torch,
# Triton and NumPy.
#
#   tests/matrix.sh                           every line of the table below
#   tests/matrix.sh "3.11 2.6.0 3.2.0 1.26"   one of them: Python, torch, Triton, NumPy
#
# Prints one line a combination: passed, failed (its log is kept and named) or skipped, with the reason. Interpreters are
# those on the PATH (python3.10 …), else uv's where uv is installed. TORCH_INDEX names another index for torch,
# for instance https://download.pytorch.org/whl/cpu; without it each environment takes about 6 GB, until its tests are through.
# MATRIX_TESTS="tests/test_scale.py …" runs those files alone. MATRIX_LOGS is a folder for all logs. Exit status 1 if a
# combination failed.
set -uo pipefail
cd "$(dirname "$0")/.."

combinations=(
  "3.10 2.6.0  3.2.0 1.26"
  "3.11 2.6.0  3.2.0 1.26"
  "3.11 2.8.0  3.4.0 2.1"
  "3.11 2.11.0 3.6.0 2.3"
  "3.11 2.13.0 3.7.1 2.3"
  "3.11 2.15.0 latest 2.4"
  "3.12 2.11.0 3.6.0 2.3"
  "3.13 2.13.0 3.7.1 2.3"
  "3.14 2.15.0 latest latest"
)
[ $# -gt 0 ] && combinations=("$@")

work=$(mktemp -d)
mkdir -p "${MATRIX_LOGS:=$work/logs}"
logs=$(realpath "$MATRIX_LOGS") # tests run in another folder
failed=0

new_environment() { # python folder
  if command -v "python$1" > /dev/null; then
    "python$1" -m venv "$2"
  elif command -v uv > /dev/null; then
    uv venv --quiet --seed --python "$1" "$2"
  else
    return 1
  fi
}

release() { [ "$2" = latest ] && echo "$1" || echo "$1==$2.*"; }

try() { # python torch triton numpy log
  local environment=$work/venv
  rm -rf "$environment"
  new_environment "$1" "$environment" > "$5" 2>&1 || { echo "skipped: no python$1 here"; return; }
  local python=$environment/bin/python
  {
    "$python" -m pip install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torch==$2" &&
      "$python" -m pip install --quiet "$(release numpy "$4")" "$(release triton "$3")" &&
      ACTION_KERNELS_CUDA_ARCHS= "$python" -m pip install --quiet . "pytest>=8" "pytest-benchmark>=4" ninja "setuptools>=77" hypothesis safetensors scipy
  } >> "$5" 2>&1 || { echo "skipped: cannot be installed: $(grep -m 1 ERROR "$5" | cut -c 1-120)"; return; }
  local tests=() outcome=passed
  read -r -a tests <<< "${MATRIX_TESTS:-tests}"
  (cd "$work" && "$environment/bin/pytest" -q -m "not slow and not gpu" --ignore="$root/tests/trainer" \
    --ignore="$root/tests/clients" -c "$root/pyproject.toml" --rootdir "$root" "${tests[@]/#/$root/}") >> "$5" 2>&1 || outcome=FAILED
  rm -rf "$environment"
  echo "$outcome: $(tail -1 "$5")$([ $outcome = passed ] || echo " ($5)")"
}

root=$PWD
for combination in "${combinations[@]}"; do
  read -r python torch triton numpy <<< "$combination"
  log=$logs/python-$python-torch-$torch-triton-$triton.log
  outcome=$(try "$python" "$torch" "$triton" "$numpy" "$log")
  printf 'Python %-5s torch %-7s Triton %-7s NumPy %-7s %s\n' "$python" "$torch" "$triton" "$numpy" "$outcome"
  case $outcome in FAILED*) failed=1 ;; esac
done
exit $failed
