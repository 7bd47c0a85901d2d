# L1: boots the guest under diptych, and while it writes backs its disk up (if asked),
# mirrors it, pivots and lets it write on. Leaves the images and what was said in /out.
#
# usage: mirror-in-l1.sh CPUS COPY_MODE FILES BACKUPS
#
# FILES is how many the guest writes. BACKUPS is how many incremental backups follow a full one, or 'none'. Each leaves what
# is restored by it as /out/backup.N.raw, and in /out/backup.N how many files the guest
# had told of before its instant, and how many after.

cpus=$1
copy_mode=$2
files=$3
backups=$4
console=/out/console
replies=/out/qmp
cp --help 2>&1 | grep -q sparse && sparse=--sparse=always
truncate -s "$(stat -c %s /scratch/source.raw)" /scratch/target.raw

diptych run --kernel vmlinux --initrd guest.cpio --cpus "$cpus" --memory 256M \
    --cmdline "console=ttyS0 panic=1 quiet mitigations=off nokaslr tsc=reliable no_timer_check cryptomgr.notests files=$files" \
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

told() { sed -n 's/^guest: \([0-9]*\) files.*/\1/p' $console | tail -n 1; }

# backup NUMBER ACTIONS ARGUMENTS: into what the one before left.
backup() {
    image=/scratch/backup.$1.raw
    if [ "$1" = 0 ]; then
        truncate -s "$(stat -c %s /scratch/source.raw)" "$image"
    else
        cp $sparse "/scratch/backup.$(($1 - 1)).raw" "$image"
    fi
    say '{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "b'"$1"'", "file": {"driver": "file", "filename": "'$image'"}}, "id": "add-b'"$1"'"}'
    wait_for $replies '"id": *"add-b'"$1"'"' 20
    before=$(told)
    say '{"execute": "transaction", "arguments": {"actions": ['"$2"'{"type": "blockdev-backup", "data": {"job-id": "backup'"$1"'", "device": "disk0", "target": "b'"$1"'", '"$3"'}}]}, "id": "backup'"$1"'"}'
    wait_for $replies '"id": *"backup'"$1"'"' 20
    echo "$before $(told)" >"/out/backup.$1"
    wait_for $replies '"BLOCK_JOB_COMPLETED".*"device": *"backup'"$1"'"' 60
    wait_for $replies '"JOB_STATUS_CHANGE".*"status": *"null".*"id": *"backup'"$1"'"\|"JOB_STATUS_CHANGE".*"id": *"backup'"$1"'".*"status": *"null"' 20
    say '{"execute": "blockdev-del", "arguments": {"node-name": "b'"$1"'"}, "id": "del-b'"$1"'"}'
    wait_for $replies '"id": *"del-b'"$1"'"' 20
    # The guest goes on before the next one.
    wait_for $console "guest: $(($(told) + 5)) files" 90
}

if [ "$backups" != none ]; then
    backup 0 '{"type": "block-dirty-bitmap-add", "data": {"node": "disk0", "name": "chain"}}, ' '"sync": "full"'
    number=1
    while [ $number -le "$backups" ]; do
        backup $number '' '"sync": "incremental", "bitmap": "chain"'
        number=$((number + 1))
    done
    say '{"execute": "block-dirty-bitmap-remove", "arguments": {"node": "disk0", "name": "chain"}, "id": "remove"}'
    wait_for $replies '"id": *"remove"' 20
    echo "l1: backed up: $(tail -n 1 $console)"
fi

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
wait_for $replies '"BLOCK_JOB_COMPLETED".*"device": *"m"' 60
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
for image in /scratch/target.raw /scratch/source.raw /scratch/backup.*.raw; do
    [ ! -e "$image" ] || mv "$image" /out/ 2>/dev/null || cp $sparse "$image" /out/
done
echo "l1: ok"
