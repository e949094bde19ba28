#!/usr/bin/env bash
# What only a GPU can prove, on a machine that needs no network.
#   tools/gpu_check.sh [tests] [determinism] [sanitizer] [bench] [records] [ncu]     without arguments: all but ncu
# Logs, records and a summary go to $OUT (gpu-check). Exit status 1 if any step failed.
#   PYTHON      has torch, pytest and fastattn                       (python3)
#   BENCH       fastattn_bench, built with CUDA                      (build/fastattn_bench)
#   RACECHECK   the same over kernels that racecheck can follow      (build/fastattn_racecheck)
#   BENCH_ARGS  more arguments for `python -m bench`, for example --op attention --peers fa4,cudnn
# Where there is no git, set FASTATTN_COMMIT: the records name the commit.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
program=${BENCH:-build/fastattn_bench}
racecheck=${RACECHECK:-build/fastattn_racecheck}
out=${OUT:-gpu-check}
mkdir -p "$out"
export PATH=$PATH:/usr/local/cuda/bin
export PYTHONPATH=build${PYTHONPATH:+:$PYTHONPATH} # the C++ core as the tests see it
summary=$out/summary.txt
: > "$summary"

# run NAME COMMAND...: its output in NAME.log, its exit status in the summary
run() {
  local name=$1 start=$SECONDS status=0
  shift
  "$@" > "$out/$name.log" 2>&1 || status=$?
  printf '%-44s exit %-3d %5d s   %s\n' "$name" "$status" $((SECONDS - start)) \
    "$(grep -v '^$' "$out/$name.log" | tail -n 1 | cut -c1-80)" | tee -a "$summary"
}

tests() {
  run tests "$python" -m pytest -m gpu -p no:cacheprovider
}

# The tests of it compare fewer runs.
determinism() {
  run determinism "$python" -m pytest -m gpu -p no:cacheprovider tests/test_determinism.py --repeats 1000
}

# under_pytest FILE TESTS: the GPU tests of test_FILE.py that match, under $tool
under_pytest() {
  run "$tool.$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --report-api-errors no "$python" -m pytest -m gpu -p no:cacheprovider "tests/test_$1.py" -k "$2"
}

# Small problems with ragged tiles: racecheck is slow, and errors sit at the edges.
sanitizer() {
  local tool op mode dim target
  for tool in memcheck synccheck racecheck; do
    [[ $tool == racecheck ]] && target=$racecheck || target=$program
    for mode in fwd bwd; do
      for op in $("$program" --ops --device cuda --mode "$mode"); do
        for dim in $("$program" --list --device cuda --op "$op" --mode "$mode" --small | grep -oE '_d[0-9]+' | sort -u); do
          run "$tool.$op.$mode$dim" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$target" --device cuda --seconds 0 --check --op "$op" --mode "$mode" --small --filter "$dim(_|\$)"
        done
      done
    done
    # No attentions, so not in the program. Each tensor is an allocation of its own: memcheck sees where it ends.
    under_pytest quantize_tokens_gpu "bits_of_the_cpu or head_dims"
    if [[ $tool != racecheck ]]; then # torch has no kernels for it
      under_pytest estimate_blocks_gpu "judges_the_same_queries"
      under_pytest attention_options "lengths_around or probed"
      under_pytest gradients "wanted_is or deterministic or blind"
      under_pytest attention_regions "probed"
      under_pytest attention_split "views or queries_at_once"
      under_pytest varlen_attention "cut_off or unused or nan_of_one or (test_values and around)"
      under_pytest quantized_attention "order_that_is_none"
    fi
  done
}

bench() {
  local op mode
  for mode in fwd bwd; do
    for op in $("$program" --ops --device cuda --mode "$mode"); do
      run "fastattn_bench.$op.$mode" "$program" --device cuda --check --op "$op" --mode "$mode" \
        --json "$out/fastattn_bench.$op.$mode.json"
    done
  done
}

records() {
  # shellcheck disable=SC2086  # BENCH_ARGS is a list of words
  run records "$python" -m bench --device cuda --output "$out/results" ${BENCH_ARGS:-}
  # Of some cases also deterministic backwards, gradients of some inputs alone, and forward and backward as one.
  run records.deterministic "$python" -m bench --device cuda --output "$out/results" --modes bwd_deterministic \
    --op neighborhood_attention --op block_sparse_attention --op sigmoid_attention
  run records.partial "$python" -m bench --device cuda --output "$out/results" --modes bwd_q,bwd_kv,bwd_deterministic \
    --op attention --cases '^b(4_s4096|1_s16384)_h[0-9]+_d(64|128|256)(_causal)?$|s512_'
  run records.both "$python" -m bench --device cuda --output "$out/results" --modes fwd+bwd \
    --op attention --cases '^b(8_s2048|2_s8192|1_s32768)_h16_d128_causal$'
  run records.memory "$python" -m bench.memory --output "$out/results"
  run records.quantize_tokens "$python" -m bench.quantize_tokens --device cuda
  run records.estimate_blocks "$python" -m bench.estimate_blocks --device cuda
}

ncu() {
  local mode
  for mode in fwd bwd; do
    run "ncu.$mode" command ncu --set full --clock-control none --kernel-name regex:attention --launch-count 4 \
      --force-overwrite --export "$out/attention.$mode" \
      "$program" --device cuda --seconds 0 --mode "$mode" --case b1_s16384_h16_d128_causal
  done
}

[[ $# -gt 0 ]] || set -- tests determinism sanitizer bench records
for step in "$@"; do
  case $step in
    tests | determinism | sanitizer | bench | records | ncu) "$step" ;;
    *)
      echo "gpu_check.sh: step '$step'; allowed: tests, determinism, sanitizer, bench, records, ncu" >&2
      exit 2
      ;;
  esac
done
! grep -q 'exit [^0]' "$summary"
