#!/usr/bin/env bash
# Prepares both environments, in DIR/legacy and DIR/modern, and runs in each the tests that belong there:
# run.sh DIR [legacy|modern] [pytest arguments]
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 DIR [legacy|modern] [pytest arguments]" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
target=$(cd "$1" && pwd)
shift
generations=(legacy modern)
case ${1:-} in
    legacy | modern)
        generations=("$1")
        shift
        ;;
esac

for generation in "${generations[@]}"; do
    "$here/setup_env.sh" "$target/$generation" "$generation"
done

failed=0
for generation in "${generations[@]}"; do
    echo "== $generation"
    status=0
    # "required": an environment without the engines fails instead of finding no tests.
    TRL_POOL_REAL_ENGINE=required "$target/$generation/bin/python" -m pytest "$here" "$@" || status=$?
    # 5: a selection (-k) that is for the other environment finds nothing here.
    if [ "$status" -ne 0 ] && { [ "$status" -ne 5 ] || [ $# -eq 0 ]; }; then
        failed=1
    fi
done
exit "$failed"
