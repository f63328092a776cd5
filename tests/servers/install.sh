#!/usr/bin/env bash
# Installs the servers that tests of object stores need: Debian's Ceph object gateway (they start no service).
# moto and rclone are Python packages, and come with the others. As root; does nothing where all is there.
set -euo pipefail
packages=()
for pair in radosgw:radosgw ceph-mon:ceph-mon ceph-osd:ceph-osd ceph:ceph-common; do
    command -v "${pair%%:*}" > /dev/null || packages+=("${pair#*:}")
done
[ ${#packages[@]} -eq 0 ] && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends "${packages[@]}"
