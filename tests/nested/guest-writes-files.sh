# L2: mounts the ext4 file system on the disk and writes files until the disk
# holds enough of them or the file 'stop' says so by its size on the command
# line. Every file's checksum goes to a list on the same disk.
#
# Lines on the console that the outer script waits for begin with 'guest:'.

disk=/dev/vda
param() { tr ' ' '\n' </proc/cmdline | sed -n "s/^$1=//p"; }

finish() {
    echo "guest: $*"
    sync
    poweroff -f
}

[ -b $disk ] || finish "FAILED: no $disk"
mount -t ext4 $disk /mnt || finish "FAILED: mount"
echo "guest: $(nproc) processors, $(uname -r)"
files=$(param files)
n=0
while [ "$n" -lt "$files" ]; do
    dd if=/dev/urandom of="/mnt/f$n" bs=16k count=4 2>/dev/null || finish "FAILED: write f$n"
    (cd /mnt && sha256sum "f$n" >>sums) || finish "FAILED: sum of f$n"
    # Half of the files are on the disk at once, the rest when the kernel likes.
    [ $((n % 2)) = 0 ] || sync
    # Rewrites, so that the mirror meets blocks that it has copied before.
    dd if=/dev/urandom of=/mnt/scratch bs=16k count=8 conv=notrunc 2>/dev/null
    n=$((n + 1))
    [ $((n % 5)) != 0 ] || echo "guest: $n files"
    usleep 30000
done
sync
(cd /mnt && sha256sum -c sums >/tmp/checked) || finish "FAILED: $(grep -v OK /tmp/checked)"
umount /mnt || finish "FAILED: umount"
finish "done"
