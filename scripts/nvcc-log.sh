#!/bin/sh
# The compiler launcher of CMakeLists.txt: runs nvcc and keeps what ptxas says of each kernel (-Xptxas=-v) in <object>.ptxas, not on the screen.
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" 2>"$object.ptxas"
status=$?
grep -vE '^ptxas info +: ([0-9]+ bytes|Compiling entry|Function properties|Used|Compile time)|bytes stack frame' "$object.ptxas" >&2
exit $status
