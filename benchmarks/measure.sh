#!/usr/bin/env bash
# Measures everything that docs/performance.md shows, in less than ten minutes on two idle cores, and draws it:
#     bash benchmarks/measure.sh [QUERY GALLERY]
# QUERY and GALLERY: files of Market-1501's features for the comparison at its full size. Peers are compared where they are
# installed (pip install --no-deps fastreid); that comparison takes a minute and 10 GiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_WAIT_POLICY=passive
python=${PYTHON:-python}
out=docs/performance
mkdir -p "$out"

measure() { "$python" -m "benchmarks.$1" --output "$out/$2.json" "${@:3}"; }

measure bench_angular_center angular_center --rounds 7 --only "K=10000 V=3 D=2048 float32"
measure bench_viewpoint_aware_cross_entropy viewpoint_aware_cross_entropy --rounds 9
measure bench_linear_viewpoint_aware_cross_entropy linear --only "K=10000 V"
measure bench_ranking ranking --rounds 5
measure bench_verification verification --rounds 5 --only "Q=3368 G=15913 D=256"
measure train_step train_step --rounds 5 --only synthetic
measure retrieval retrieval --only "D=2048" --rounds 3
measure search search --rounds 21 --only "G=100000"
if [ $# = 2 ]; then
  measure retrieval market1501 --features "$1" "$2" --rounds 5 --peers
fi
"$python" -m benchmarks.plot
