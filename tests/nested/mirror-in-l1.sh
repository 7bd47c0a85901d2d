# L1: boots the guest under diptych, mirrors its disk while it writes, pivots,
# lets it write on, and leaves both images and what was said in /out.
#
# usage: mirror-in-l1.sh CPUS COPY_MODE

cpus=$1
copy_mode=$2
console=/out/console
replies=/out/qmp
cp --help 2>&1 | grep -q sparse && sparse=--sparse=always
truncate -s "$(stat -c %s /scratch/source.raw)" /scratch/target.raw

diptych run --kernel vmlinux --initrd guest.cpio --cpus "$cpus" --memory 256M \
    --cmdline "console=ttyS0 panic=1 quiet mitigations=off nokaslr tsc=reliable no_timer_check cryptomgr.notests files=60" \
    --disk path=/scratch/source.raw,id=disk0 \
    --qmp unix:/tmp/qmp --serial file:$console 2>/out/stderr &
vmm=$!

fail() {
    echo "l1: FAILED: $*"
    kill $vmm 2>/dev/null
    sleep 1
    cat /out/stderr
    tail -n 20 $console $replies
    exit 1
}

# wait_for FILE PATTERN SECONDS
wait_for() {
    tries=$(($3 * 10))
    until grep -q "$2" "$1" 2>/dev/null; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || fail "no '$2' in $1"
        ! grep -q 'FAILED' $console 2>/dev/null || fail "the guest failed"
        kill -0 $vmm 2>/dev/null || grep -q "$2" "$1" || fail "diptych ended early"
        usleep 100000
    done
}

tries=100
until [ -S /tmp/qmp ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || fail "no monitor"
    usleep 100000
done
mkfifo /tmp/commands
socat - UNIX-CONNECT:/tmp/qmp </tmp/commands >$replies &
exec 3>/tmp/commands
say() { echo "$1" >&3; }

say '{"execute": "qmp_capabilities"}'
wait_for $console 'guest: 10 files' 90
say '{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "target", "file": {"driver": "file", "filename": "/scratch/target.raw"}}, "id": "add"}'
wait_for $replies '"id": *"add"' 20
say '{"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "disk0", "target": "target", "sync": "full", "copy-mode": "'"$copy_mode"'"}, "id": "mirror"}'
wait_for $replies BLOCK_JOB_READY 60
echo "l1: ready at $(grep -c . $console) lines of console: $(tail -n 1 $console)"
before=$(grep -c 'guest: .* files' $console)
tries=300
while [ "$(grep -c 'guest: .* files' $console)" -lt $((before + 2)) ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || fail "the guest does not write when the mirror is ready"
    usleep 100000
done
say '{"execute": "job-complete", "arguments": {"id": "m"}, "id": "complete"}'
wait_for $replies BLOCK_JOB_COMPLETED 60
cp /scratch/source.raw /scratch/at-pivot.raw
echo "l1: pivoted: $(tail -n 1 $console)"
grep 'guest: .* files' $console | tail -n 1 >/out/at-pivot
wait_for $console 'guest: done' 120
tries=200
while kill -0 $vmm 2>/dev/null; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || fail "diptych did not end with its guest"
    usleep 100000
done
wait $vmm
status=$?
exec 3>&-
[ $status = 0 ] || fail "diptych ended with status $status"
! grep '"error"' $replies || fail "an error reply or a failed job"
cmp -s /scratch/source.raw /scratch/at-pivot.raw || fail "the source changed after the pivot"
mv /scratch/target.raw /scratch/source.raw /out/ 2>/dev/null ||
    cp $sparse /scratch/target.raw /scratch/source.raw /out/
echo "l1: ok"
