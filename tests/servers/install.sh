#!/usr/bin/env bash
# Installs the servers that tests of stores need, as root: Debian's Ceph object gateway and a Java (they start no
# service); Hadoop, Azurite and Swift in a cache of the user's. moto and rclone are Python packages, and come with
# the others. Does nothing where all is there. PYTHON: one that has pip and venv.
set -euo pipefail
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/everstep-servers
mkdir -p "$cache"
exec 9> "$cache/lock"
flock 9

packages=()
for pair in radosgw:radosgw ceph-mon:ceph-mon ceph-osd:ceph-osd ceph:ceph-common java:default-jre-headless npm:npm; do
    command -v "${pair%%:*}" > /dev/null || packages+=("${pair#*:}")
done
# What Hadoop needs that does not come with it.
for jar in jersey1-core jersey1-server jersey1-servlet jsr311-api asm-all; do
    [ -e "/usr/share/java/$jar.jar" ] || packages+=("lib${jar/asm-all/asm}-java")
done
if [ ${#packages[@]} -gt 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends "${packages[@]}"
fi

# A NameNode and DataNodes of Hadoop 2.7.3 are inside the source package of an older Spark.
if [ ! -e "$cache/hadoop/complete" ]; then
    work=$(mktemp -d "$cache/hadoop.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/jars" "$work/more" "$work"/webroot/webapps/{hdfs,datanode,static}/WEB-INF
    # To look at the package, pip runs its setup, which asks for this.
    echo 'pypandoc<1.8' > "$work/constraints"
    PIP_CONSTRAINT=$work/constraints "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
        --dest "$work" pyspark==2.4.8
    needed=()
    for name in hadoop-{annotations,auth,common,hdfs} commons-{beanutils,cli,codec,collections,compress} \
        commons-{configuration,crypto,digester,httpclient,io,lang,logging,math3,net} api-{asn1-api,util} \
        apacheds guava htrace-core jackson-{core,mapper}-asl javax.servlet-api jetty jsp-api jsr305 leveldbjni \
        log4j netty protobuf-java slf4j xercesImpl xmlenc xz; do
        needed+=("*/deps/jars/$name-*.jar")
    done
    tar -xzf "$work/pyspark-2.4.8.tar.gz" -C "$work/jars" --strip-components=3 --wildcards "${needed[@]}"
    for jar in jersey1-core jersey1-server jersey1-servlet jsr311-api asm-all; do
        cp -L "/usr/share/java/$jar.jar" "$work/more/"
    done
    # Pages are not served, and are looked for.
    for page in hdfs datanode; do echo '<web-app/>' > "$work/webroot/webapps/$page/WEB-INF/web.xml"; done
    rm -f "$work"/pyspark-*.tar.gz "$work/constraints"
    touch "$work/complete"
    rm -rf "$cache/hadoop"
    mv "$work" "$cache/hadoop"
    trap - EXIT
fi

# Azure's emulator. `hdfs.py`, `azure.py` and `swift.py` look for all this by the same names.
azurite=3.37.0
if [ ! -e "$cache/azurite-$azurite/node_modules/.bin/azurite-blob" ]; then
    work=$(mktemp -d "$cache/azurite.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    npm install --silent --no-audit --no-fund --no-update-notifier --prefix "$work" "azurite@$azurite"
    rm -rf "$cache/azurite-$azurite"
    mv "$work" "$cache/azurite-$azurite"
    trap - EXIT
fi

# Two of OpenStack's Swift, over one environment of what both need: the last whose S3 interface refuses conditions,
# and one that takes them.
swifts=(2.35.5 2.38.3)
if ! { cat "$here/swift.txt" && echo "${swifts[@]}"; } | cmp -s - "$cache/swift/complete" ||
    ! "$cache/swift/bin/python" -c 'import eventlet' 2> /dev/null; then
    work=$(mktemp -d "$cache/swift.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    "$python" -m venv "$work"
    install=("$work/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all:)
    "${install[@]}" -r "$here/swift.txt"
    for version in "${swifts[@]}"; do
        "${install[@]}" --no-deps --target "$work/$version" "swift==$version"
    done
    { cat "$here/swift.txt" && echo "${swifts[@]}"; } > "$work/complete"
    rm -rf "$cache/swift"
    mv "$work" "$cache/swift"
    trap - EXIT
fi
