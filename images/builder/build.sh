# Makes a root disk; run by the init of the machine that builds. On the first disk the file system is made; the second
# one is a tar archive with what belongs into it. What this prints is read by the one who waits:
#   strata: STEP DONE TOTAL      strata: done      strata: failed: WHY
set -eu -o pipefail
. /etc/strata/job
target=/target
log=/tmp/log
step=starting

ended() {
    trap - EXIT
    echo "strata: failed: $step"
    tail -n 12 $log 2>/dev/null | sed 's/^/strata: | /'
}
trap ended EXIT

step() {
    step=$1
    echo "strata: $*"
}

# In the system that is being made.
inside() {
    chroot $target /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 INITRD=No \
        DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true "$@"
}

# Counts the lines of dpkg that matter.
counted() {
    count=0
    while read -r line; do
        echo "$line" >>$log
        case "$line" in
        "Setting up "*)
            count=$((count + 1))
            echo "strata: $1 $count $2"
            ;;
        esac
    done
}

step format
# By their paths: busybox's shell prefers its own.
/sbin/mke2fs -q -F -t ext4 -U "$UUID" -L "$LABEL" -J size=32 -m 1 -e remount-ro \
    -E nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 /dev/vda >>$log 2>&1
# What is half-made after a crash is thrown away: nothing has to wait for the host's disk.
mount -t ext4 -o noatime,barrier=0,data=writeback,commit=600 /dev/vda $target

step unpack
tar -x -f /dev/vdb -C $target >>$log 2>&1

step configure 0 "$PACKAGES"
mount -t proc proc $target/proc
mount -t sysfs sysfs $target/sys
mount --bind /dev $target/dev
mount -t devpts devpts $target/dev/pts
mount -t tmpfs tmpfs $target/run
mount -t tmpfs tmpfs $target/tmp
# No service starts in here, no key is made that every copy would share, and the initial RAM disk is there already.
printf '#!/bin/sh\nexit 101\n' >$target/usr/sbin/policy-rc.d
chmod 755 $target/usr/sbin/policy-rc.d
for kind in rsa ecdsa ed25519; do
    touch $target/etc/ssh/ssh_host_${kind}_key
done
initramfs=$target/etc/initramfs-tools/update-initramfs.conf
cp -p $initramfs /tmp/initramfs.conf
sed -i 's/^update_initramfs=.*/update_initramfs=no/' $initramfs
# A shell that looks at each certificate is slow; what it would make is made below, all at once.
certificates=$target/usr/sbin/update-ca-certificates
mv $certificates /tmp/
printf '#!/bin/sh\nexit 0\n' >$certificates
chmod 755 $certificates
while read -r package file; do
    inside DPKG_MAINTSCRIPT_PACKAGE="$package" DPKG_MAINTSCRIPT_NAME=preinst DPKG_MAINTSCRIPT_ARCH=amd64 \
        DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 DPKG_ROOT= "/var/lib/dpkg/info/$file.preinst" install >>$log 2>&1
done </etc/strata/preinst
inside ldconfig >>$log 2>&1
inside dpkg --force-unsafe-io --configure -a 2>&1 </dev/null | counted configure "$PACKAGES"

step finish
mv /tmp/update-ca-certificates $certificates
(
    cd $target/usr/share/ca-certificates
    for file in mozilla/*.crt; do
        name=${file##*/}
        ln -s "/usr/share/ca-certificates/$file" "$target/etc/ssl/certs/${name%.crt}.pem"
    done
    cat mozilla/*.crt >$target/etc/ssl/certs/ca-certificates.crt
)
inside openssl rehash /etc/ssl/certs >>$log 2>&1

if [ "$ADDED" -gt 0 ]; then
    step add 0 "$ADDED"
    inside sh -c 'exec apt-get install -y -o APT::Sandbox::User=root -o Dpkg::Options::=--force-unsafe-io \
        /var/cache/strata/*.deb' 2>&1 </dev/null | counted add "$ADDED"
    # What nobody asked for by name goes when nothing needs it any more.
    needed=
    for file in $target/var/cache/strata/*.deb; do
        name=${file##*/}
        name=${name%%_*}
        case " $ASKED " in
        *" $name "*) ;;
        *) needed="$needed $name" ;;
        esac
    done
    [ -z "$needed" ] || inside apt-mark auto $needed >>$log 2>&1
    rm -rf $target/var/cache/strata
fi

step finish
problems=$(inside dpkg --audit)
if [ -n "$problems" ]; then
    echo "$problems" >>$log
    exit 1
fi
cp -p /tmp/initramfs.conf $initramfs
rm $target/usr/sbin/policy-rc.d $target/etc/ssh/ssh_host_*
# sshd starts when somebody connects.
rm -f $target/etc/systemd/system/multi-user.target.wants/ssh.service $target/etc/systemd/system/sshd.service
mkdir -p $target/etc/systemd/system/sockets.target.wants
ln -sf /lib/systemd/system/ssh.socket $target/etc/systemd/system/sockets.target.wants/ssh.socket
# There is no screen.
rm -f $target/etc/systemd/system/getty.target.wants/getty@tty1.service
# Every machine gets its own identity when it starts.
: >$target/etc/machine-id
rm -f $target/var/lib/dbus/machine-id $target/var/lib/systemd/random-seed
ln -s /etc/machine-id $target/var/lib/dbus/machine-id
rm -f $target/etc/hostname $target/var/lib/dpkg/*-old $target/var/cache/debconf/*-old $target/var/cache/apt/*.bin
find $target/var/log -type f -exec rm {} +
for mounted in tmp run dev/pts dev sys proc; do
    umount $target/$mounted
done
fstrim $target >>$log 2>&1 || true
umount $target

step check
/sbin/e2fsck -f -n /dev/vda >>$log 2>&1
trap - EXIT
echo "strata: done"
