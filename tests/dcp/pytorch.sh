#!/usr/bin/env bash
# Gets PyTorch's own tests of its checkpoints out of Debian's source package of it, the newest that this system's
# mirror has, into a cache of the user's. They are read there, and are no part of this project. Does nothing where
# they are there. Prints the directory.
set -euo pipefail
suites=${SUITES:-sid forky trixie}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/everstep-pytorch
mkdir -p "$cache"
exec 9> "$cache/lock"
flock 9
if [ ! -e "$cache/tests/complete" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN) $(LABEL)' | awk '$2 == "Debian" && $3 == "Debian" { print $1; exit }')
    [ -n "$mirror" ] || { echo "this system has no mirror of Debian" >&2; exit 1; }
    work=$(mktemp -d "$cache/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    for suite in $suites; do
        mkdir -p "$work/$suite/lists/partial" "$work/$suite/source"
        echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" > "$work/$suite/list"
        apt=(apt-get -q -o "Dir::Etc::SourceList=$work/$suite/list" -o Dir::Etc::SourceParts=-
            -o "Dir::State::Lists=$work/$suite/lists" -o APT::Sandbox::User=root)
        if (cd "$work/$suite/source" && "${apt[@]}" update && "${apt[@]}" source --download-only --only-source pytorch) >&2; then
            mkdir "$work/tests"
            tar -xJf "$work/$suite"/source/pytorch_*.orig.tar.xz -C "$work/tests" --strip-components=4 --wildcards '*/test/distributed/checkpoint/*'
            basename "$work/$suite"/source/pytorch_*.orig.tar.xz .orig.tar.xz > "$work/tests/complete"
            rm -rf "$cache/tests"
            mv "$work/tests" "$cache/tests"
            break
        fi
    done
fi
[ -e "$cache/tests/complete" ] || { echo "none of the suites $suites has PyTorch's sources" >&2; exit 1; }
echo "$cache/tests"
