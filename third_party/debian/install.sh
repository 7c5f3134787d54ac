#!/bin/sh
# Installs Debian packages, as root or through a sudo that asks nothing; says what to install where that cannot be done.
set -u
manual() {
    echo "Please install: $* (on Debian or Ubuntu: apt-get install $*)" >&2
    exit 1
}
command -v apt-get >/dev/null || manual "$@"
run=env
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || manual "$@"
    run="sudo env"
fi
echo "installing Debian's $*"
$run DEBIAN_FRONTEND=noninteractive apt-get update -qq
$run DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null || manual "$@"
