#!/usr/bin/env bash
# Prepares the environment in DIR and runs the tests of this folder in it: run.sh DIR [pytest arguments]
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 DIR [pytest arguments]" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=$1
shift
"$here/setup_env.sh" "$target"
target=$(cd "$target" && pwd)
# "required": an environment without the engines fails instead of finding no tests.
TRL_POOL_REAL_ENGINE=required exec "$target/bin/python" -m pytest "$here" "$@"
