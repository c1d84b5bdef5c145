#!/bin/sh
# Rebuild the eBPF objects from their sources (developers only: clang, llvm-strip) and record the hash of
# what they were built from. Usage: scripts/build_bpf.sh [OUTPUT_FOLDER]
set -eu
here=$(cd "$(dirname "$0")/../src/latencyprism/bpf/programs" && pwd)
out=$(mkdir -p "${1:-$here}" && cd "${1:-$here}" && pwd)
clang=${CLANG:-$(command -v clang-14 || command -v clang)}
strip=${LLVM_STRIP:-$(command -v llvm-strip-14 || command -v llvm-strip)}
cd "$here"

build() { # SOURCE OBJECT [DEFINE]; the object names its source, but not the folder that it was built in
    "$clang" -ffile-prefix-map="$here"=. -O2 -g -Wall -Werror -target bpf -mcpu=v3 ${3:+"-D$3"} -c "$1" -o "$out/$2"
    "$strip" -g "$out/$2"
}

build native_step.bpf.c native_step.x86_64.bpf.o LP_X86_64
build native_step.bpf.c native_step.aarch64.bpf.o LP_AARCH64
build below.bpf.c below.bpf.o
build calls.bpf.c calls.x86_64.bpf.o LP_X86_64
build calls.bpf.c calls.aarch64.bpf.o LP_AARCH64
sha256sum lp_bpf.h lp_registers.h calls.bpf.c native_step.bpf.c below.bpf.c > "$out/sources.sha256"
