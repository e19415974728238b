#!/usr/bin/env bash
# The tests under several versions of PyTorch, each in an environment of its own, .venv-<version>; prints the table of docs/versions.md.
#
#     tests/versions.sh "2.11.0 2.14.1" [arguments of pytest, such as the names of some files]
#
# Fails if any test does. What the tests print is in .venv-<version>/tests.log.
set -uo pipefail
cd "$(dirname "$0")/.."
versions=$1
shift

status=0
rows=()
for version in $versions; do
    environment=.venv-$version
    mkdir -p "$environment"
    log=$environment/tests.log
    begin=$SECONDS
    if ${MAKE:-make} "$environment/package" "$environment/test-extras" VERSION="$version" >&2; then
        begin=$SECONDS
        ${MAKE:-make} test VERSION="$version" TESTS="$*" >"$log" 2>&1 || status=1
        # pytest's last line, without colours: "2 failed, 100 passed, 3 skipped, 1 warning in 65.43s (0:01:05)"
        summary=$(grep -E "(passed|failed|error|skipped).* in [0-9.]+s" "$log" | tail -1)
        count() { grep -oE "[0-9]+ $1" <<<"$summary" | cut -d' ' -f1 | grep . || echo 0; }
        failed=$(($(count failed) + $(count error)))
        rows+=("| $version | $(count passed) | $failed | $(count skipped) | $((SECONDS - begin)) |")
        [ -n "$summary" ] || { tail -20 "$log" >&2; status=1; }
        grep -E "^(FAILED|ERROR)" "$log" >&2
    else
        rows+=("| $version | not installed | | | |")
        status=1
    fi
done

echo "| PyTorch | passed | failed | skipped | seconds |"
echo "|---|---|---|---|---|"
printf '%s\n' "${rows[@]}"
exit $status
